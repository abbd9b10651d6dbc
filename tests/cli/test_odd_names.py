"""A folder may be called anything, and a model may say anything: neither steers the terminal that shows it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvq.composition import open_bundle
from kvq.controller.evaluation.cli.options import say
from kvq.runtime.cli import answers, repl, run
from kvq.runtime.cli.run import _as_json
from kvq.runtime.errors import BundleError
from tests.tools.command_line import assert_one_line_error, kvq

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows allows no such names")
# A terminal's escapes, its line ends, a mark that turns text around, an escape of one character of Latin-1.
NAMES = ["\x1b[2J\x1b]0;title\x07", "a\rb", "a\x0bb\x85c", "\u202eevil", "x\x9b2J"]


@pytest.fixture
def odd(tiny_bundle, tmp_path, monkeypatch):
    """Makes a copy of the tiny bundle of a name."""
    monkeypatch.setenv("KVQ_HOME", str(tmp_path / "home"))
    return lambda name: str(shutil.copytree(tiny_bundle, tmp_path / name))


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_the_name_of_a_folder_is_printed_so_that_it_moves_no_cursor(name, odd):
    folder = odd(name)
    for arguments in (
        ["name", folder, "mine"], ["use", folder], ["use"], ["list"], ["list", "--json"], ["show", "mine"],
        ["inspect", "-m", folder, "-p", "auto", "The sea"], ["rm", "mine", "--yes"],
    ):  # fmt: skip
        done = kvq(*arguments)
        assert done.returncode == 0, done.stderr
        assert all(line.isprintable() for text in (done.stdout, done.stderr) for line in text.split("\n")), arguments
        if "--json" in arguments:
            rows = [json.loads(line) for line in done.stdout.splitlines()]
            assert folder in [row.get("path") for row in rows]


def test_a_folder_whose_name_is_no_text_is_refused(odd):
    folder = odd(os.fsdecode(b"\xff\xfe"))
    with pytest.raises(BundleError, match=r"the name of the folder .*\\udcff\\udcfe is not UTF-8"):
        open_bundle(folder)
    assert_one_line_error(kvq("run", "-m", folder, "Hello"), "not UTF-8")


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_model_says_reaches_a_file_as_it_is_and_a_terminal_as_it_can_be_shown(terminal, capsys, monkeypatch):
    said = "one\n\ttwo \x1b]52;c;Y3VybA==\x07\x9b2J\u202e\u00e9"
    red = "\x1b[31m"  # at once: click takes such ones out of what a file gets, unless told not to
    responses = (SimpleNamespace(text=text, finish_reason=None) for text in (*said, red))
    said += red
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    quiet = SimpleNamespace(clear=lambda: None, arm=lambda: None, asked=False)
    answer = answers.show(responses, quiet, quiet, strip=False)
    shown = capsys.readouterr().out
    assert answer.text == said  # what is kept, and goes on, is what was said
    if terminal:
        assert shown == "one\n\ttwo \u241b]52;c;Y3VybA==\u2407<U+009B>2J<U+202E>\u00e9\u241b[31m\n"
    else:
        assert shown == said + "\n"


def test_json_says_what_a_model_said_and_no_terminal_does_what_it_asks(monkeypatch, capsys):
    said = '\x1b]0;x\x07\x7f\x85\x9b2J\u2028\u202e\ud800\U000e0041\u200d\u00e9\U0001f600\n\t"\\'
    answer = answers.Answer(said, None, 0.0, False)
    session = SimpleNamespace(stats=lambda: SimpleNamespace(as_dict=dict))
    written = _as_json(answer, None, session, said, True, said)
    found = json.loads(written)
    assert (found["text"], found["prompt"], found["empty"]) == (said, said, said)
    assert written.replace("\u200d", "").isprintable()
    assert "\u00e9\U0001f600" in written  # what harms nobody stays legible
    assert written.encode()


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_the_name_of_a_file_is_printed_so_that_it_moves_no_cursor(name, tiny_bundle, tmp_path):
    model, file, text = ["-m", str(tiny_bundle)], str(tmp_path / f"{name}.kvq"), str(tmp_path / f"{name}.txt")
    Path(text).write_text("The sea")
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "A", "max_tokens": 1}}
    Path(f"{file}.in").write_text(json.dumps(line) + "\n")
    for code, arguments in (
        (0, ["prefill", *model, text, "-o", file]),
        (0, ["run", *model, "--session", file, "-n", "1", "Hello"]),
        (0, ["info", file]),
        (0, ["batch", *model, f"{file}.in", f"{file}.out"]),
        (1, ["run", *model, "-f", f"{text}.not there"]),
        (1, ["info", f"{file}.not there"]),
        (2, ["prefill", *model, text, "-o", file, name]),
        (1, ["eval", "report", text]),
        (1, ["eval", "kld", *model, "--text", text]),
    ):
        done = kvq(*arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert all(line.isprintable() for line in done.stderr.split("\n")), (arguments, done.stderr)


def test_the_name_of_a_token_is_printed_so_that_it_moves_no_cursor(capsys):
    run._tell("kvq: the model ended its answer at once (<\x1b[2J\u202e|>)")
    terminal = repl.Repl.__new__(repl.Repl)
    terminal.quiet = False
    terminal.notice("(the model ended its answer at once (<\x1b[2J\u202e|>))")
    found = capsys.readouterr().err
    assert all(line.isprintable() for line in found.split("\n"))
    assert found.count("the model ended its answer at once") == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_a_table_of_rows_from_a_file_reaches_a_terminal_as_it_can_be_shown(terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    say("| \x1b[2J\u202e |")
    assert capsys.readouterr().out == ("| \u241b[2J<U+202E> |\n" if terminal else "| \x1b[2J\u202e |\n")
