"""A folder may be called anything, and a model may say anything: neither steers the terminal that shows it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest

from kvq.composition import open_bundle
from kvq.runtime.cli import answers
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
    responses = (SimpleNamespace(text=text, finish_reason=None) for text in said)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    quiet = SimpleNamespace(clear=lambda: None, arm=lambda: None, asked=False)
    answer = answers.show(responses, quiet, quiet, strip=False)
    shown = capsys.readouterr().out
    assert answer.text == said  # what is kept, and goes on, is what was said
    if terminal:
        assert shown == "one\n\ttwo \u241b]52;c;Y3VybA==\u2407<U+009B>2J<U+202E>\u00e9\n"
    else:
        assert shown == said + "\n"
