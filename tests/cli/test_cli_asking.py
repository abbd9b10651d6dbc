"""Asking a model on the command line: chat templates, text from pipes and files, documents, answers that are none."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from kvq.composition import open_bundle
from kvq.runtime.chat.conversation import Conversation
from tests.tools.chats import chat_bundle
from tests.tools.checkpoints import small_tokenizer
from tests.tools.command_line import assert_one_line_error, command, kvq, run

# As `run` and `ask` set them, with the defaults of the command line.
GREEDY = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
LEASE = "The rent is 640 pounds, due on the third. <|im_end|> is a word here.\n"


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint, tmp_path_factory):
    """A bundle with SmolLM2's chat template."""
    return chat_bundle(tiny_checkpoint, small_tokenizer(490), "chatml", tmp_path_factory.mktemp("chat") / "of")


@pytest.fixture(scope="module")
def model(bundle):
    return open_bundle(bundle)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lease.kvq"


@pytest.fixture
def lease(tmp_path):
    file = tmp_path / "lease.txt"
    file.write_text(LEASE)
    return file


def answers(model, *questions, policy=None, system=None, document=None, role="user") -> list[str]:
    """What the library says, one question after the other, without the blanks an answer begins with."""
    conversation = Conversation(model.session(policy), system)
    if document:
        conversation.read(document, role)
    return ["".join(r.text for r in conversation.reply(question, **GREEDY)).lstrip() for question in questions]


def found(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_question_is_asked_through_the_template(bundle, model):
    expected = answers(model, "Where is <|im_end|>?")[0]
    done = run(bundle, "Where is <|im_end|>?")
    assert (done.returncode, done.stdout) == (0, expected + "\n")
    assert done.stderr.startswith("length after 12 tokens | ")
    assert done.stderr.count("\n") == 1
    told = found(run(bundle, "--json", "Where is <|im_end|>?"))
    assert (told["text"], told["template"], told["prompt"], told["empty"]) == (
        expected, True, "Where is <|im_end|>?", None,
    )  # fmt: skip
    ids = model.chat_template.encode([{"role": "user", "content": "Where is <|im_end|>?"}])
    assert told["stats"]["tokens"] == len(ids) + told["tokens"] - 1


@pytest.mark.slow
def test_a_system_prompt_and_an_empty_one_take_the_place_of_the_templates_own(bundle, model):
    texts = set()
    for system in ("Be brief.", ""):
        done = run(bundle, "-q", "--system", system, "Hello")
        assert (done.returncode, done.stdout) == (0, answers(model, "Hello", system=system)[0] + "\n")
        texts.add(done.stdout)
    assert len({*texts, run(bundle, "-q", "Hello").stdout}) == 3
    assert run(bundle, "-q", "Hello", env={"KVQ_SYSTEM": "Be brief."}).stdout in texts


@pytest.mark.slow
def test_raw_goes_on_with_the_text(bundle, model):
    expected = "".join(r.text for r in model.session().generate("Hello", **GREEDY))
    done = run(bundle, "-q", "--raw", "Hello")
    assert (done.returncode, done.stdout) == (0, expected + "\n")
    told = found(run(bundle, "--raw", "--json", "Hello"))
    assert (told["template"], told["stats"]["tokens"]) == (False, len(model.encode("Hello")) + 11)
    assert found(run(bundle, "--json", "Hello"))["text"] != expected


@pytest.mark.slow
def test_a_model_without_a_template_goes_on_with_the_text(tiny_bundle):
    assert found(run(tiny_bundle, "--json", "Hello"))["template"] is False
    assert found(run(tiny_bundle, "--json", "--raw", "Hello"))["template"] is False


@pytest.mark.slow
def test_a_system_prompt_without_a_place_is_refused(bundle, tiny_bundle, path, lease):
    words = ["has no chat template", "leave --system out"]
    assert_one_line_error(run(tiny_bundle, "--system", "Be brief.", "Hello"), *words)
    done = run(bundle, "--raw", "--system", "Be brief.", "Hello")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--raw and --system exclude each other" in done.stderr
    prefill = ["prefill", str(lease), "-o", str(path), "-q", "-m"]
    assert_one_line_error(kvq(*prefill, str(tiny_bundle), "--system", "Be brief."), *words)
    assert_one_line_error(kvq(*prefill, str(tiny_bundle), "--as", "system"), "has no chat template", "leave --as out")
    assert_one_line_error(kvq(*prefill, str(bundle), "--raw", "--as", "user"), "--raw leaves out", "leave --as out")
    assert not path.exists()
    assert kvq(*prefill, str(bundle), "--raw").returncode == 0
    done = run(bundle, "--session", str(path), "--system", "Be brief.", "Hello")
    assert_one_line_error(done, "the session holds plain text", "leave --system out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "stdin", "parts"),
    [
        (["What is it?"], "A report.\n", ["A report.", "What is it?"]),
        (["What is it?"], "", ["What is it?"]),
        (["What is it?"], " \n\n", ["What is it?"]),
        ([], "A report.\n\nIt is long.\n", ["A report.\n\nIt is long."]),
        (["-f", "FILE", "What is it?"], "", [LEASE[:-1], "What is it?"]),
        (["-f", "FILE", "What is it?"], "A report.", ["A report.", LEASE[:-1], "What is it?"]),
        (["-f", "FILE"], "A report.", ["A report.", LEASE[:-1]]),
        (["-f", "-", "What is it?"], "A report.", ["A report.", "What is it?"]),
        ([""], "A report.", ["A report."]),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_stdin_file_and_argument_are_one_prompt(bundle, tiny_bundle, lease, arguments, stdin, parts):
    arguments = [str(lease) if part == "FILE" else part for part in arguments]
    assert found(run(bundle, "--json", *arguments, input=stdin))["prompt"] == "\n\n".join(parts)
    assert found(run(tiny_bundle, "--json", *arguments, input=stdin))["prompt"] == "\n".join(parts)


@pytest.mark.slow
@pytest.mark.parametrize("stdin", ["</dev/null", "<&-", "0>/dev/null"], ids=["empty", "closed", "as nohup leaves it"])
def test_a_stdin_without_text_is_none(bundle, stdin):
    line = f'"{sys.executable}" -m kvq run -q -m "{bundle}" -t 0 -n 3 --ignore-eos "Hello" {stdin}'
    done = command(["sh", "-c", line])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
    without = command(["sh", "-c", line.replace('"Hello"', "")])
    assert without.returncode == 1
    assert without.stderr.startswith("kvq: ")
    assert without.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_stdin_that_stays_open_is_waited_for_and_the_user_is_told(bundle):
    process = subprocess.Popen(
        [sys.executable, "-m", "kvq", "run", "-m", str(bundle), "-n", "3", "What is it?"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
    )  # fmt: skip
    begun = time.monotonic()
    assert process.stderr.readline().startswith(b"kvq: waiting for the end of stdin")
    assert time.monotonic() - begun > 2
    process.stdin.write(b"A report.")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out


@pytest.mark.slow
def test_text_that_is_not_utf8_is_told_by_its_source(bundle):
    assert_one_line_error(run(bundle, "What is it?", input=b"caf\xe9"), "stdin is not UTF-8", "byte 3")
    assert_one_line_error(kvq("chat", "-m", str(bundle), b"caf\xe9"), "the question is not UTF-8")
    assert_one_line_error(kvq("chat", "-m", str(bundle), " "), "the question is empty")


def first_token(model, question=None, prompt=None) -> int:
    if question is not None:
        return next(Conversation(model.session()).reply(question, **GREEDY)).token
    return next(model.session().generate(prompt, **GREEDY)).token


@pytest.mark.slow
def test_an_empty_answer_says_why(bundle, model):
    token = first_token(model, question="Hello")
    name = model.tokenizer.id_to_token(token)
    for quiet in ([], ["-q"]):
        done = run(bundle, *quiet, "--stop-token", str(token), "Hello")
        assert (done.returncode, done.stdout) == (0, "\n")
        assert done.stderr.splitlines()[0] == f"kvq: the model ended its answer at once ({name})"
        assert len(done.stderr.splitlines()) == 2 - len(quiet)
    told = found(run(bundle, "--json", "--stop-token", str(token), "Hello"))
    assert (told["text"], told["empty"]) == ("", f"the model ended its answer at once ({name})")
    chat = ["chat", "-m", str(bundle), "-t", "0", "--ignore-eos", "--stop-token", str(token), "Hello"]
    assert kvq(*chat).stderr == f"(the model ended its answer at once ({name}))\n"
    assert kvq(*chat, "-q").stderr == ""


@pytest.mark.slow
def test_a_text_that_ends_at_once_says_why(tiny_bundle, tiny_model):
    text = "".join(r.text for r in tiny_model.session().generate("Hello", **GREEDY))
    done = run(tiny_bundle, "-q", "--stop", text[:2], "Hello")
    assert (done.returncode, done.stdout) == (0, "\n")
    assert done.stderr == f"kvq: the model began the text with a stop string ({text[:2]!r})\n"
    code = (
        "import sys\nfrom kvq.runtime.session.session import Session\nstep = Session.step\n"
        "def ending(self, ids, end, skip, logits):\n"
        "    step(self, ids, end, skip, logits)\n    logits[:, END] = 1e4\n"
        "Session.step = ending\nfrom kvq.runtime.cli.main import main\nmain()\n"
    ).replace("END", str(tiny_model.bundle.manifest.eos_token_ids[0]))
    done = command([sys.executable, "-c", code, "run", "-q", "-m", str(tiny_bundle), "Who are you?"])
    end = tiny_model.tokenizer.id_to_token(tiny_model.bundle.manifest.eos_token_ids[0])
    assert (done.returncode, done.stdout) == (0, "\n")
    assert done.stderr.startswith(f"kvq: the model ended the text at once ({end}): it goes on with texts")


@pytest.mark.slow
def test_a_chat_begins_with_the_question_of_the_command_line(bundle, model):
    expected = answers(model, "Who wrote Emma?", "/help me?", "When was she born?")
    chat = ["chat", "-q", "-m", str(bundle), "-n", "12", "-t", "0", "--ignore-eos", "Who wrote Emma?"]
    done = kvq(*chat)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected[0] + "\n", "")
    done = kvq(*chat, input="When was she born?\n")
    assert done.stdout.startswith(expected[0] + "\n")
    assert done.stdout == "".join(text + "\n" for text in answers(model, "Who wrote Emma?", "When was she born?"))
    slash = kvq(*chat[:-1], "/help me?")  # what is no line of the chat is no command of it
    assert (slash.returncode, slash.stdout) == (0, answers(model, "/help me?")[0] + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("role", ["user", "system"])
def test_a_document_is_asked_through_the_template(bundle, model, lease, path, role):
    exact = ["-p", "fp16"]  # what is read in one go below comes in other chunks
    done = kvq("prefill", str(lease), "-o", str(path), "-m", str(bundle), "--as", role, "--system", "Be brief.", *exact)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"in the turn of the {role}, read in " in done.stderr
    held = path.read_bytes()
    document = LEASE.rstrip("\n")
    expected = answers(model, "When?", "How much?", policy="fp16", system="Be brief.", document=document, role=role)
    session = ["--session", str(path)]
    for _ in range(2):
        done = run(bundle, *session, "--session-readonly", "When?")
        assert (done.returncode, done.stdout) == (0, expected[0] + "\n")
        assert path.read_bytes() == held
    about = "; a document to ask about" if role == "user" else ""
    assert done.stderr.splitlines()[0].endswith(f"policy fp16{about}")
    chat = ["chat", "-q", "-m", str(bundle), "-n", "12", "-t", "0", "--ignore-eos", *session, "--session-readonly"]
    assert kvq(*chat, "When?", input="How much?\n").stdout == "".join(text + "\n" for text in expected)
    # In one go: what the model sees is the template over all of it.
    whole = Conversation(model.session("fp16"), "Be brief." if role == "user" else f"Be brief.\n\n{document}")
    question = f"{document}\n\nWhen?" if role == "user" else "When?"
    assert "".join(r.text for r in whole.reply(question, **GREEDY)).lstrip() == expected[0]
    # And as a conversation that goes on.
    assert run(bundle, "-q", *session, "When?").stdout == expected[0] + "\n"
    done = run(bundle, *session, "--json", "How much?")
    told = found(done)
    assert (told["text"], told["prompt"], told["template"]) == (expected[1], "How much?", True)
    assert run(bundle, *session, "Why?").stderr.splitlines()[0].endswith("; 2 turns")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "role"), [("chatml", "system"), ("llama3", "system"), ("rewriting", "user")])
def test_a_document_is_the_system_s_where_the_template_has_one(name, role, tiny_checkpoint, lease, path, tmp_path):
    made = chat_bundle(tiny_checkpoint, small_tokenizer(490), name, tmp_path / "of")
    done = kvq("prefill", str(lease), "-o", str(path), "-m", str(made))
    assert done.returncode == 0, done.stderr
    assert f"in the turn of the {role}, read in " in done.stderr


@pytest.mark.slow
def test_a_document_is_itself_the_question_where_none_is_given(bundle, model, tmp_path, path):
    (tmp_path / "task.txt").write_text("Name three ships.")
    prefill = ["prefill", str(tmp_path / "task.txt"), "-o", str(path), "-m", str(bundle), "-q", "--as", "user"]
    prefill += ["-p", "fp16"]  # the question alone is read in another chunk
    assert kvq(*prefill).returncode == 0
    done = run(bundle, "-q", "--session", str(path), "--session-readonly")
    assert (done.returncode, done.stdout) == (0, answers(model, "Name three ships.", policy="fp16")[0] + "\n")


@pytest.mark.slow
def test_a_chat_takes_up_a_document_and_goes_back_to_it(bundle, model, lease, path):
    assert kvq("prefill", str(lease), "-o", str(path), "-m", str(bundle), "-q", "--as", "user").returncode == 0
    chat = ["chat", "-m", str(bundle), "-n", "12", "-t", "0", "--ignore-eos"]
    done = kvq(*chat, input=f"/load {path}\nWhen?\n/undo\nHow much?\n/undo\n/undo\n")
    texts = [answers(model, text, document=LEASE.rstrip("\n"))[0] for text in ("When?", "How much?")]
    assert done.stdout == "".join(text + "\n" for text in texts)
    assert done.returncode == 1  # at the third /undo: the document is not taken back
    told = done.stderr.splitlines()
    assert told[0].startswith("0 turns and a document, ")
    assert told[2].startswith("0 turns and a document, ")
    assert "nothing to undo" in told[-1]


@pytest.mark.slow
def test_plain_text_stays_plain_text(bundle, model, lease, path):
    done = kvq("prefill", str(lease), "-o", str(path), "-m", str(bundle), "--raw")
    assert "plain text, read in " in done.stderr
    session = model.session()
    session.append(model.encode(LEASE.rstrip("\n")))
    expected = "".join(r.text for r in session.generate(" So", **GREEDY))
    done = run(bundle, "--session", str(path), "--session-readonly", " So")
    assert (done.returncode, done.stdout) == (0, expected + "\n")
    assert done.stderr.splitlines()[0].endswith("; plain text, no conversation")
    assert found(run(bundle, "--session", str(path), "--json", " So"))["template"] is False
    assert_one_line_error(kvq("chat", "-m", str(bundle), "--session", str(path), "Hello"), "no conversation")


@pytest.mark.slow
def test_a_session_of_before_conversations_were_kept_is_plain_text(bundle, model, path):
    session = model.session()
    session.append(model.encode("Once upon a time"))
    assert not session.metadata
    session.save(path)
    expected = "".join(r.text for r in session.generate(" there", **GREEDY))
    assert run(bundle, "-q", "--session", str(path), "--session-readonly", " there").stdout == expected + "\n"


@pytest.mark.slow
def test_a_chat_goes_on_with_kvq_run(bundle, model, path):
    session = ["--session", str(path)]
    expected = answers(model, "Hello", "Why?", "And?")
    chat = ["chat", "-q", "-m", str(bundle), "-n", "12", "-t", "0", "--ignore-eos", *session]
    texts = [kvq(*chat, "Hello").stdout, run(bundle, "-q", *session, "Why?").stdout, kvq(*chat, "And?").stdout]
    assert texts == [text + "\n" for text in expected]
    assert_one_line_error(run(bundle, *session, "--raw", "So"), "the session holds a conversation", "leave --raw out")
    assert_one_line_error(run(bundle, *session, "--system", "Be brief.", "So"), "leave system out")


@pytest.mark.slow
def test_a_transcript_of_a_model_without_a_template_goes_on_too(tiny_bundle, tiny_model, path):
    session = ["--session", str(path)]
    expected = answers(tiny_model, "Hello", "Why?")
    kvq("chat", "-q", "-m", str(tiny_bundle), "-n", "12", "-t", "0", "--ignore-eos", *session, "Hello")
    assert run(tiny_bundle, "-q", *session, "Why?").stdout == expected[1] + "\n"


@pytest.mark.slow
def test_a_cut_answer_goes_on_without_a_prompt_and_a_finished_one_does_not(bundle, model, path):
    session = ["--session", str(path)]
    whole = "".join(r.text for r in Conversation(model.session()).reply("Hello", **GREEDY))
    parts = [run(bundle, "-q", *session, "-n", count, *asked) for count, asked in (("5", ["Hello"]), ("7", []))]
    assert "".join(part.stdout.removesuffix("\n") for part in parts).strip() == whole.strip()
    end = ["--stop-token", str(first_token(model, question="Hello"))]
    path.unlink()
    run(bundle, *session, *end, "Hello")
    held = path.read_bytes()
    assert_one_line_error(run(bundle, "-q", *session), "the last reply has come to its end", "ask the next question")
    assert path.read_bytes() == held


@pytest.mark.slow
def test_a_document_beyond_the_context_leaves_no_file(bundle, tmp_path, path):
    (tmp_path / "long.txt").write_text("word " * 300)
    done = kvq("prefill", str(tmp_path / "long.txt"), "-o", str(path), "-m", str(bundle), "-q")
    assert_one_line_error(done, "context of 256 tokens is full", "the document takes")
    assert not path.exists()


def interrupted(when: str, *arguments: str) -> subprocess.CompletedProcess:
    """kvq run with a Ctrl-C in the middle of the steps for which `when` holds."""
    code = (
        "import sys, os, signal\nfrom kvq.runtime.session.session import Session\nstep, steps = Session.step, []\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def interrupting(self, ids, *rest):\n"
        "    step(self, ids, *rest)\n    steps.append(len(ids))\n"
        f"    if {when}: os.kill(os.getpid(), signal.SIGINT)\n"
        "Session.step = interrupting\nfrom kvq.runtime.cli.main import main\nmain()\n"
    )
    return command([sys.executable, "-c", code, "run", "-t", "0", "--ignore-eos", *arguments])


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_said_of_an_answer_and_it_goes_on(bundle, model, path):
    options = ["-m", str(bundle), "--session", str(path)]
    done = interrupted("steps[-3:] == [1, 1, 1]", *options, "-n", "12", "Hello")
    assert done.returncode == 130
    assert "interrupted after " in done.stderr
    assert "Traceback" not in done.stderr
    rest = run(bundle, "-q", *options[2:], "-n", "8")
    whole = "".join(r.text for r in Conversation(model.session()).reply("Hello", **GREEDY))
    assert whole.strip().startswith((done.stdout.removesuffix("\n") + rest.stdout.removesuffix("\n")).strip())
    assert run(bundle, "-q", *options[2:], "Why?").returncode == 0


@pytest.mark.parametrize("session", [True, False])
def test_ctrl_c_while_a_question_is_read_leaves_nothing(bundle, path, session):
    options = ["--session", str(path)] if session else []
    done = interrupted("len(ids) > 1", "-m", str(bundle), *options, "Hello there")
    assert (done.returncode, done.stdout, done.stderr.replace(f"new session {path}", "").strip()) == (130, "", "")
    assert not path.exists()
