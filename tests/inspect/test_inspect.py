"""Inspection: records are what the store holds, nothing is changed by looking; the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kvq
from kvq.controller.policies import POLICIES
from kvq.controller.policies.static import StaticPolicy
from kvq.runtime.errors import ContextError, PolicyError, PromptError
from kvq.runtime.inspect.inspection import inspect_session, inspect_text, stored_tokens
from kvq.runtime.inspect.views import terminal
from kvq.runtime.text.cells import visible
from tests.cli.test_cli import HEAVY, LOADED, assert_one_line_error, python
from tests.cli.test_cli import kvq as command_line
from tests.inspect.test_views import HOSTILE, TEXT, plain

# What is stored


def expected_bits(policy: str, position: int) -> tuple[int, int]:
    """By the policy's description, written down here once more."""
    if policy == "mixed":
        return ((16, 16), (8, 8), (4, 4), (2, 2))[position % 4]
    return {"fp16": (16, 16), "int4": (4, 4), "k8v2": (8, 2)}[policy]


@pytest.mark.parametrize("policy", ["fp16", "int4", "k8v2", "mixed"])
@pytest.mark.parametrize(("recent", "sink"), [(0, 0), (4, 0), (4, 9), (300, 0)])
def test_records_are_what_the_store_was_given(tiny_model, policy, recent, sink):
    found = inspect_text(tiny_model, TEXT, policy, recent=recent, sink=sink)
    ids = tiny_model.encode(TEXT)
    assert [token.id for token in found.tokens] == ids
    for i, token in enumerate(found.tokens):
        chosen = (16, 16) if i < sink else expected_bits(policy, i)
        assert (token.position, token.chosen) == (i, chosen)
        assert token.in_window == (i >= len(ids) - recent)
        assert token.bits == ((16, 16) if token.in_window else chosen)


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
            arrays += [one.positions, one.keys.codes, one.keys.scales, one.values.codes, one.values.scales]
    return [array.tobytes() for array in arrays]


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("fp16", {}), ("mixed", {"prefill_chunk": 16}), ("rule", {}), ("adaptive", {}), ("paper", {"sink": 4}),
        ("adaptive", {"kv_bits": 3.25}), ("rule", {"kv_memory": 2_500_000}), ("random", {"kv_bits": 5}),
    ],
    ids=str,
)  # fmt: skip
def test_looking_at_features_changes_no_stored_byte(policy, options):
    model = kvq.load()
    ids = model.encode(TEXT * 2)
    plain = model.session(policy, **options)
    plain.append(ids)
    looked_at = model.session(policy, **options)
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
    logits = tiny_model.session(prefill_chunk=16).append(ids, all_logits=True).astype(np.float64)
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
def test_a_session_is_inspected_as_its_text_is(policy, options):
    model = kvq.load()
    session = model.session(policy, **options)
    session.append(model.encode(TEXT))
    before, tokens = stored_bytes(session), list(session.tokens)
    found = inspect_session(session)
    expected = inspect_text(model, TEXT, policy, **options)
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
    assert [token.chosen for token in found.tokens] == [expected_bits("mixed", i) for i in range(15)]
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


# The command


def inspect(model, *arguments, **options) -> subprocess.CompletedProcess:
    return command_line("inspect", "--model", str(model), *arguments, **options)


def test_text_goes_to_stdout_and_totals_to_stderr(tiny_bundle, tiny_model):
    done = inspect(tiny_bundle, "-p", "mixed", "--recent", "2", TEXT.strip())
    assert done.returncode == 0
    expected = inspect_text(tiny_model, TEXT.strip(), "mixed", recent=2, features=False)
    assert done.stdout == terminal.text(expected, color=False)
    assert done.stderr == terminal.table(expected, color=False)
    quiet = inspect(tiny_bundle, "-q", "-p", "mixed", "--recent", "2", input=TEXT.strip())
    assert (quiet.stdout, quiet.stderr) == (done.stdout, "")


def test_colours_on_demand_and_a_file_or_stdin(tiny_bundle, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(HOSTILE)
    for arguments, stdin in ((["-f", str(file)], ""), (["-f", "-"], HOSTILE), ([], HOSTILE)):
        done = inspect(tiny_bundle, "-p", "int4", "--color", "always", *arguments, input=stdin, env={"NO_COLOR": "1"})
        assert done.returncode == 0
        assert "\x1b[48;2;" in done.stdout
        assert "\x1b[48;2;" in done.stderr
        assert plain(done.stdout) == visible(HOSTILE) + "\n"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
@pytest.mark.parametrize(
    ("env", "colored"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)], ids=str
)
def test_a_terminal_gets_colours_unless_told_otherwise(tiny_bundle, env, colored):
    ours, theirs = os.openpty()
    arguments = [sys.executable, "-m", "kvq", "inspect", "-m", str(tiny_bundle), "-p", "mixed", "-q"]
    arguments += ["--sink", "0", "Hello there"]
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm", "COLUMNS": "40"} | env
    with subprocess.Popen(arguments, stdout=theirs, stderr=subprocess.PIPE, env=environment) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux says so when the other end is closed
                break
            if not part:
                break
            shown += part
        os.close(ours)
        assert process.wait(120) == 0, process.stderr.read()
    assert (b"\x1b[48;2;" in shown) is colored
    assert (b"[k8v8* " in shown) is not colored


def test_json_is_one_object_in_ascii(tiny_bundle):
    done = inspect(tiny_bundle, "--json", "-q", "-p", "mixed", HOSTILE.replace("\x00", ""))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert "".join(token["text"] for token in result["tokens"]) == result["text"] == HOSTILE.replace("\x00", "")
    assert sum(row["nbytes"] + row["slack_nbytes"] for row in result["totals"]) == result["stats"]["kv_nbytes"]
    assert {"entropy", "rarity", "attention_variance", "confidence"} <= result["tokens"][0].keys()


def test_page_and_plot_are_written_instead_of_the_text(tiny_bundle, tmp_path):
    made = tmp_path / "page.html", tmp_path / "plot.png"
    made[0].write_text("old")
    done = inspect(tiny_bundle, "-p", "rule", "--html", str(made[0]), "--png", str(made[1]), input=TEXT)
    assert (done.returncode, done.stdout) == (0, "")
    assert "bits/value" in done.stderr
    assert made[0].read_text().startswith("<!doctype html>")
    assert made[1].read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == sorted(made)


def test_a_page_that_cannot_be_written_is_one_line(tiny_bundle, tmp_path):
    missing = tmp_path / "no" / "page.html"
    done = inspect(tiny_bundle, "-p", "int4", "--html", str(missing), "Hello")
    assert_one_line_error(done, "page.html", "No such file")
    assert_one_line_error(inspect(tiny_bundle, "-p", "int4", "--html", str(tmp_path), "Hello"), "Is a directory")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    """A saved session and what was in it."""
    session = tiny_model.session("mixed", recent=4, sink=2)
    list(session.generate(TEXT, max_tokens=9, temperature=0, ignore_eos=True))
    file = tmp_path_factory.mktemp("sessions") / "saved.kvq"
    session.save(file)
    return file, session


def test_a_saved_session_is_what_it_was(saved, tiny_model):
    file, session = saved
    found, expected = inspect_session(tiny_model.load_session(file)), inspect_session(session)
    assert found.tokens == expected.tokens
    assert found.totals == expected.totals


def test_the_command_shows_a_saved_session(saved, tiny_bundle):
    file, session = saved
    expected = inspect_session(session)
    done = inspect(tiny_bundle, "--session", str(file))
    assert (done.returncode, done.stdout) == (0, terminal.text(expected, color=False))
    assert done.stderr == terminal.table(expected, color=False)
    result = json.loads(inspect(tiny_bundle, "--session", str(file), "--json", "-q").stdout)
    assert result["tokens"] == json.loads(json.dumps([token.as_dict() for token in expected.tokens]))


@pytest.mark.parametrize(
    "option",
    [
        ["Hello"],
        ["-f", "x"],
        ["-p", "int4"],
        ["--kv-bits", "4"],
        ["--kv-memory", "1MB"],
        ["--recent", "16"],
        ["--sink", "0"],
    ],
    ids=" ".join,
)
def test_what_a_session_has_of_its_own_is_refused_beside_it(saved, tiny_bundle, option):
    done = inspect(tiny_bundle, "--session", str(saved[0]), *option)
    assert (done.returncode, done.stdout) == (2, "")
    assert "exclude each other" in done.stderr


def test_a_session_file_that_is_none_is_one_line(tiny_bundle, tmp_path):
    (tmp_path / "text.kvq").write_text("Hello")
    assert_one_line_error(inspect(tiny_bundle, "--session", str(tmp_path / "text.kvq")), "is not a session file")
    assert_one_line_error(inspect(tiny_bundle, "--session", str(tmp_path / "no.kvq")), "no session file")


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "words"),
    [
        (["-p", "int4", ""], "", 1, ["the prompt is empty"]),
        (["-p", "int4"], " \n", 1, ["the prompt is empty"]),
        (["-p", "int4"], "word " * 3000, 1, ["do not fit", "context of 256"]),
        (["-p", "int4"], b"caf\xe9", 1, ["stdin is not UTF-8"]),
        (["-p", "int4", "-f", "missing.txt"], "", 1, ["cannot read missing.txt"]),
        (["-p", "int5", "Hello"], "", 2, ["unknown policy 'int5'"]),
        (["-p", "adaptive", "Hello"], "", 2, ["no 'adaptive' controller", "kvq train-controller", "--text FILE"]),
        (["-p", "int4", "--kv-bits", "4", "Hello"], "", 2, ["cannot follow a budget"]),
        (["-p", "rule", "--kv-memory", "much", "Hello"], "", 2, ["'much' is not a size"]),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_known_error_is_one_line(tiny_bundle, tmp_path, monkeypatch, arguments, stdin, code, words):
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(inspect(tiny_bundle, *arguments, input=stdin), *words, code=code)


def test_a_missing_matplotlib_is_named_before_the_model_runs(tiny_bundle, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    png = tmp_path / "plot.png"
    done = inspect(tiny_bundle, "-p", "int4", "--png", str(png), "Hello", env={"PYTHONPATH": path})
    assert_one_line_error(done, "matplotlib", "kvq-run[plot]")
    assert not png.exists()


def test_help_shows_examples_and_loads_no_model_code():
    out = python(
        f"import sys; sys.argv = ['kvq', 'inspect', '-h']\nfrom kvq.runtime.cli.main import main\nmain()\n{LOADED}"
    )
    assert "Examples:" in out
    assert "[default: auto]" in out
    assert not {*HEAVY, "onnxruntime", "matplotlib"} & set(out.splitlines()[-1].split())


def test_a_terminal_without_unicode_does_not_crash(tiny_bundle):
    done = inspect(tiny_bundle, "-p", "int4", "--color", "always", TEXT, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "\x1b[48;2;" in done.stdout


def test_stored_tokens_of_an_empty_store_are_none(tiny_model):
    assert all(len(part) == 0 for part in stored_tokens(tiny_model.session().store))


def test_the_documentation_names_the_files_it_shows_and_its_program_runs(capsys):
    folder = Path(__file__).resolve().parents[2] / "docs"
    source = (folder / "inspect.md").read_text()
    for image in re.findall(r"!\[.*?\]\((.*?)\)", source):
        assert (folder / image).stat().st_size < 150_000
    assert all(policy in POLICIES for policy in re.findall(r"-p (\w+)", source))
    (program,) = re.findall(r"```python\n(.*?)```", source, re.DOTALL)
    exec(program, {})
    assert capsys.readouterr().out.count("\n") == len(kvq.load().encode("The captain looked at the sea"))
