"""The first tokens are protected by default: everywhere, in every count of bytes, and at the odd lengths."""

from __future__ import annotations

import inspect

import click
import numpy as np
import pytest

import kvq
from kvq.controller.evaluation import kld, pareto
from kvq.controller.evaluation.scoring import Scorer
from kvq.controller.policies import make_policy
from kvq.runtime.cli.docs import entered
from kvq.runtime.cli.main import group
from kvq.runtime.inspect.inspection import inspect_text
from kvq.runtime.kv.records import stored_tokens
from kvq.runtime.server.capacity import Capacity
from kvq.runtime.server.protocol import Settings
from kvq.runtime.session.model import Model
from kvq.runtime.session.session import Session
from tests.tools.packages import needs
from tests.tools.session_files import contents

IDS = np.random.default_rng(0).integers(0, 512, 256).tolist()


def rows(session) -> dict[str, int]:
    return {name: row["tokens"] for name, row in session.store.account().items() if row["tokens"]}


def leaves(command: click.Command, context: click.Context):
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from leaves(command.get_command(context, name), context)
    else:
        yield command


def test_one_default_stands_everywhere(tiny_model):
    needs("torch")  # some commands train
    for function in (Session, Model.session, Scorer, kld.measure, pareto.measure, Settings):
        assert inspect.signature(function).parameters["sink"].default == 4, function
    found = [p for command in leaves(group, entered(group, "kvq")) for p in command.params if p.name == "sink"]
    assert len(found) >= 8  # run, chat, prefill, inspect, serve and four of eval
    assert {p.default for p in found} == {4}
    assert tiny_model.session().stats().sink == 4
    assert inspect_text(tiny_model, IDS[:40], "int2").stats.sink == 4


@pytest.mark.parametrize("prefill", ["stepwise", "chunked"])
@pytest.mark.parametrize(("recent", "sink"), [(16, 4), (4, 6), (0, 3), (5, 0), (3, 300)], ids=str)
def test_texts_of_any_length_keep_their_first_tokens(tiny_model, recent, sink, prefill):
    for length in (1, 2, 3, 4, 5, 7, 15, 17, 19, 20, 21, 40):
        session = tiny_model.session("int2", recent=recent, sink=sink, prefill=prefill)
        session.append(IDS[:length])
        session.store.settle()
        stored = max(0, length - recent)
        expected = {"k8v8": min(sink, stored), "k2v2": max(0, stored - sink), "recent": min(length, recent)}
        assert rows(session) == {name: count for name, count in expected.items() if count}
        chosen = stored_tokens(session.store).chosen
        assert (chosen[:sink] == 8).all()  # those in the window, too, will be
        assert (chosen[sink:] == 2).all()


def test_a_context_shorter_than_what_is_protected(tiny_model):
    session = tiny_model.session("rule", recent=200, sink=200, kv_bits=18)
    session.append(IDS)
    assert rows(session) == {"k16v16": 56, "recent": 200}


@pytest.mark.parametrize("policy", ["int4", "mixed", "rule"])
def test_a_stepwise_prefill_is_token_by_token_with_sinks_too(tiny_model, policy):
    alone, together = (tiny_model.session(policy, recent=6, prefill="stepwise") for _ in range(2))
    for token in IDS[:40]:
        alone.append([token])
    together.append(IDS[:40])
    assert contents(alone)["pages"] == contents(together)["pages"]


@pytest.mark.parametrize("length", [0, 1, 2, 4, 5, 8, 12, 30])
@pytest.mark.parametrize("policy", ["int4", "rule"])
def test_a_trim_below_the_sink_is_protected_again(tiny_model, policy, length):
    session, straight = (tiny_model.session(policy, recent=4, prefill="stepwise") for _ in range(2))
    session.append(IDS[:40])
    session.trim(length)
    session.append(IDS[length:60])
    straight.append(IDS[:60])
    assert rows(session)["k8v8"] >= 4
    assert (stored_tokens(session.store).chosen[:4] == 8).all()
    if policy == "int4":
        assert rows(session) == rows(straight)


@pytest.mark.parametrize("length", [2, 6, 30])
def test_a_fork_goes_on_with_the_same_sink(tiny_model, length):
    session = tiny_model.session("int4", recent=4)
    session.append(IDS[:length])
    twin = session.fork()
    for one in (session, twin):
        one.append(IDS[length:60])
    assert contents(twin) == contents(session)
    assert rows(twin) == {"k8v8": 4, "k4v4": 52, "recent": 4}


def test_a_saved_session_keeps_its_own_sink(tiny_model, tmp_path):
    for sink in (0, 2, 4):
        session = tiny_model.session("int4", recent=4, sink=sink)
        session.append(IDS[:3])  # all of them in the window
        session.save(tmp_path / f"{sink}.kvq")
        loaded = tiny_model.load_session(tmp_path / f"{sink}.kvq", "int2")
        loaded.append(IDS[3:20])
        assert loaded.stats().sink == sink
        assert rows(loaded).get("k8v8", 0) == sink


@pytest.mark.parametrize("sink", [0, 1, 4, 16])
@pytest.mark.parametrize(
    "limit", [{"kv_bits": 8.5}, {"kv_bits": 11.0}, {"kv_memory": 1.6e5}, {"kv_memory": 3e5}], ids=str
)
def test_a_budget_counts_the_sink(tiny_model, sink, limit):
    one, prompt = (tiny_model.session(recent=4, sink=sink, **limit) for _ in range(2))
    for n, token in enumerate(IDS[:120], 1):
        one.append([token])
        one.store.settle()
        assert one.budget.used(one.store) <= one.budget.allowed(n)
    prompt.append(IDS[:120])
    prompt.store.settle()
    assert prompt.budget.used(prompt.store) <= prompt.budget.allowed(120)
    if "kv_bits" in limit:
        for session in (one, prompt):
            assert session.stats().kv_used_bits >= 0.9 * limit["kv_bits"]


@pytest.mark.parametrize("sink", [0, 1, 4, 20])
@pytest.mark.parametrize("policy", ["fp16", "int4", "mixed", "rule", "k8v2"])
def test_the_server_s_bound_holds_and_does_not_take_all_for_sinks(tiny_model, policy, sink):
    session = tiny_model.session(policy, recent=4, sink=sink)
    capacity = Capacity(session)
    for n, token in enumerate(IDS[:150], 1):
        growth = capacity.growth(session.store, 1)
        before = session.store.nbytes
        session.append([token])
        assert session.store.nbytes <= capacity.most_nbytes(n)
        assert session.store.nbytes - before <= growth
    if policy in ("int4", "k8v2"):
        plain = Capacity(tiny_model.session(policy, recent=4, sink=0))
        a_page_of_16 = Capacity(tiny_model.session("fp16", recent=0, sink=0)).most_nbytes(max(16, sink))
        assert capacity.most_nbytes(150) <= plain.most_nbytes(150) + a_page_of_16


@pytest.mark.slow
@pytest.mark.parametrize("sink", [0, 4])
def test_all_arms_of_an_evaluation_have_the_same_sink_and_bytes(tiny_model, sink):
    scorer = Scorer(tiny_model, recent=4, sink=sink)
    for policy in ("int4", "random", "rule"):
        found = scorer.score(np.array(IDS[:80]), make_policy(policy), None if policy == "int4" else 10.0)
        assert (found.bits[:sink] == 8).all()
    text = [np.array(IDS[:80])]
    for row in pareto.measure(tiny_model, text, [10.0], recent=4, sink=sink, arms=("static", "random", "rule")):
        assert row["sink"] == sink
        assert 9.5 <= row["bits_measured"] <= 10.0


def test_the_embedded_model_s_budgets_leave_room_for_it():
    with pytest.raises(kvq.BudgetError, match="16 recent and 4 sink tokens at 8 bits"):
        kvq.load().session(kv_bits=2.2)
