"""What a session is made with: policies, options, backends, threads."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import kvq
from kvq.controller.policies import POLICIES, Policy, make_policy
from kvq.controller.policies.static import EQUAL
from kvq.runtime.cli.options import SESSION_SETTINGS
from kvq.runtime.cli.run import run as kvq_run
from kvq.runtime.compute.backends import BACKENDS
from kvq.runtime.errors import BackendError, PolicyError
from kvq.runtime.policy.base import DEFAULT_POLICY
from kvq.runtime.precision.table import named
from kvq.runtime.session.model import Model, SessionSettings
from kvq.runtime.session.session import Session
from tests.tools.sessions import IDS, greedy, rows
from tests.tools.tree import ROOT


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"adaptive", "paper"}))  # these need training
def test_every_policy_runs_and_two_runs_are_identical(tiny_model, policy):
    runs = []
    for _ in range(2):
        session = tiny_model.session(policy, recent=4)
        logits = session.append(IDS[:50], all_logits=True)
        runs.append((logits, greedy(session, IDS[50:51], 8), rows(session)))
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]


def test_the_default_policy_is_int8(tiny_model):
    assert DEFAULT_POLICY == "int8"
    for session in (tiny_model.session(recent=4), Session(tiny_model, recent=4)):
        session.append(IDS[:30])
        assert session.stats().policy == "int8"
        assert rows(session) == {"k16v16": 4, "k8v8": 22, "recent": 4}


def test_pages_and_help_name_the_default_policy():
    assert f"# a cache of {EQUAL[DEFAULT_POLICY]} bits\n" in (ROOT / "README.md").read_text("utf-8")
    for page in ("guide", "embedding", "server"):
        assert f"`{DEFAULT_POLICY}` is the default" in (ROOT / f"docs/{page}.md").read_text("utf-8"), page
    policy = next(each for each in kvq_run.params if each.name == "policy")
    assert f"; {DEFAULT_POLICY} if not given" in policy.help


def test_a_policy_object_is_used_as_it_is(tiny_model):
    class Thirds(Policy):
        name = "thirds"

        def choose(self, features):
            return np.where(features.positions[:, None] % 3 == 0, [named("8", "4")], [named("4", "2")]).astype(np.uint8)

    session = tiny_model.session(Thirds(), recent=0, sink=0)
    session.append(IDS[:30])
    assert rows(session) == {"k8v4": 10, "k4v2": 20}
    assert session.stats().policy == "thirds"


def test_unknown_policies_and_options_are_refused(tiny_model):
    with pytest.raises(PolicyError, match="unknown policy 'int5'"):
        tiny_model.session("int5")
    with pytest.raises(PolicyError, match="with a ready policy object"):
        make_policy(make_policy("random"), seed=1)
    with pytest.raises(PolicyError, match="does not take the options"):
        make_policy("mixed", seed=1)
    assert make_policy("random", seed=1).seed == 1


@pytest.mark.parametrize(("name", "value"), [("recent", -1), ("sink", -1), ("prefill_chunk", 0)])
def test_session_options_out_of_range_are_refused(tiny_model, name, value):
    with pytest.raises(PolicyError, match=f"{name} must be an integer of at least {value + 1}, got {value}"):
        tiny_model.session(**{name: value})


def test_an_unknown_backend_is_named_with_the_known_ones(tiny_model, monkeypatch):
    with pytest.raises(BackendError, match=r"no attention backend 'nonsense' here; use auto or one of: .*numpy"):
        tiny_model.session(backend="nonsense")
    monkeypatch.setenv("KVQ_BACKEND", "nonsense")
    with pytest.raises(BackendError, match="nonsense"):
        tiny_model.session()
    assert tiny_model.session(backend="numpy").stats().backend == "numpy"  # an argument goes before the variable


NO_NAMES = [[], ["int8"], {}, {"a": 1}, {"int8"}, 8, 1.5, b"int8", True, np.array(["int8"]), np.array([1, 2])]


@pytest.mark.parametrize("value", NO_NAMES, ids=repr)
def test_what_is_no_text_names_neither_policy_nor_backend_nor_prefill(tiny_model, value):
    """JSON gives lists and objects, which no dictionary can be asked for; an array is equal to nothing as a whole."""
    for name, error in (("policy", PolicyError), ("backend", BackendError), ("prefill", PolicyError)):
        with pytest.raises(error) as caught:
            tiny_model.session(**{name: value})
        assert str(caught.value).isprintable()


def test_the_environment_chooses_the_backend(tiny_model, monkeypatch):
    monkeypatch.setenv("KVQ_BACKEND", "numpy")
    assert tiny_model.session().stats().backend == "numpy"


def test_auto_takes_the_backend_of_the_highest_priority(tiny_model, monkeypatch):
    monkeypatch.delenv("KVQ_BACKEND", raising=False)
    best = max(backend.priority for backend in BACKENDS.values())
    for name in (None, "auto"):
        assert BACKENDS[tiny_model.session(backend=name).stats().backend].priority == best


def test_another_number_of_threads_in_one_process_is_refused(tiny_bundle, tiny_model):
    running = tiny_model.engine.threads
    assert kvq.load(tiny_bundle, threads=running).engine.threads == running
    with pytest.raises(BackendError, match=f"on {running} threads, cannot change to {running + 1}"):
        kvq.load(tiny_bundle, threads=running + 1)
    with pytest.raises(BackendError, match="threads must be at least 1 and at most 256, got 0"):
        kvq.load(tiny_bundle, threads=0)


def test_every_way_to_a_session_takes_the_same_settings():
    of_model, of_session = (
        inspect.signature(function).parameters.keys() - {"self", "model"} for function in (Model.session, Session)
    )
    assert of_model == of_session == SessionSettings.__annotations__.keys() >= set(SESSION_SETTINGS)
