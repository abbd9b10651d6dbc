"""kvq inspect: text, report, plot and JSON of a text or of a saved session; errors in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

import kvq
from kvq.controller.policies import POLICIES
from kvq.runtime.inspect.inspection import inspect_session, inspect_text
from kvq.runtime.inspect.views import terminal
from kvq.runtime.text.cells import visible
from tests.tools.command_line import HEAVY, LOADED, assert_one_line_error, python
from tests.tools.command_line import kvq as command_line
from tests.tools.inspected import HOSTILE, TEXT, plain
from tests.tools.tree import DOCS


def inspect(model, *arguments, **options) -> subprocess.CompletedProcess:
    return command_line("inspect", "--model", str(model), *arguments, **options)


@pytest.mark.slow
def test_text_goes_to_stdout_and_totals_to_stderr(tiny_bundle, tiny_model):
    done = inspect(tiny_bundle, "-p", "mixed", "--recent", "2", TEXT.strip())
    assert done.returncode == 0
    expected = inspect_text(tiny_model, TEXT.strip(), "mixed", recent=2, features=False)
    assert done.stdout == terminal.text(expected, color=False)
    assert done.stderr == terminal.table(expected, color=False)
    quiet = inspect(tiny_bundle, "-q", "-p", "mixed", "--recent", "2", input=TEXT.strip())
    assert (quiet.stdout, quiet.stderr) == (done.stdout, "")


@pytest.mark.slow
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


@pytest.mark.slow
def test_page_and_plot_are_written_instead_of_the_text(tiny_bundle, tmp_path):
    made = tmp_path / "page.html", tmp_path / "plot.png"
    made[0].write_text("old")
    done = inspect(tiny_bundle, "-p", "rule", "--html", str(made[0]), "--png", str(made[1]), input=TEXT)
    assert (done.returncode, done.stdout) == (0, "")
    assert "bits/value" in done.stderr
    assert made[0].read_text().startswith("<!doctype html>")
    assert made[1].read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == sorted(made)


def test_a_report_that_cannot_be_written_is_one_line(tiny_bundle, tmp_path):
    missing = tmp_path / "no" / "page.html"
    done = inspect(tiny_bundle, "-p", "int4", "--html", str(missing), "Hello")
    assert_one_line_error(done, f"'--html': there is no folder {missing.parent}; make it first", code=2, who="Error")
    assert_one_line_error(
        inspect(tiny_bundle, "-p", "int4", "--html", str(tmp_path), "Hello"), "is a directory", code=2, who="Error"
    )
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_the_documentation_names_the_files_it_shows_and_its_program_runs(capsys):
    source = (DOCS / "inspect.md").read_text()
    for image in re.findall(r"!\[.*?\]\((.*?)\)", source):
        assert (DOCS / image).stat().st_size < 150_000
    assert all(policy in POLICIES for policy in re.findall(r"-p (\w+)", source))
    (program,) = re.findall(r"```python\n(.*?)```", source, re.DOTALL)
    exec(program, {})
    assert capsys.readouterr().out.count("\n") == len(kvq.load().encode("The captain looked at the sea"))
