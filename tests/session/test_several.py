"""Many prompts, asynchronous generation, criteria that end a text, alternatives of each token."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import kvq
from kvq.runtime.session.several import PARALLEL, texts_at_a_time

BEGINNING = "The captain stood at the rail and counted the houses on the hill, as he did every time. " * 8
PROMPTS = [BEGINNING + end for end in ("The sea", "Nobody", "She")]
MESSAGES = [{"role": "user", "content": "Where is the captain?"}]


@pytest.mark.parametrize("policy", ["int8", "adaptive"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_of_many_prompts_gets_what_it_would_get_alone(embedded, policy, temperature):
    options = {"policy": policy, "max_tokens": 8, "temperature": temperature}
    found = list(embedded.generate_all(PROMPTS, seed=5, **options))
    for index, (completion, prompt) in enumerate(zip(found, PROMPTS, strict=True)):
        alone = list(embedded.generate(prompt, seed=5 + index, **options))
        assert (completion.index, completion.finish_reason) == (index, "length")
        assert completion.responses == alone
        assert completion.text == "".join(response.text for response in alone)


def test_what_all_prompts_begin_with_is_processed_once(embedded, monkeypatch):
    appended, take = [], kvq.Session.take
    counting = lambda self, seen, *rest: appended.append(len(seen.ids)) or take(self, seen, *rest)  # noqa: E731
    monkeypatch.setattr(kvq.Session, "take", counting)
    list(embedded.generate_all(PROMPTS, max_tokens=1))
    whole = sum(len(embedded.encode(prompt)) for prompt in PROMPTS)
    shared = appended[0]
    assert shared % 128 == 0 < shared
    assert sum(appended) == whole - 2 * shared


def test_more_prompts_than_share_a_pass_come_in_order_and_share_passes(embedded, monkeypatch):
    """Of different lengths, some with a stop text: each is what it is alone, the passes are few."""
    prompts = [f"{word} {BEGINNING[: 17 * number]}" for number, word in enumerate(["The sea", "Nobody", "She"] * 7)]
    options = {"max_tokens": 12, "temperature": 1.0, "stop": ["the", "."], "seed": 9}
    passes, run_pass = [], kvq.Model.run_pass
    counting = lambda self, appendings: passes.append(len(appendings)) or run_pass(self, appendings)  # noqa: E731
    monkeypatch.setattr(kvq.Model, "run_pass", counting)
    found = list(embedded.generate(prompts, **options))
    assert [completion.index for completion in found] == [*range(len(prompts))]
    for index, (completion, prompt) in enumerate(zip(found, prompts, strict=True)):
        assert completion.responses == list(embedded.generate(prompt, **{**options, "seed": 9 + index}))
    assert len({len(completion.responses) for completion in found}) > 3
    if texts_at_a_time(embedded.session()) > 1:
        assert max(passes) == PARALLEL
        assert sum(passes) > 4 * len(passes)
    assert asyncio.run(_collected(embedded.agenerate(prompts, **options))) == found


async def _collected(responses):
    return [response async for response in responses]


def test_one_that_fails_is_told_in_its_place(embedded):
    too_long = [5] * (embedded.architecture.context + 1)
    answers = embedded.generate_all(["The sea", too_long, "She"], max_tokens=3, temperature=0)
    assert next(answers).index == 0
    with pytest.raises(kvq.ContextError):
        next(answers)


@pytest.mark.parametrize("wrong", ["", [99999], 5, [], [{"role": "nobody"}]], ids=str)
def test_an_error_says_which_of_many_prompts_it_is_of(embedded, wrong):
    with pytest.raises(kvq.KvqError, match=r"^prompt 1: "):
        list(embedded.generate_all(["One", wrong, "Two"], max_tokens=2))


def test_texts_ids_and_messages_can_be_mixed(embedded):
    ids = embedded.encode("The sea")
    found = [each.text for each in embedded.generate_all(["The sea", ids, MESSAGES], max_tokens=6, temperature=0)]
    assert found[0] == found[1]
    assert found[2] == "".join(r.text for r in embedded.generate(MESSAGES, max_tokens=6, temperature=0))
    assert list(embedded.generate_all([])) == []
    with pytest.raises(kvq.PromptError, match="a list of prompts"):
        embedded.generate_all("The sea")
    with pytest.raises(kvq.OptionError):
        embedded.generate_all(["The sea"], max_token=5)


def test_a_compiled_constraint_is_of_one_text(embedded):
    with pytest.raises(kvq.GrammarError, match="of one text"):
        list(embedded.generate_all(["a", "b"], constraint=object()))


def test_asynchronous_generation_says_the_same_and_lets_others_run(embedded):
    async def both():
        turns = 0

        async def count():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counter = asyncio.create_task(count())
        found = [response async for response in embedded.agenerate("The sea", max_tokens=12, temperature=0)]
        counter.cancel()
        return found, turns

    found, turns = asyncio.run(both())
    assert found == list(embedded.generate("The sea", max_tokens=12, temperature=0))
    assert turns > 12
    with pytest.raises(kvq.OptionError):
        embedded.agenerate("The sea", max_token=5)


def test_a_cancelled_task_leaves_a_session_that_goes_on(embedded):
    session = embedded.session()

    async def some():
        async for response in kvq.aiterate(session.generate("The sea", max_tokens=500, temperature=0)):
            if response.index == 3:
                break

    async def cancelled():
        task = asyncio.create_task(some())
        await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(some())
    held = len(session.tokens) + len(session.pending)
    assert held == len(embedded.encode("The sea")) + 4
    asyncio.run(cancelled())
    assert list(session.generate(" and", max_tokens=2, temperature=0))[-1].finish_reason == "length"


def test_a_criterion_ends_the_text_with_its_token(embedded):
    options = {"max_tokens": 30, "temperature": 0}
    whole = list(embedded.generate("The sea", **options))
    seen = []

    def ended(ids):
        seen.append(list(ids))
        return len(ids) == len(embedded.encode("The sea")) + 5

    found = list(embedded.generate("The sea", stopping_criteria=ended, **options))
    assert [each.token for each in found] == [each.token for each in whole[:5]]
    assert found[-1].finish_reason == "stop"
    assert "".join(each.text for each in found) == "".join(each.text for each in whole[:5])
    assert [ids[-1] for ids in seen] == [each.token for each in found]
    several = list(embedded.generate("The sea", stopping_criteria=[lambda ids: False, ended], **options))
    assert several == found
    with pytest.raises(kvq.SamplingError, match="must be functions"):
        embedded.generate("The sea", stopping_criteria=[5])


def test_alternatives_are_the_most_likely_by_the_model(embedded):
    session = embedded.session()
    for response in session.generate("The sea", max_tokens=5, seed=1, top_logprobs=4):
        logits = session.last_logits.astype(np.float64)
        expected = logits - logits.max()
        expected -= np.log(np.exp(expected).sum())
        best = np.argsort(-expected, kind="stable")[:4]
        assert [token for token, _ in response.top_logprobs] == best.tolist()
        np.testing.assert_allclose([each.logprob for each in response.top_logprobs], expected[best], atol=1e-4)
        assert response.logprob == pytest.approx(expected[response.token], abs=1e-4)
    for wrong in (-1, 1.5, True, 10**9):
        with pytest.raises(kvq.SamplingError, match="top_logprobs"):
            session.generate("x", top_logprobs=wrong)
