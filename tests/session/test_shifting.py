"""A text longer than its context: the oldest part goes, and what is said then is what a fresh session would say."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.runtime.errors import ContextError, PromptError, SamplingError
from kvq.runtime.session.adjusting import Adjustment
from kvq.runtime.session.appending import Appending
from kvq.runtime.session.generation import events
from kvq.runtime.session.shifting import Kept, TurnShift, of_messages, sliding
from tests.tools.packages import needs
from tests.tools.sessions import CONTEXT, IDS, greedy

SINK = 4


def by_hand(model, ids, count, keep, settings):
    """Greedy tokens, a new session each time the context is full; how often, and how many tokens went."""
    session, said, times, removed = model.session(**settings), [], 0, 0
    session.append(ids)
    while True:
        said.append(int(np.argmax(session.last_logits)))
        if len(said) == count:
            return said, times, removed
        text = [*session.tokens, said[-1]]
        if len(text) < CONTEXT:
            session.append(said[-1:])
            continue
        newest = (CONTEXT - keep) // 2
        times, removed = times + 1, removed + len(text) - keep - newest
        session = model.session(**settings)
        session.append(text[:keep] + text[-newest:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shift", "keep", "settings"),
    [
        (True, SINK, {"policy": "fp16"}),
        (True, 2, {"policy": "int4", "sink": 2, "prefill_chunk": 32}),
        (0, 0, {"policy": "rule", "recent": 8}),
        (50, 50, {"kv_bits": 8.0}),
        (192, 192, {"policy": "int8"}),
    ],
)
def test_the_text_is_that_of_fresh_sessions(tiny_model, shift, keep, settings):
    count = 220
    session = tiny_model.session(**settings)
    said = greedy(session, IDS[:100], count, context_shift=shift)
    expected, times, removed = by_hand(tiny_model, IDS[:100], count, keep, settings)
    assert said == expected
    stats = session.stats()
    assert (stats.context_shifts, stats.shifted_tokens) == (times, removed)
    assert times >= 1
    assert f", {removed} tokens removed" in stats.line()
    assert session.tokens[: min(keep, 100)] == IDS[: min(keep, 100)]
    assert len(session.tokens) + removed == 100 + count - 1


def test_without_it_a_full_context_ends_the_text(tiny_model):
    last = list(tiny_model.session("fp16").generate(IDS[:100], max_tokens=None, temperature=0, ignore_eos=True))[-1]
    assert last.finish_reason == "context"
    assert last.index == CONTEXT - 100
    stats = tiny_model.session("fp16").stats()
    assert (stats.context_shifts, stats.shifted_tokens) == (0, 0)
    assert "full" not in stats.line()


def test_only_max_tokens_ends_it(tiny_model):
    options = {"max_tokens": 200, "temperature": 0, "ignore_eos": True, "context_shift": True}
    responses = list(tiny_model.session("fp16").generate(IDS[:100], **options))
    assert [r.finish_reason for r in responses] == [None] * 199 + ["length"]


@pytest.mark.slow
def test_draws_and_penalties_go_on_across_it(tiny_model):
    def run(seed):
        options = {"temperature": 1.3, "seed": seed, "frequency_penalty": 0.3, "context_shift": True}
        session = tiny_model.session("int8")
        return [r.token for r in session.generate(IDS[:100], max_tokens=180, ignore_eos=True, **options)]

    assert run(1) == run(1) != run(2)


@given(st.integers(0, 40), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60)), min_size=1, max_size=80))
def test_penalties_count_what_was_said_whatever_went(before, steps):
    """steps: a token said, and how many of the oldest ids go before the next is drawn."""
    adjustment, history, said = Adjustment(1.0, 0.0, 1.0, None), list(range(before)), []
    for token, gone in steps:
        expected = np.array([-float(Counter(said)[i]) for i in range(10)], np.float32)
        np.testing.assert_array_equal(adjustment(np.zeros(10, np.float32), history), expected)
        history = [*history, token][min(gone, len(history)) :]
        said.append(token)


@pytest.mark.slow
def test_a_stop_text_is_found_across_it(tiny_model):
    """Wherever a shift falls: the text up to a stop string is that of the same generation without one."""
    options = {"temperature": 0, "ignore_eos": True, "context_shift": True}
    whole = list(tiny_model.session("fp16").generate(IDS[:200], max_tokens=80, **options))
    shown = "".join(response.text for response in whole)
    at = len("".join(response.text for response in whole[: CONTEXT - 200 - 2]))
    stop = shown[at : at + 8]
    assert len(stop) == 8
    found = list(tiny_model.session("fp16").generate(IDS[:200], max_tokens=80, stop=stop, **options))
    assert "".join(response.text for response in found) == shown[: shown.index(stop)]
    assert found[-1].finish_reason == "stop"


@pytest.mark.slow
def test_structured_output_holds_across_it(tiny_model):
    needs("llguidance")
    session = tiny_model.session("int8")
    options = {"max_tokens": None, "temperature": 1.0, "seed": 3, "context_shift": True, "regex": "(a[bc]){180}"}
    responses = list(session.generate(IDS[:150], **options))
    assert re.fullmatch("(a[bc]){180}", "".join(response.text for response in responses))
    assert responses[-1].finish_reason == "stop"
    assert session.stats().context_shifts >= 1


@pytest.mark.slow
@pytest.mark.parametrize("parts", [(90, 110), (155, 45), (156, 44), (157, 43)])
def test_a_saved_session_goes_on_as_if_it_had_never_been_away(tiny_model, tmp_path, parts):
    """Cut before the shift, beside it, and behind it: the text is that of one call."""
    whole = greedy(tiny_model.session("int4"), IDS[:100], sum(parts), context_shift=True)
    session = tiny_model.session("int4")
    said = greedy(session, IDS[:100], parts[0], context_shift=True)
    session.save(tmp_path / "text.kvq")
    loaded = tiny_model.load_session(tmp_path / "text.kvq")
    assert said + greedy(loaded, None, parts[1], context_shift=True) == whole


def test_a_prompt_that_does_not_fit_any_more_takes_the_place_of_the_oldest(tiny_model):
    session = tiny_model.session("fp16")
    session.append(IDS)
    session.append(IDS)
    new = IDS[:40]
    said = greedy(session, new, 5, context_shift=True)
    newest = (CONTEXT - SINK) // 2
    fresh = tiny_model.session("fp16")
    assert said == greedy(fresh, IDS[:SINK] + ([*IDS, *IDS, *new])[-newest:], 5)
    assert session.stats().shifted_tokens == 280 - SINK - newest


def test_a_prompt_itself_is_never_cut(tiny_model):
    session = tiny_model.session("fp16")
    session.append(IDS)
    long = [*IDS, *IDS][:200]
    said = greedy(session, long, 3, context_shift=True)
    assert said == greedy(tiny_model.session("fp16"), IDS[:SINK] + long, 3)
    with pytest.raises(ContextError, match="do not fit"):
        greedy(session, [*IDS, *IDS, *IDS[:16]], 3, context_shift=True)
    tokens = list(session.tokens)
    with pytest.raises(PromptError, match="must be integers in"):
        greedy(session, [10**6] * 200, 3, context_shift=True)
    assert session.tokens == tokens


def test_a_prompt_may_fill_the_context(tiny_model):
    prompt = [*IDS, *IDS, *IDS][:CONTEXT]
    said = greedy(tiny_model.session("fp16"), prompt, 3, context_shift=True)
    first = greedy(tiny_model.session("fp16"), prompt, 1)
    rest = prompt[:SINK] + [*prompt, *first][-((CONTEXT - SINK) // 2) :]
    assert said == first + greedy(tiny_model.session("fp16"), rest, 2)


@pytest.mark.slow
def test_several_sessions_in_one_pass_shift_each_in_its_own_time(tiny_model):
    settings = [("int8", IDS[:120]), ("int8", IDS[:60]), ("fp16", IDS)]
    options = {"max_tokens": 200, "temperature": 0, "ignore_eos": True, "context_shift": True}
    sessions = [tiny_model.session(policy) for policy, _ in settings]
    running = {
        number: events(session, ids, **options)
        for number, (session, (_, ids)) in enumerate(zip(sessions, settings, strict=True))
    }
    said: dict[int, list[int]] = {number: [] for number in running}
    waiting: dict[int, Appending] = {}
    while running:
        for number, generation in list(running.items()):
            while number not in waiting:
                event = next(generation, None)
                if event is None:
                    del running[number]
                    break
                if isinstance(event, Appending):
                    waiting[number] = event
                else:
                    said[number].append(event.token)
        assert not any(tiny_model.run_pass(list(waiting.values())))
        waiting = {number: appending for number, appending in waiting.items() if not appending.finished}
    for number, (policy, ids) in enumerate(settings):
        assert said[number] == greedy(tiny_model.session(policy), ids, 200, context_shift=True)
        assert sessions[number].shifts.times >= 1


@pytest.mark.parametrize("wrong", [-1, 193, "yes", 1.5, None])
def test_what_cannot_stay_is_refused(tiny_model, wrong):
    with pytest.raises(SamplingError, match=r"context_shift must be true, false, or .* 0 to 192 in a context of 256"):
        tiny_model.session("fp16").generate(IDS, context_shift=wrong)


@given(
    st.integers(20, 300).flatmap(
        lambda context: st.tuples(
            st.just(context), st.integers(0, context * 3 // 4), st.integers(1, 2 * context), st.integers(0, 2 * context)
        )
    )
)
def test_what_stays_is_the_beginning_and_the_newest(case):
    context, keep, more, begun = case
    ids = list(range(context + more - 1))
    begun = min(begun, len(ids))
    kept = sliding(keep, context)(ids, begun, 1)
    newest = (context - keep) // 2
    assert kept.ids == ids[:keep] + ids[len(ids) - newest :]
    assert len(kept.ids) < context
    assert kept.begun == sum(token < begun for token in kept.ids)


# -- conversations: words for tokens -------------------------------------------------------------------


def encode(messages):
    return [f"{message['role']}:{word}" for message in messages for word in message["content"].split()] + ["reply:"]


TALK = [
    {"role": "system", "content": "s1 s2"},
    *({"role": role, "content": f"{role[0]}{n} " * 4} for n in range(5) for role in ("user", "assistant")),
    {"role": "user", "content": "last question"},
]


def test_the_oldest_turns_of_a_conversation_go_and_then_the_older_half_of_the_reply():
    context, shift = 60, of_messages(TALK, encode, 60, SINK)
    prompt = encode(TALK)
    reply = [f"r{n}" for n in range(context - len(prompt))]
    first = shift([*prompt, *reply], len(prompt), 1)
    assert first.ids == encode([TALK[0], *TALK[9:]]) + reply
    assert first.begun == len(first.ids) - len(reply)
    assert len(first.ids) <= context // 2
    more = reply + [f"r{n}" for n in range(len(reply), 50)]
    second = shift([*first.ids[: first.begun], *more], first.begun, 1)
    question = encode([TALK[0], TALK[-1]])
    assert second == Kept(question + more[-((context - len(question)) // 2) :], len(question))
    third = shift([*second.ids, *"x" * 30], second.begun, 1)
    assert third.ids == question + ([*second.ids[second.begun :], *"x" * 30])[-((context - len(question)) // 2) :]


def test_a_question_too_long_to_stay_leaves_the_system_turn():
    talk = [TALK[0], {"role": "user", "content": "w " * 50}]
    shift = of_messages(talk, encode, 60, SINK)
    prompt = encode(talk)
    kept = shift([*prompt, *"x" * 10], len(prompt), 1)
    assert kept.ids == prompt[:2] + [*prompt, *"x" * 10][-29:]


def test_a_system_turn_too_long_to_stay_leaves_the_sinks():
    talk = [{"role": "system", "content": "w " * 50}, {"role": "user", "content": "q"}]
    prompt = encode(talk)
    kept = of_messages(talk, encode, 60, SINK)([*prompt, *"x" * 10], len(prompt), 1)
    assert kept.ids == prompt[:SINK] + [*prompt, *"x" * 10][-28:]


def test_turns_that_are_gone_do_not_come_back():
    shift = TurnShift(lambda dropped: ["p"] * (10 - 2 * dropped), 4, 20, lambda: sliding(0, 20))
    dropped = []
    for _ in range(4):
        shift(["p"] * 10 + ["r"] * 6, 10, 1)
        dropped.append(shift.dropped)
    assert dropped == sorted(dropped)
    assert dropped[0] == 3
    assert dropped[-1] == 4
