"""Inspection: records are what the store holds, and nothing is changed by looking."""

from __future__ import annotations

import json

import numpy as np
import pytest

import kvq
from kvq.controller.policies.static import StaticPolicy
from kvq.runtime.errors import ContextError, PolicyError, PromptError
from kvq.runtime.inspect.inspection import inspect_session, inspect_text
from kvq.runtime.kv.records import stored_tokens
from kvq.runtime.precision.table import EXACT, Pair, named
from tests.tools.inspected import TEXT


def expected_pair(policy: str, position: int) -> Pair:
    """By the policy's description, written down here once more."""
    if policy == "mixed":
        return named(("16", "8", "4", "2")[position % 4])
    return {"fp16": EXACT, "int4": named("4"), "k8v2": named("8", "2")}[policy]


@pytest.mark.parametrize("policy", ["fp16", "int4", "k8v2", "mixed"])
@pytest.mark.parametrize(("recent", "sink"), [(0, 0), (4, 0), (4, 9), (300, 0)])
def test_records_are_what_the_store_was_given(tiny_model, policy, recent, sink):
    found = inspect_text(tiny_model, TEXT, policy, recent=recent, sink=sink)
    ids = tiny_model.encode(TEXT)
    assert [token.id for token in found.tokens] == ids
    for i, token in enumerate(found.tokens):
        protected = EXACT if policy in ("fp16", "k8v2") else named("8")
        chosen = protected if i < sink else expected_pair(policy, i)
        assert (token.position, token.chosen) == (i, chosen)
        assert token.in_window == (i >= len(ids) - recent)
        assert token.bits == (protected if token.in_window else chosen)


@pytest.mark.parametrize("options", [{}, {"recent": 0}, {"sink": 7}, {"recent": 300}], ids=str)
@pytest.mark.parametrize("policy", ["fp16", "int2", "mixed", "random", "rule"])
def test_totals_add_up_to_the_arrays_of_the_store(tiny_model, policy, options):
    found = inspect_text(tiny_model, TEXT, policy, **options)
    session = tiny_model.session(policy, **options)
    session.append(tiny_model.encode(TEXT))
    stats = session.stats()
    assert found.stats.precisions == stats.precisions
    used = sum(token.nbytes for token in found.tokens)
    assert used == session.store.used_nbytes == sum(total.nbytes for total in found.totals)
    assert used + sum(total.slack_nbytes for total in found.totals) == stats.kv_nbytes
    for total in found.totals:
        mine = [t for t in found.tokens if (t.in_window if total.bits is None else not t.in_window)]
        mine = [t for t in mine if total.bits in (None, t.bits)]
        assert (total.tokens, total.nbytes) == (len(mine), sum(t.nbytes for t in mine))
        if total.bits:
            assert total.due == sum(t.in_window and t.chosen == total.bits for t in found.tokens)
        if mine:
            assert total.bits_per_value == pytest.approx(8 * total.nbytes / (len(mine) * 2 * 3 * 4 * 8))
    assert sum(total.tokens for total in found.totals) == stats.tokens


def stored_bytes(session) -> list[bytes]:
    """Every array of the store."""
    window = session.store.window
    arrays = [window.chosen, window.keys.codes, window.keys.scales, window.values.codes, window.values.scales]
    for _, bucket in sorted(session.store.buckets.items()):
        for one in bucket.pages:
            arrays.append(one.positions)
            for part in (*one.keys.slots, *one.values.slots):
                arrays += [part.codes, part.scales]
    return [array.tobytes() for array in arrays]


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("fp16", {}), ("mixed", {"prefill_chunk": 16}), ("rule", {}), ("adaptive", {}), ("paper", {"sink": 4}),
        ("adaptive", {"kv_bits": 3.25}), ("rule", {"kv_memory": 2_500_000}), ("random", {"kv_bits": 5}),
    ],
    ids=str,
)  # fmt: skip
def test_looking_at_features_changes_no_stored_byte(embedded, policy, options):
    ids = embedded.encode(TEXT * 2)
    plain = embedded.session(policy, **options)
    plain.append(ids)
    looked_at = embedded.session(policy, **options)
    before = looked_at.policy
    features = kvq.runtime.inspect.inspection._run(looked_at, ids)
    assert looked_at.policy is before
    assert len(features) == len(ids)
    assert stored_bytes(looked_at) == stored_bytes(plain)


def test_a_policy_sees_the_features_it_asked_for_and_no_others(tiny_model):
    seen = []

    class Nosy(StaticPolicy):
        needs = frozenset({"rarity"})

        def choose(self, features):
            seen.append(features)
            return super().choose(features)

    inspect_text(tiny_model, "Hello", Nosy("nosy", 4, 4))
    assert all(chunk.rarity is not None and chunk.entropy is None for chunk in seen)


def test_features_are_those_of_their_formulas(tiny_model):
    ids = tiny_model.encode(TEXT)
    found = inspect_text(tiny_model, TEXT, "fp16", prefill_chunk=16)
    logits = tiny_model.session("fp16", prefill_chunk=16).append(ids, all_logits=True).astype(np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    rows = [token.features for token in found.tokens]
    np.testing.assert_allclose([row.entropy for row in rows], -(p * np.log(p)).sum(1), rtol=1e-3)
    np.testing.assert_allclose([row.confidence for row in rows], p.max(1), rtol=1e-3)
    rarity = [-np.log((ids[:i].count(x) + 1) / (i + len(set(ids[:i])) + 1)) for i, x in enumerate(ids)]
    np.testing.assert_allclose([row.rarity for row in rows], rarity, rtol=1e-5, atol=1e-6)
    assert rows[0].attention_variance == pytest.approx(0, abs=1e-6)  # a row of one weight
    assert all(0 < row.attention_variance < 0.25 for row in rows[1:])


@pytest.mark.parametrize(
    ("policy", "options"), [("rule", {}), ("mixed", {"recent": 0, "sink": 3}), (None, {"kv_bits": 3.5})]
)
def test_a_session_is_inspected_as_its_text_is(embedded, policy, options):
    session = embedded.session(policy, **options)
    session.append(embedded.encode(TEXT))
    before, tokens = stored_bytes(session), list(session.tokens)
    found = inspect_session(session)
    expected = inspect_text(embedded, TEXT, policy, **options)
    assert found.tokens == expected.tokens
    assert found.totals == expected.totals
    assert (stored_bytes(session), session.tokens) == (before, tokens)
    assert inspect_session(session, features=False).tokens[0].features is None


def test_a_session_that_generated_and_was_trimmed_can_be_inspected(tiny_model):
    session = tiny_model.session("mixed", recent=4, sink=0)
    list(session.generate("Hello there", max_tokens=20, temperature=0, ignore_eos=True))
    session.trim(15)
    found = inspect_session(session)
    assert [token.id for token in found.tokens] == session.tokens
    assert [token.chosen for token in found.tokens] == [expected_pair("mixed", i) for i in range(15)]
    assert all(np.isfinite(token.features).all() for token in found.tokens)


def test_what_cannot_be_inspected_is_refused_by_name(tiny_model):
    for empty in ("", []):
        with pytest.raises(PromptError, match="the text is empty"):
            inspect_text(tiny_model, empty)
    with pytest.raises(PromptError, match="the session is empty"):
        inspect_session(tiny_model.session())
    with pytest.raises(ContextError, match="do not fit into the context of 256"):
        inspect_text(tiny_model, [1] * 257)
    with pytest.raises(PromptError, match="token ids must be integers"):
        inspect_text(tiny_model, [512])
    with pytest.raises(PolicyError, match="unknown policy"):
        inspect_text(tiny_model, "Hello", "int5")


def test_an_inspection_is_plain_values_for_json(tiny_model):
    again = json.loads(json.dumps(inspect_text(tiny_model, TEXT, "mixed", recent=4, sink=0).as_dict()))
    assert again["tokens"][0].keys() >= {"position", "id", "text", "key_bits", "value_bits", "nbytes", "entropy"}
    assert [row["chosen_key_bits"] for row in again["tokens"][:4]] == [16, 8, 4, 2]
    assert {row["precision"] for row in again["totals"]} == {"k16v16", "k8v8", "k4v4", "k2v2", "recent"}
    assert again["stats"]["kv_nbytes"] == sum(row["nbytes"] + row["slack_nbytes"] for row in again["totals"])


def test_stored_tokens_of_an_empty_store_are_none(tiny_model):
    assert all(len(part) == 0 for part in stored_tokens(tiny_model.session().store))
