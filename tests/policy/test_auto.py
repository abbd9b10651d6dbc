"""A budget on a model without a controller: rules keep it, and whoever asked is told once."""

from __future__ import annotations

import json
import shutil

import pytest

import kvq
from kvq.runtime.errors import PolicyError, SessionError
from kvq.runtime.server.responses import extension
from kvq.runtime.session.header import open_session_file
from tests.tools.command_line import kvq as command
from tests.tools.command_line import run
from tests.tools.serving import served

IDS = [5, 9, 100, 7, 8, 200, 3] * 10
BUDGET = {"kv_bits": 9, "recent": 4}
SAID = "this model has no trained controller, so precisions are chosen by rule; kvq train-controller"


def notes(stderr: str) -> int:
    return stderr.count("no trained controller, so precisions are chosen by rule")


@pytest.mark.parametrize("limit", [{"kv_bits": 9}, {"kv_memory": 3e5}], ids=str)
def test_a_budget_alone_takes_rules_and_says_why(tiny_model, limit):
    session = tiny_model.session(**limit)
    session.append(IDS)
    stats = session.stats()
    assert (stats.policy, stats.policy_reason) == ("rule", "no trained controller")
    assert session.note.startswith(SAID)
    assert f" {tiny_model.path} --text FILE " in session.note
    assert "policy rule (no trained controller): " in stats.line()
    assert extension(stats, "stop")["policy_reason"] == "no trained controller"
    assert stats.as_dict()["policy_reason"] == "no trained controller"
    assert session.budget.used(session.store) <= session.budget.allowed(len(IDS))


@pytest.mark.parametrize("options", [{}, {"policy": "int4"}, {"policy": "rule", **BUDGET}], ids=str)
def test_who_names_a_policy_or_no_budget_is_told_nothing(tiny_model, options):
    session = tiny_model.session(**options)
    assert (session.note, session.stats().policy_reason) == ("", "")
    assert extension(session.stats(), None)["policy_reason"] is None


def test_a_model_with_a_controller_follows_it(tmp_path):
    session = kvq.load().session(kv_bits=3.5)
    session.append(IDS)
    assert (session.stats().policy, session.note) == ("adaptive", "")
    session.save(tmp_path / "session.kvq")
    with open_session_file(tmp_path / "session.kvq") as (_, header):
        assert header.policy == "adaptive"


def test_the_learned_policies_by_name_are_refused_with_the_remedy(tiny_model):
    for name in ("adaptive", "paper"):
        with pytest.raises(
            PolicyError, match=rf"no '{name}' controller; train one with kvq train-controller /\S+ --text"
        ):
            tiny_model.session(name, **BUDGET)


def test_the_command_can_be_copied_whatever_the_path(tiny_bundle, tmp_path):
    path = shutil.copytree(tiny_bundle, tmp_path / "it's a model")
    assert "train-controller '/" in kvq.load(path).session(kv_bits=9).note


def test_forks_and_saved_sessions_know_it_too(tiny_model, tmp_path):
    session = tiny_model.session(**BUDGET)
    session.append(IDS)
    session.save(tmp_path / "session.kvq")
    for other in (session.fork(), tiny_model.load_session(tmp_path / "session.kvq")):
        assert (other.note, other.stats().policy, other.kv_bits) == (session.note, "rule", 9)
        assert list(other.append(IDS[:9])) == list(session.fork().append(IDS[:9]))


def test_a_budget_for_a_session_saved_without_one(tiny_model, tmp_path):
    # fp16 is what files of up to 0.2 have where nobody named a policy.
    for policy, file in ((None, "default.kvq"), ("fp16", "fp16.kvq"), ("k8v4", "k8v4.kvq")):
        session = tiny_model.session(policy, recent=4)
        session.append(IDS)
        session.save(tmp_path / file)
    for file in ("default.kvq", "fp16.kvq"):
        loaded = tiny_model.load_session(tmp_path / file, kv_bits=12)
        for token in IDS:
            loaded.append([token])
        budget = loaded.chooser.budget
        assert budget.used(loaded.store) <= budget.allowed(loaded.store.length)
        assert loaded.note.startswith(SAID)
    with pytest.raises(SessionError, match="cannot follow a budget"):
        tiny_model.load_session(tmp_path / "k8v4.kvq", kv_bits=12)


def test_a_file_keeps_its_own_policy(tiny_model, tmp_path):
    for policy in ("fp16", "int4"):
        session = tiny_model.session(policy)
        session.append(IDS)
        session.save(tmp_path / "session.kvq")
        assert tiny_model.load_session(tmp_path / "session.kvq").stats().policy == policy


def test_it_is_told_once_a_model(tiny_bundle):
    told: list[str] = []
    model = kvq.load(tiny_bundle, notice=told.append)
    model.session("int4")
    assert not told
    first, second = model.session(**BUDGET), model.session(**BUDGET)
    second.fork()
    assert told == [first.note]


@pytest.mark.slow
def test_commands_tell_it_once_on_stderr(tiny_bundle, tmp_path):
    budget = ["--kv-bits", "9", "--recent", "4"]
    done = run(tiny_bundle, *budget, "-n", "3", "--json", "Hello there")
    assert notes(done.stderr) == 1
    assert done.stderr.startswith(f"kvq: {SAID} {tiny_bundle} --text FILE trains one\n")
    assert json.loads(done.stdout)["stats"]["policy_reason"] == "no trained controller"
    done = run(tiny_bundle, "--kv-memory", "300kB", "-n", "3", "Hello there")
    assert notes(done.stderr) == 1
    assert "policy rule (no trained controller)" in done.stderr
    done = run(tiny_bundle, *budget, "-q", "-n", "3", "Hello there")
    assert (done.returncode, notes(done.stderr)) == (0, 0)

    text = tmp_path / "text.txt"
    text.write_text("Once upon a time")
    done = command("prefill", str(text), "-o", str(tmp_path / "text.kvq"), "-m", str(tiny_bundle), *budget)
    assert (done.returncode, notes(done.stderr)) == (0, 1)
    done = command("inspect", "-m", str(tiny_bundle), "Hello there")
    assert (done.returncode, notes(done.stderr)) == (0, 1)
    assert "policy rule (no trained controller)" in done.stderr
    done = command("chat", "-m", str(tiny_bundle), *budget, "-n", "3", input="Hi\n/reset\nHi\n")
    assert (done.returncode, notes(done.stderr)) == (0, 1)
    done = command("chat", "-m", str(tiny_bundle), *budget, "-n", "3", "-q", input="Hi\n")
    assert (done.returncode, notes(done.stderr)) == (0, 0)


@pytest.mark.slow
def test_the_server_logs_it_once_and_answers_with_the_reason(tiny_bundle):
    with served("-m", tiny_bundle, "--kv-bits", "9") as server:
        done = [server.client().completions.create(model="tiny", prompt=text, max_tokens=2) for text in ("A b", "C d")]
        assert {d.kvq["policy"] for d in done} == {"rule"}
        assert {d.kvq["policy_reason"] for d in done} == {"no trained controller"}
        assert notes("\n".join(server.lines)) == 1
        plain = server.client().completions.create(
            model="tiny", prompt="A b", max_tokens=2, extra_body={"policy": "int4"}
        )
        assert plain.kvq["policy_reason"] is None


@pytest.mark.slow
@pytest.mark.parametrize("task", ["pareto", "kld"])
def test_evaluations_do_without_a_controller(tiny_bundle, tmp_path, task):
    text = tmp_path / "text.txt"
    text.write_text("The old man looked at the sea and said nothing. " * 30)
    extra = ["--bits", "10"] if task == "pareto" else ["-p", "auto", "-p", "int4"]
    done = command(
        "eval", task, "-m", str(tiny_bundle), "--text", str(text), "--context", "80", "--chunks", "1", *extra
    )
    assert done.returncode == 0, done.stderr
    arms = {row.get("arm", row.get("policy")) for row in json.loads(done.stdout)}
    assert arms >= ({"static", "rule", "random"} if task == "pareto" else {"auto", "int4"})
