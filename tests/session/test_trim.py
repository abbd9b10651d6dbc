"""Trimming: a trimmed session equals one that never saw the rest."""

from __future__ import annotations

import numpy as np
import pytest

from kvq.runtime.errors import ContextError
from tests.tools.sessions import CONTEXT, HALF, IDS, ROUNDED, appended, positions, rows


# Around the borders of a window of 16 and of the pages (16, 32, ... tokens).
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 32, 33, 63, 64, 65, 79, 80])
@pytest.mark.parametrize(
    ("policy", "recent", "tolerance"),
    [
        ("fp16", 16, HALF),
        ("int8", CONTEXT, ROUNDED),
        # Without a window nothing is run again: only the order of sums over the buckets may differ.
        ("fp16", 0, 1e-4),
        ("mixed", 0, 1e-4),
        ("rule", 0, 1e-4),
        # Tokens run again read neighbours as stored that they first read from the window: at few bits
        # the logits differ by what the quantizer costs, but never which token has which precision.
        ("mixed", 16, None),
        ("k4v2", 1, None),
    ],
)
def test_a_trimmed_session_equals_one_that_never_saw_the_rest(tiny_model, policy, recent, tolerance, length):
    trimmed = tiny_model.session(policy, recent=recent)
    appended(trimmed, IDS[:80], [1])
    trimmed.trim(length)
    assert trimmed.tokens == IDS[:length]
    assert trimmed.store.length == length
    fresh = tiny_model.session(policy, recent=recent)
    if length:
        appended(fresh, IDS[:length], [1])
    assert positions(trimmed) == positions(fresh)
    for ids in (IDS[100:103], IDS[103:104]):
        result, expected = trimmed.append(ids), fresh.append(ids)
        if tolerance is not None:
            np.testing.assert_allclose(result, expected, atol=tolerance, rtol=0)
        assert positions(trimmed) == positions(fresh)
    assert trimmed.tokens == fresh.tokens


def test_trimming_again_and_again_keeps_the_window_full(tiny_model):
    session = tiny_model.session("int4", recent=16)
    session.append(IDS[:80])
    for length in (80, 70, 69, 40, 16, 5, 0):
        session.trim(length)
        assert rows(session).get("recent", 0) == min(16, length)
        assert sum(rows(session).values()) == length


@pytest.mark.parametrize("length", [-1, 11, 1000])
def test_trimming_to_a_length_that_is_not_there_is_refused(tiny_model, length):
    session = tiny_model.session()
    session.append(IDS[:10])
    with pytest.raises(ContextError, match=f"cannot trim to {length} tokens"):
        session.trim(length)
    assert session.tokens == IDS[:10]


def test_trimming_forgets_the_rarity_of_forgotten_tokens(tiny_model):
    trimmed, fresh = (tiny_model.session("rule", recent=0) for _ in range(2))
    appended(trimmed, [*IDS[:20], *[7] * 30], [1])
    trimmed.trim(20)
    appended(fresh, IDS[:20], [1])
    ids = [7, 8, 7, 9] * 5
    np.testing.assert_allclose(appended(trimmed, ids, [1]), appended(fresh, ids, [1]), atol=1e-4)
    assert positions(trimmed) == positions(fresh)
