"""`kvq chat --tools`: commands run when they are confirmed, as they were listed, and their words go to the model."""

from __future__ import annotations

import json
import sys
import time

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.runtime.cli.commands import MOST_OUTPUT, Toolbox, arguments_of, read_tools
from kvq.runtime.cli.repl import MOST_ROUNDS, Repl
from kvq.runtime.errors import PromptError
from tests.cli.test_cli_chat import chat
from tests.tools.command_line import assert_one_line_error
from tests.tools.packages import needs

CALL = '<tool_call>\n{"name": "note", "arguments": {"text": "a; rm -rf $HOME"}}\n</tool_call>'


def tools_of(folder, *tools) -> list:
    """The tools of a file."""
    path = folder / "tools.json"
    path.write_text(json.dumps(tools))
    return read_tools(path)


def echo(*parts: str) -> dict:
    """A tool that prints its arguments, one a line."""
    return {"name": "echo", "command": [sys.executable, "-c", "import sys; print(*sys.argv[1:], sep='\\n')", *parts]}


@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_an_argument_stays_one_whatever_it_holds(tmp_path_factory, text):
    (tool,) = tools_of(tmp_path_factory.mktemp("tools"), echo("say {text}!", "{more}"))
    assert tool.argv({"text": text})[3:] == [f"say {text}!"]
    assert tool.argv({"text": text, "more": 5})[3:] == [f"say {text}!", "5"]


def test_what_a_command_says_is_bounded_and_how_it_ends_is_told(tmp_path):
    (tool,) = tools_of(tmp_path, echo("{a}"))
    assert tool.run(tool.argv({"a": "$HOME `id`"})) == "$HOME `id`"
    long = tool.run(tool.argv({"a": "x" * (MOST_OUTPUT + 5)}))
    assert long == "x" * MOST_OUTPUT + "\n[5 more characters]"
    slow, failing, missing = tools_of(
        tmp_path,
        {"name": "slow", "timeout": 0.5, "command": [sys.executable, "-c", "import time; time.sleep(60)"]},
        {"name": "failing", "command": [sys.executable, "-c", "import sys; print('no'); sys.exit(3)"]},
        {"name": "missing", "command": ["/no/such/program"]},
    )
    assert slow.run(slow.argv({})) == "[ended after 0.5 s]"
    assert failing.run(failing.argv({})) == "no\n[exit code 3]"
    assert missing.run(missing.argv({})).startswith("error: ")


ENDLESS = "import os\nwhile True: os.write(1, b'x' * 65536)"
HOLDER = (
    "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)']); print('begun')"
)
CLOSED = "import os, time; os.write(1, b'gone'); os.close(1); os.close(2); time.sleep(60)"
COMMANDS = {
    "words without end": (ENDLESS, "[ended after 1,000,000 bytes]"),
    "a child that holds the pipe": (HOLDER, "begun\n[ended after 3 s]"),
    "one that closes its streams": (CLOSED, "gone\n[ended after 3 s]"),
    "no text": ("import os; os.write(1, bytes(range(128, 256)))", "\ufffd" * 128),
    "its own end": ("import os, signal; print('x', flush=True); os.kill(os.getpid(), 9)", "x\n[exit code -9]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_takes_bounded_time_and_memory_whatever_it_does(tmp_path, name):
    code, ending = COMMANDS[name]
    (tool,) = tools_of(tmp_path, {"name": "a", "timeout": 3, "command": [sys.executable, "-c", code]})
    begun = time.monotonic()
    said = tool.run(tool.argv({}))
    assert said.endswith(ending)
    assert len(said) < MOST_OUTPUT + 100
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("[]", "no JSON object"), ("{", "no JSON object"), ('{"b": 1}', "takes no 'b'"), ("{}", "needs a"),
        ('{"a": [1]}', "must be a text"), ('{"a": "\\u0000"}', "must be a text"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(tmp_path, arguments, words):
    (tool,) = tools_of(tmp_path, echo("-{a}"))
    with pytest.raises(PromptError, match=words):
        tool.argv(arguments_of(arguments))


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ([], "list of 1 to"), ([5], "must be an object"), ([{"name": "a b", "command": ["x"]}], "name must be"),
        ([{"name": "a", "command": "date; id"}], "list of texts"),
        ([{"name": "a", "command": ["{a}"]}], "list of texts"),
        ([{"name": "a", "command": ["x"], "zzz": 1}], "unknown field 'zzz'"),
        ([{"name": "a", "command": ["x"], "timeout": 0}], "timeout must be"),
        ([{"name": "a", "command": ["x", "{b}"], "parameters": {"properties": {"c": {}}}}], "both in parameters"),
        ([{"name": "a", "command": ["x"]}] * 2, "same name"),
    ],
)  # fmt: skip
def test_a_file_that_lists_no_tools_is_refused(tiny_bundle, tmp_path, tools, words):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(tools))
    assert_one_line_error(chat(tiny_bundle, "--tools", path, input="Hello\n"), words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attended", "answer", "runs"), [(True, True, MOST_ROUNDS), (True, False, 0), (False, True, 0)]
)
def test_a_call_runs_only_when_somebody_says_yes(embedded, tmp_path, monkeypatch, capfd, attended, answer, runs):
    needs("llguidance")
    notes = tmp_path / "notes"
    code = f"import sys; open({str(notes)!r}, 'a').write(sys.argv[1] + chr(10)); print('noted')"
    toolbox = Toolbox(tools_of(tmp_path, {"name": "note", "command": [sys.executable, "-c", code, "{text}"]}))
    asked = []
    monkeypatch.setattr(click, "confirm", lambda text, **_: asked.append(text) or answer)
    generation = {"max_tokens": 400, "choice": [CALL], "temperature": 0.0}  # a model that always calls
    repl = Repl(embedded, {}, "Be kind.", generation, quiet=False, tools=toolbox)
    repl.attended = attended
    repl.answer("Hello")
    assert (notes.read_text().splitlines() if notes.exists() else []) == ["a; rm -rf $HOME"] * runs
    assert len(asked) == (MOST_ROUNDS if attended else 0)
    assert all("'a; rm -rf $HOME'" in text for text in asked)  # shown as one argument
    contents = [message["content"] for message in repl.conversation.messages]
    told = "noted" if runs else "error: the user"
    assert contents[0].startswith("Be kind.")
    assert '"name": "note"' in contents[0]
    assert told in contents[3]
    assert "rounds of commands" in capfd.readouterr().err


@pytest.mark.slow
def test_a_conversation_begun_without_the_tools_is_refused(tiny_bundle, tmp_path):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([{"name": "a", "command": ["date"]}]))
    file = tmp_path / "talk.kvq"
    chat(tiny_bundle, "--session", file, input="Hello\n")
    assert_one_line_error(chat(tiny_bundle, "--session", file, "--tools", path, input="Why?\n"), "without these tools")


@pytest.mark.slow
def test_the_last_question_is_edited_and_answered_again(tiny_bundle, tmp_path):
    editor = tmp_path / "editor"
    editor.write_text(f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\np = Path(sys.argv[1])\n"
                      "p.write_text(p.read_text().replace('Hello', 'Why?'))\n")  # fmt: skip
    editor.chmod(0o755)
    options = {"env": {"EDITOR": str(editor), "VISUAL": str(editor)}}
    done = chat(tiny_bundle, "-q", input="And?\nHello\n/edit\n", **options)
    assert done.returncode == 0, done.stderr
    expected = chat(tiny_bundle, "-q", input="And?\nWhy?\n").stdout.splitlines()
    assert done.stdout.splitlines()[-1] == expected[-1]
    assert "nothing changed" in chat(tiny_bundle, input="And?\n/edit\n", **options).stderr
    assert_one_line_error(chat(tiny_bundle, "-q", input="/edit\n"), "nothing to edit")
