"""Generation: why it ends, how it goes on, and what each response says."""

from __future__ import annotations

import numpy as np
import pytest

import kvq
from kvq.runtime.errors import ContextError, PromptError, SamplingError

CONTEXT = 256
PROMPT = "The ship left the harbour"
# 16 bits everywhere and a window over the whole text: continuing cannot change what was read.
EXACT = {"policy": "fp16", "recent": CONTEXT}
GREEDY = {"temperature": 0, "ignore_eos": True}


def run(session, prompt=PROMPT, **options):
    """All responses of a greedy generation that does not end at end-of-text."""
    return list(session.generate(prompt, **{**GREEDY, **options}))


def tokens(responses):
    return [response.token for response in responses]


def text(responses):
    return "".join(response.text for response in responses)


def reasons(responses):
    return [response.finish_reason for response in responses]


@pytest.fixture(scope="module")
def reference(tiny_model):
    """Thirty greedy responses after PROMPT."""
    return run(tiny_model.session(**EXACT), max_tokens=30)


def test_max_tokens_ends_with_length(reference):
    assert len(reference) == 30
    assert reasons(reference) == [None] * 29 + ["length"]
    assert [response.index for response in reference] == list(range(30))


def test_one_token_is_enough(tiny_model, reference):
    only = run(tiny_model.session(**EXACT), max_tokens=1)
    assert tokens(only) == tokens(reference)[:1]
    assert reasons(only) == ["length"]


def test_the_text_is_the_decoded_tokens(tiny_model, reference):
    assert text(reference) == tiny_model.tokenizer.decode(tokens(reference))


def test_a_stop_token_ends_with_stop_and_shows_no_text(tiny_model, reference):
    stop = tokens(reference)[7]
    first = tokens(reference).index(stop)
    stopped = run(tiny_model.session(**EXACT), max_tokens=30, stop_tokens=[499, stop])
    assert tokens(stopped) == tokens(reference)[: first + 1]
    assert reasons(stopped) == [None] * first + ["stop"]
    assert text(stopped) == tiny_model.tokenizer.decode(tokens(reference)[:first])


def test_end_of_text_ends_with_stop_unless_ignored(tiny_model, reference, monkeypatch):
    eos = tokens(reference)[5]
    first = tokens(reference).index(eos)
    # The manifest says 0, which these random weights do not choose.
    monkeypatch.setitem(vars(tiny_model.bundle.manifest), "eos_token_ids", [eos])
    ended = run(tiny_model.session(**EXACT), max_tokens=30, ignore_eos=False)
    ignored = run(tiny_model.session(**EXACT), max_tokens=30)
    assert tokens(ended) == tokens(reference)[: first + 1]
    assert reasons(ended)[-1] == "stop"
    assert tokens(ignored) == tokens(reference)


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("as_list", [True, False])
def test_a_stop_string_ends_the_text_before_it(tiny_model, reference, length, as_list):
    whole = text(reference)
    stop = whole[12 : 12 + length]
    stopped = run(tiny_model.session(**EXACT), max_tokens=30, stop=[stop] if as_list else stop)
    assert text(stopped) == whole[: whole.index(stop)]
    assert reasons(stopped)[-1] == "stop"
    assert tokens(stopped) == tokens(reference)[: len(stopped)]


def test_a_stop_string_that_never_comes_changes_nothing(tiny_model, reference):
    # Its beginning is the end of the text, so the end is held back and must come out at last.
    stop = text(reference)[-3:] + "\x00never"
    responses = run(tiny_model.session(**EXACT), max_tokens=30, stop=[stop, "\x01"])
    assert text(responses) == text(reference)
    assert tokens(responses) == tokens(reference)
    assert reasons(responses)[-1] == "length"


def test_held_text_comes_out_when_a_stop_token_ends_the_generation(tiny_model, reference):
    last = tokens(reference)[8]
    first = tokens(reference).index(last)
    before = tiny_model.tokenizer.decode(tokens(reference)[:first])
    responses = run(tiny_model.session(**EXACT), max_tokens=30, stop=[before[-2:] + "\x00"], stop_tokens=[last])
    assert text(responses) == before
    assert reasons(responses)[-1] == "stop"


@pytest.mark.parametrize("max_tokens", [None, 10_000])
def test_without_a_limit_generation_runs_to_the_end_of_the_context(tiny_model, max_tokens):
    session = tiny_model.session(**EXACT)
    responses = run(session, max_tokens=max_tokens)
    assert session.store.length == len(session.tokens) == CONTEXT
    # The last token was sampled from the logits after the last place and is not in the cache.
    assert len(responses) == CONTEXT - len(tiny_model.encode(PROMPT)) + 1
    assert reasons(responses)[-1] == "context"
    assert set(reasons(responses)[:-1]) == {None}
    assert session.pending == []
    assert session.room == 0


def test_a_full_context_can_be_trimmed_and_continued(tiny_model, reference):
    session = tiny_model.session(**EXACT)
    run(session, max_tokens=None)
    prompt = len(tiny_model.encode(PROMPT))
    session.trim(prompt + 10)
    assert tokens(run(session, None, max_tokens=20)) == tokens(reference)[10:]


def test_a_prompt_that_fills_the_context_gives_one_token(tiny_model):
    session = tiny_model.session(**EXACT)
    ids = [5] * CONTEXT
    responses = run(session, ids, max_tokens=5)
    assert reasons(responses) == ["context"]
    assert session.tokens == ids


@pytest.mark.parametrize("length", [CONTEXT + 1, 3000])
def test_a_prompt_longer_than_the_context_is_refused_and_nothing_is_appended(tiny_model, length):
    session = tiny_model.session(**EXACT)
    with pytest.raises(ContextError, match=f"{length} tokens do not fit"):
        run(session, [5] * length)
    assert session.tokens == []
    assert len(run(session, max_tokens=2)) == 2


@pytest.mark.parametrize("parts", [[1, 29], [10, 10, 10], [29, 1], [1, 1, 28]])
def test_continuing_without_a_prompt_equals_one_run(tiny_model, reference, parts):
    session = tiny_model.session(**EXACT)
    runs = [run(session, PROMPT if i == 0 else None, max_tokens=part) for i, part in enumerate(parts)]
    assert [token for part in runs for token in tokens(part)] == tokens(reference)
    assert [[response.index for response in part] for part in runs] == [list(range(part)) for part in parts]
    logprobs = [response.logprob for part in runs for response in part]
    assert logprobs == pytest.approx([response.logprob for response in reference], abs=0.01)


def test_continuing_after_a_stop_token_goes_on_behind_it(tiny_model, reference):
    stop = tokens(reference)[7]
    first = tokens(reference).index(stop)
    session = tiny_model.session(**EXACT)
    run(session, max_tokens=30, stop_tokens=[stop])
    rest = run(session, None, max_tokens=29 - first)
    assert tokens(rest) == tokens(reference)[first + 1 :]


@pytest.mark.parametrize("as_text", [True, False])
def test_a_second_prompt_equals_one_uninterrupted_text(tiny_model, reference, as_text):
    second = " and sailed away"
    ids = tiny_model.encode(second, beginning=False)
    session = tiny_model.session(**EXACT)
    run(session, max_tokens=12)
    continued = run(session, second if as_text else ids, max_tokens=10)
    whole = [*tiny_model.encode(PROMPT), *tokens(reference)[:12], *ids]
    expected = run(tiny_model.session(**EXACT), whole, max_tokens=10)
    assert tokens(continued) == tokens(expected)
    assert session.tokens == [*whole, *tokens(expected)[:-1]]
    assert session.pending == tokens(expected)[-1:]


def test_appending_by_hand_and_continuing_equals_a_prompt(tiny_model, reference):
    session = tiny_model.session(**EXACT)
    session.append(tiny_model.encode(PROMPT))
    assert tokens(run(session, None, max_tokens=30)) == tokens(reference)


@pytest.mark.parametrize("policy", ["fp16", "mixed", "int4"])
@pytest.mark.parametrize("recent", [0, 16])
def test_continuing_from_appended_tokens_works_under_every_policy(tiny_model, policy, recent):
    session = tiny_model.session(policy, recent=recent)
    session.append(tiny_model.encode(PROMPT))
    length = len(session.tokens)
    assert len(run(session, None, max_tokens=5)) == 5
    assert session.tokens[:length] == tiny_model.encode(PROMPT)
    assert len(session.tokens) == session.store.length == length + 4


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_a_generator_closed_early_leaves_the_session_usable(tiny_model, reference, taken):
    session = tiny_model.session(**EXACT)
    stream = session.generate(PROMPT, max_tokens=30, **GREEDY)
    got = [next(stream).token for _ in range(taken)]
    stream.close()
    rest = run(session, None if taken else PROMPT, max_tokens=30 - taken)
    assert got + tokens(rest) == tokens(reference)


def test_a_continuing_generator_that_is_never_started_forgets_nothing(tiny_model, reference):
    session = tiny_model.session(**EXACT)
    session.append(tiny_model.encode(PROMPT))
    length = len(session.tokens)
    session.generate(None, **GREEDY).close()
    assert len(session.tokens) + len(session.pending) == length
    assert tokens(run(session, None, max_tokens=30)) == tokens(reference)


def test_ids_and_text_are_the_same_prompt(tiny_model, reference):
    for prompt in (tiny_model.encode(PROMPT), tuple(tiny_model.encode(PROMPT)), np.array(tiny_model.encode(PROMPT))):
        assert run(tiny_model.session(**EXACT), prompt, max_tokens=30) == reference


def test_log_probabilities_are_those_of_the_model(tiny_model, reference):
    ids = [*tiny_model.encode(PROMPT), *tokens(reference)]
    logits = tiny_model.session(**EXACT).append(ids, all_logits=True).astype(np.float64)
    start = len(ids) - len(reference) - 1
    for row, response in zip(logits[start:], reference, strict=False):
        assert response.token == row.argmax()
        expected = row[response.token] - row.max() - np.log(np.exp(row - row.max()).sum())
        assert response.logprob == pytest.approx(expected, abs=0.01)
        assert response.logprob < 0


def test_the_same_seed_gives_the_same_responses(tiny_model):
    options = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1, "max_tokens": 20}
    runs = [run(tiny_model.session("mixed"), seed=seed, **options) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert tokens(runs[0]) != tokens(runs[2])


def test_a_repetition_penalty_sees_prompt_and_generated_tokens(tiny_model):
    session = tiny_model.session(**EXACT)
    generated = tokens(run(session, repetition_penalty=100.0, max_tokens=40))
    assert len({*tiny_model.encode(PROMPT), *generated}) == len(set(tiny_model.encode(PROMPT))) + 40


@pytest.mark.parametrize("prompt", ["", [], (), np.array([], np.int64)], ids=repr)
@pytest.mark.parametrize("begun", [True, False])
def test_an_empty_prompt_is_refused_when_generate_is_called(tiny_model, prompt, begun):
    session = tiny_model.session(**EXACT)
    if begun:
        session.append([1, 2, 3])
    with pytest.raises(PromptError, match="the prompt is empty"):
        session.generate(prompt)
    assert session.tokens == [1, 2, 3] * begun


def test_an_empty_session_has_nothing_to_continue(tiny_model):
    with pytest.raises(PromptError, match="nothing to continue: the session is empty"):
        tiny_model.session().generate()


@pytest.mark.parametrize("prompt", [[512], [-1], [1.5], [[1, 2]]], ids=repr)
def test_ids_outside_the_vocabulary_are_refused(tiny_model, prompt):
    session = tiny_model.session(**EXACT)
    with pytest.raises(PromptError):
        run(session, prompt)
    assert session.tokens == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"temperature": -1}, SamplingError),
        ({"top_p": 0}, SamplingError),
        ({"max_tokens": 0}, SamplingError),
        ({"top_q": 1}, TypeError),
    ],
)
def test_options_are_checked_when_generate_is_called_and_not_at_the_first_token(tiny_model, options, error):
    with pytest.raises(error):
        tiny_model.session().generate(PROMPT, **options)


def test_refused_options_do_not_touch_a_session_that_was_to_continue(tiny_model):
    session = tiny_model.session(**EXACT)
    session.append([1, 2, 3])
    for options in ({"temperature": -1}, {"max_tokens": 0}, {"stop_tokens": ["x"]}):
        with pytest.raises((SamplingError, ValueError)):
            session.generate(None, **options)
        assert (session.tokens, session.pending) == ([1, 2, 3], [])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda model: kvq.load(5), kvq.BundleError),
        (lambda model: kvq.load("x" * 5000), kvq.BundleError),
        (lambda model: model.session().generate(5), kvq.PromptError),
        (lambda model: model.session().generate("x", stop=5), kvq.SamplingError),
        (lambda model: model.session().generate("x", stop_tokens=[-5]), kvq.SamplingError),
        (lambda model: model.session().generate("x", stop_tokens=[10**9]), kvq.SamplingError),
        (lambda model: model.load_session(5), kvq.SessionError),
        (lambda model: model.session().save(5), kvq.SessionError),
    ],
)
def test_what_a_caller_gets_wrong_is_a_named_error(call, error, tiny_model):
    with pytest.raises(error) as caught:
        call(tiny_model)
    assert "\n" not in str(caught.value)
