"""The pace of drafting: it grows with luck, pauses without, and loses no more than it may."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.runtime.session.pace import COSTS, MOST_STAKE, SHARE, SIZES, STAKE, Pace


def run(pace, passes, right, agreeing=9, most=16):
    """Sizes that were chosen where `right(size)` drafted tokens are right; time taken and tokens said, in steps."""
    sizes, taken, said = [], 0.0, 0
    for _ in range(passes):
        size = pace.size(agreeing, most)
        sizes.append(size)
        if size == 1:
            pace.stepped(1.0)
            taken, said = taken + 1, said + 1
            continue
        good = right(size)
        pace.passed(size, COSTS[size])
        pace.learn(agreeing, size, good, COSTS[size])
        taken, said = taken + COSTS[size], said + 1 + good
    return sizes, taken, said


def test_luck_makes_passes_long():
    sizes, taken, said = run(Pace(), 20, lambda size: size - 1)
    assert sizes[-1] == SIZES[-1]
    assert said > 3 * taken


def test_misfortune_ends_them():
    sizes, _, _ = run(Pace(), 200, lambda size: 0)
    assert sizes[0] > 1
    assert sizes.count(1) > 190


@given(st.floats(0, 1), st.integers(0, 1000), st.sampled_from((0, 2, 3, 5, 9)))
def test_no_text_takes_longer_than_its_stake(chance, seed, agreeing):
    rng = np.random.default_rng(seed)
    pace = Pace()
    pace.stepped(1.0)
    _, taken, said = run(pace, 300, lambda size: int(min(size - 1, rng.geometric(1 - chance * 0.99) - 1)), agreeing)
    assert taken <= said * (1 + SHARE) + STAKE + SHARE


def test_a_gain_is_not_put_at_stake_for_ever():
    pace = Pace()
    pace.stepped(1.0)
    run(pace, 50, lambda size: size - 1)
    assert pace.account == MOST_STAKE
    _, taken, said = run(pace, 400, lambda size: 0)
    assert taken <= said * (1 + SHARE) + MOST_STAKE


@pytest.mark.parametrize("most", range(1, 20))
def test_no_pass_is_longer_than_it_may_be(most):
    pace = Pace()
    assert max(run(pace, 20, lambda size: size - 1, most=most)[0]) <= most


def test_guesses_teach_without_a_pass():
    pace = Pace()
    assert pace.size(2, 16) == 1
    for _ in range(5):
        pace.guessed(2, True)
    assert pace.size(2, 16) > 1
    for _ in range(30):
        pace.guessed(9, False)
    assert pace.size(9, 16) == 1
    assert pace.size(2, 16) > 1


def test_right_guesses_end_a_pause():
    pace = Pace()
    pace.stepped(1.0)
    run(pace, 20, lambda size: 0)
    assert pace.size(9, 16) == 1
    for _ in range(30):
        pace.guessed(9, True)
    assert pace.account == STAKE
    assert pace.size(9, 16) > 1


def test_measured_costs_decide():
    pace = Pace()
    for _ in range(9):
        pace.stepped(1.0)
        for size in SIZES:
            pace.passed(size, 1.0 * size)  # a machine on which a pass saves nothing
    assert pace.cost(4) == 4
    assert pace.size(12, 16) == 1


@pytest.mark.parametrize("sessions", [2, 4, 8, 16])
def test_a_shared_pass_is_for_drafts_that_are_likely(sessions):
    """What a drafted token costs there is nearly what a text's own next one does: most of them have to be right."""
    pace = Pace()
    assert pace.size(2, 16, sessions) == 1
    size = pace.size(9, 16, sessions)
    assert size > 1
    assert pace.cost(size, sessions) > pace.cost(size)
    most = max(pace.cost(n, sessions) for n in SIZES)  # what one trial may overdraw
    pace.learn(9, size, 0, None, sessions)
    said = taken = 0.0
    for _ in range(200):
        size = pace.size(9, 16, sessions)
        taken, said = taken + pace.cost(size, sessions) * (size > 1) + (size == 1), said + 1
        if size > 1:
            pace.learn(9, size, 0, None, sessions)
        else:
            pace.stepped(None)
    assert taken <= said * (1 + SHARE) + 1 + most


def test_luck_is_followed_in_shared_passes_too():
    pace = Pace()
    for _ in range(20):
        size = pace.size(9, 16, 8)
        pace.learn(9, size, size - 1, None, 8)
    assert size == SIZES[-1]
