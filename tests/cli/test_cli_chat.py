"""``kvq chat`` as people meet it: in a terminal of its own, and in scripts."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest

from tests.tools.command_line import assert_one_line_error, kvq

CHAT = ["chat", "-n", "12", "-t", "0", "--ignore-eos"]


def chat(model, *arguments, input="", **options):
    return kvq(*CHAT, "-m", str(model), *arguments, input=input, **options)


@pytest.mark.slow
def test_each_line_of_stdin_is_a_turn_and_stdout_is_the_answers(tiny_bundle, tiny_model):
    from kvq.runtime.chat.conversation import Conversation

    conversation = Conversation(tiny_model.session())
    expected = []
    for question in ("Hello", "Why?"):
        options = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, "top_k": 40, "top_p": 0.95}
        expected.append("".join(r.text for r in conversation.reply(question, **options)).lstrip())
    done = chat(tiny_bundle, "-q", input="Hello\n\n  Why?  \n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(answer + "\n" for answer in expected)


@pytest.mark.slow
def test_notices_go_to_stderr(tiny_bundle):
    done = chat(
        tiny_bundle, input="Hello\n/stats\n/help\n/undo\n/reset\n/policy int4\nHello\n/stats\n/quit\nnot asked\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= 2
    for words in ("(cut after 12 tokens", "tokens cached in", "/save FILE", "0 turns, 0 tokens left",
                  "a new conversation", "policy int4, 0 tokens processed again", "policy int4: "):  # fmt: skip
        assert words in done.stderr
        assert words not in done.stdout


@pytest.mark.slow
def test_a_policy_is_changed_with_the_conversation_kept(tiny_bundle):
    done = chat(tiny_bundle, input="Hello\n/policy k8v4\n/undo\nHello\n/policy fp16\n")
    assert done.returncode == 0, done.stderr
    assert "policy k8v4, " in done.stderr
    assert "0 turns, 0 tokens left" in done.stderr


@pytest.mark.slow
def test_a_saved_conversation_goes_on_as_if_it_had_never_been_away(tiny_bundle, tmp_path):
    file = tmp_path / "talk.kvq"
    system = ["--system", "Be brief."]
    whole = chat(tiny_bundle, "-q", *system, "-t", "1", "-s", "3", input="Hello\nWhy?\nAnd?\n")
    first = chat(tiny_bundle, "-q", *system, "-t", "1", "-s", "3", input=f"Hello\n/save '{file}'\n")
    rest = chat(tiny_bundle, "-t", "1", "-s", "3", input=f"/load {file}\nWhy?\nAnd?\n/undo\n/undo\n/undo\n")
    assert rest.returncode == 0, rest.stderr
    assert first.stdout + rest.stdout == whole.stdout
    assert "1 turn, " in rest.stderr
    assert "0 turns, 0 tokens left" in rest.stderr


@pytest.mark.slow
def test_a_session_file_is_taken_up_and_kept(tiny_bundle, tmp_path):
    file = tmp_path / "talk.kvq"
    options = ["-t", "1", "-s", "3"]
    whole = chat(tiny_bundle, "-q", *options, input="Hello\nWhy?\n")
    first = chat(tiny_bundle, *options, "--session", str(file), input="Hello\n")
    assert f"new session {file}" in first.stderr
    held = file.read_bytes()
    for _ in range(2):
        rest = chat(tiny_bundle, "-q", *options, "--session", str(file), "--session-readonly", input="Why?\n")
        assert (rest.returncode, first.stdout + rest.stdout) == (0, whole.stdout)
        assert file.read_bytes() == held
    done = chat(tiny_bundle, "-q", *options, "--session", str(file), input="Why?\n/undo\n/undo\n/undo\n")
    assert (done.returncode, "nothing to undo" in done.stderr) == (1, True)
    assert file.read_bytes() != held  # what stood before the error is kept
    done = chat(tiny_bundle, "--session", str(file), "--system", "Be brief.", input="Hello\n")
    assert_one_line_error(done, "leave system out")


@pytest.mark.slow
def test_a_file_that_holds_no_conversation_is_refused_and_the_chat_goes_on(tiny_bundle, tiny_model, tmp_path):
    session = tiny_model.session()
    session.append([1, 2, 3])
    session.save(tmp_path / "text.kvq")
    terminal = Terminal("-m", str(tiny_bundle), "-n", "3", "--stop", "\x01")
    for line, words in (
        (f"/load {tmp_path}/text.kvq", "no conversation"),
        (f"/load {tmp_path}/missing.kvq", "missing.kvq"),
        (f"/save {tmp_path}/no/such/folder", "kvq: "),
        ("Hello", "(cut after 3 tokens"),
    ):
        terminal.until("> ")
        terminal.type(line + "\n")
        terminal.until(words)
    terminal.type("\x04")
    assert terminal.end().endswith("\n")


@pytest.mark.parametrize(
    ("input", "words", "code"),
    [
        ("/nothing\n", ["no command /nothing", "/help"], 1),
        ("/save\n", ["/save takes 1 argument"], 1),
        ("/undo 2\n", ["/undo takes no arguments"], 1),
        ('/save "x\n', ["close its quotes"], 1),
        ("/undo\n", ["nothing to undo"], 1),
        ("/policy nonsense\n", ["unknown policy 'nonsense'"], 2),
        ("word " * 300, ["context of 256 tokens is full"], 1),
        (b"caf\xe9\n", ["line 1 of stdin is not UTF-8"], 1),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_in_a_script_the_first_error_ends_it(tiny_bundle, input, words, code):
    after = input + (b"Hello\n" if isinstance(input, bytes) else "\nHello\n")
    assert_one_line_error(chat(tiny_bundle, "-q", input=after), *words, code=code)


@pytest.mark.slow
def test_a_wrong_option_is_told_before_the_first_question(tiny_bundle):
    assert_one_line_error(chat(tiny_bundle, "--temp=-1"), "temperature must be at least 0", code=2)
    assert_one_line_error(chat(tiny_bundle, "-p", "nonsense"), "unknown policy", code=2)


class Terminal:
    """kvq chat, or another command, with a terminal for stdin and stderr, and a pipe for stdout.

    whole: the terminal is stdout too, which is when Python edits lines; env: more variables.
    """

    def __init__(self, *arguments, name="chat", whole=False, env=None):
        self.master, slave = pty.openpty()
        attributes = termios.tcgetattr(slave)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        sampling = [] if name == "prefill" else ["-t", "1", "-s", "1", "--ignore-eos"]
        command = [sys.executable, "-m", "kvq", name, *sampling, *arguments]
        # A child of a job in the background inherits that interrupts are ignored.
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave if whole else subprocess.PIPE, stderr=slave, start_new_session=True,
            env={**os.environ, **(env or {})},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        os.close(slave)
        self.seen = self.shown = ""  # not yet waited for, and all of it

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, words: str) -> None:
        """Read what the terminal shows until the words come."""
        deadline = time.monotonic() + 100
        while words not in self.seen:
            shown, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert shown, self.seen
            if not self._look():
                raise AssertionError(self.seen)
        self.seen = self.seen.partition(words)[2]

    def _look(self) -> bool:
        """Read what is there; False once the other side is closed."""
        try:
            new = os.read(self.master, 4096).decode()
        except OSError:
            return False
        self.seen, self.shown = self.seen + new, self.shown + new
        return bool(new)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> str:
        """Wait for the end; what stdout carried."""
        out = self.process.stdout.read().decode() if self.process.stdout else ""
        if self.process.stdout:
            self.process.stdout.close()
        assert self.process.wait(60) == 0
        while self._look():
            pass
        os.close(self.master)
        return out


@pytest.mark.slow
def test_an_interrupt_stops_the_answer_and_the_chat_goes_on():
    terminal = Terminal("-n", "-1")  # the embedded model: an answer of many seconds
    terminal.until("> ")
    terminal.type("Hello\n")
    first = terminal.process.stdout.read(1)
    terminal.interrupt()
    terminal.until("(stopped)")
    terminal.until("> ")
    terminal.interrupt()  # at the prompt
    terminal.until("(Ctrl-D or /quit ends the chat)")
    terminal.until("> ")
    terminal.type("/stats\n")
    terminal.until("tokens cached")
    terminal.until("> ")
    terminal.type("/nonsense\n")
    terminal.until("no command /nonsense")
    terminal.until("> ")
    terminal.type("/undo\n")
    terminal.until("0 turns, 0 tokens left")
    terminal.until("> ")
    terminal.type("\x04")
    out = terminal.end()
    assert "Traceback" not in terminal.seen
    assert out.endswith("\n")
    assert "> " not in first.decode() + out


@pytest.mark.slow
def test_a_line_that_ends_in_a_backslash_goes_on(tiny_bundle):
    terminal = Terminal("-m", str(tiny_bundle), "-n", "3", "--stop", "\x01")
    terminal.until("> ")
    terminal.type("One \\\n")
    terminal.until(". ")
    terminal.type("two\n")
    terminal.until("(cut after 3 tokens")
    terminal.until("> ")
    terminal.type("/quit\n")
    assert terminal.end().endswith("\n")


@pytest.mark.slow
def test_a_question_of_the_command_line_is_asked_first(tiny_bundle):
    terminal = Terminal("-m", str(tiny_bundle), "-n", "3", "--stop", "\x01", "Hello")
    terminal.until("/help lists commands")
    terminal.until("(cut after 3 tokens")
    terminal.until("> ")
    terminal.type("/undo\n")
    terminal.until("0 turns, 0 tokens left")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.end()
    terminal = Terminal("-m", str(tiny_bundle), "word " * 300)  # an error is told, and the chat goes on
    terminal.until("context of 256 tokens is full")
    terminal.until("> ")
    terminal.type("\x04")
    terminal.end()


# Of the embedded model, whose context is long enough for one.
LONG = "It was late and the captain looked at the sea. " * 60


def cleared(shown: str) -> bool:
    """Whether a bar was drawn, and wiped out before anything else came."""
    *_, last = re.split(r"\rreading \[[#-]{24}\] [\d,]+ of [\d,]+ tokens *", shown)
    return last != shown and re.match(r"\r +\r(?!reading)", last) is not None


@pytest.mark.slow
def test_a_long_question_shows_how_far_it_has_been_read():
    terminal = Terminal("-n", "3", LONG)
    terminal.until("(cut after 3 tokens")
    assert cleared(terminal.shown)
    before = len(terminal.shown)
    terminal.until("> ")
    terminal.type("Hello\n")
    terminal.until("(cut after 3 tokens")
    assert "reading" not in terminal.shown[before:]  # a short one does not
    terminal.until("> ")
    terminal.type("\x04")
    assert "reading" not in terminal.end()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "drawn"),
    [
        (["run", "-n", "3", LONG], True),
        (["run", "-n", "3", "Hello"], False),
        (["run", "-n", "3", "-q", LONG], False),
        (["run", "-n", "3", "--json", LONG], False),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_long_prompt_shows_how_far_it_has_been_read(arguments, drawn):
    name, *arguments = arguments
    terminal = Terminal(*arguments, name=name)
    assert "reading" not in terminal.end()
    assert cleared(terminal.shown) if drawn else "reading" not in terminal.shown


@pytest.mark.slow
def test_prefill_shows_how_far_it_has_read_and_a_pipe_gets_no_bar(tmp_path):
    (tmp_path / "long.txt").write_text(LONG)
    arguments = [str(tmp_path / "long.txt"), "-o", str(tmp_path / "long.kvq"), "--overwrite"]
    terminal = Terminal(*arguments, name="prefill")
    terminal.end()
    assert cleared(terminal.shown)
    assert "plain text, read in" in terminal.shown
    for done in (kvq("prefill", *arguments), kvq("run", "-n", "3", LONG), kvq("chat", "-n", "3", LONG)):
        assert (done.returncode, "reading" in done.stderr, "\r" in done.stderr) == (0, False, False)


def test_a_closed_pipe_ends_a_chat_quietly(tiny_bundle):
    line = f'printf "Hello\\nMore\\n" | "{sys.executable}" -m kvq chat -m "{tiny_bundle}" -n 200 -q | head -c 1'
    done = subprocess.run(["sh", "-c", line], capture_output=True, timeout=120)
    assert done.stderr == b""


@pytest.mark.slow
def test_a_question_may_begin_with_a_path_and_a_policy_without_a_budget_drops_it(tiny_bundle):
    lines = "/etc/passwd is what?\n/policy int8\n/stats\n"
    done = kvq("chat", "-m", str(tiny_bundle), "--kv-bits", "12", "-n", "3", input=lines)
    assert done.returncode == 0, done.stderr
    assert "policy int8, without the budget, " in done.stderr
    assert "| policy int8" in done.stderr
