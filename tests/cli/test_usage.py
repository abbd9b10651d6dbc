"""Wrong usage and wrong values on the command line: one line each, which says where the value came from."""

from __future__ import annotations

import os

import pytest

from kvq.runtime.cli.main import guarded
from kvq.runtime.errors import MemoryShortageError
from tests.tools.command_line import GENERATED, assert_one_line_error, kvq, run


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run", "--no-such-option", "Hello"], "(see kvq run --help)"),
        (["run", "-n", "many", "Hello"], "'-n' / '--max-tokens': 'many' is not a valid integer (see kvq run --help)"),
        (["run", "Hello", "world"], "unexpected extra argument (world) (see kvq run --help)"),
        (["no-such-command"], "No such command 'no-such-command' (see kvq --help)"),
        (["serv", "-m", "x"], "No such command 'serv'; did you mean serve? (see kvq --help)"),
        (["infos"], "No such command 'infos'; did you mean info? (see kvq --help)"),
        (["export"], "Missing argument 'CHECKPOINT' (see kvq export --help)"),
        (["eval", "pareto", "--no-such-option"], "(see kvq eval pareto --help)"),
        (["run", "--raw", "--system", "x", "y"], "--raw and --system exclude each other"),
        (["serve", "--api-key", " "], "the API key must be printable ASCII"),
        (["inspect", "--html", "missing/x.html", "x"], "'--html': there is no folder missing; make it first"),
        (["export", "checkpoint", "missing/bundle"], "'OUT': there is no folder missing; make it first"),
        (["prefill", "-o", "missing/x.kvq", "-"], "'--out': there is no folder missing; make it first"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_that_says_where_to_look(arguments, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(kvq(*arguments), line, code=2, who="Error")


@pytest.mark.parametrize(
    ("arguments", "env", "source"),
    [
        (["-p", "int4"], {"KVQ_KV_BITS": "4"}, "(from the environment: KVQ_KV_BITS=4)"),
        ([], {"KVQ_KV_BITS": "4", "KVQ_POLICY": "int4"}, "(from the environment: KVQ_POLICY=int4, KVQ_KV_BITS=4)"),
        ([], {"KVQ_POLICY": "int5"}, "(from the environment: KVQ_POLICY=int5)"),
        ([], {"KVQ_TEMPERATURE": "-1"}, "(from the environment: KVQ_TEMPERATURE=-1)"),
        ([], {"KVQ_BACKEND": "abacus"}, "(from the environment: KVQ_BACKEND=abacus)"),
        (["-p", "rule"], {"KVQ_KV_MEMORY": "much"}, "write for example 800kB or 32MB (from KVQ_KV_MEMORY)"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_had_names_the_variable_it_came_from(tiny_bundle, arguments, env, source):
    for command in ("run", "chat"):
        done = kvq(command, "-m", str(tiny_bundle), *arguments, "Hello", env=env)
        assert_one_line_error(done, source, code=2)


def test_a_variable_that_a_flag_beats_is_not_blamed(tiny_bundle):
    done = run(tiny_bundle, "-p", "int4", "--kv-bits", "4", "Hello", env={"KVQ_KV_BITS": "3", "KVQ_SEED": "1"})
    assert_one_line_error(done, "cannot follow a budget", code=2)
    assert "KVQ_" not in done.stderr


@pytest.mark.slow
def test_more_recent_or_sink_tokens_than_the_context_holds_are_told(tiny_bundle, tmp_path):
    for name in ("recent", "sink"):
        told = f"kvq: {name} 100000 is more than the context of 256 tokens: all stay at 16 bits\n"
        done = run(tiny_bundle, f"--{name}", "100000", "Hello")
        assert (done.returncode, done.stderr.count(told)) == (0, 1)
        assert run(tiny_bundle, "-q", f"--{name}", "100000", "Hello").stderr == ""
        assert told not in run(tiny_bundle, f"--{name}", "256", "Hello").stderr
    session = ["--session", str(tmp_path / "a.kvq"), "--recent", "100000", "-p", "int4"]
    assert run(tiny_bundle, *session, "Hello").returncode == 0
    assert run(tiny_bundle, *session, "there").returncode == 0  # what the file holds is what the option comes to


def test_a_folder_that_is_missing_is_told_before_a_text_is_read(tiny_bundle, tmp_path):
    (tmp_path / "text.txt").write_text("word " * 100)
    out = tmp_path / "missing" / "x.kvq"
    done = kvq("prefill", str(tmp_path / "text.txt"), "-o", str(out), "-m", str(tiny_bundle))
    assert_one_line_error(done, f"there is no folder {out.parent}", code=2, who="Error")
    assert_one_line_error(kvq("run", *GENERATED, "--session", str(out), "x"), f"there is no folder {out.parent}")


@pytest.mark.parametrize("error", [MemoryError(), MemoryShortageError("head.onnx: not enough memory; free some")])
def test_too_little_memory_is_one_line(error, capsys):
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        guarded(fail)
    assert caught.value.code == 1
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert "not enough memory" in told


ENDLESS = [
    ("prefill", "/dev/zero", "-o", "z.kvq", "--raw", "-q"), ("run", "-f", "/dev/zero"), ("inspect", "-f", "/dev/zero"),
    ("run", "--grammar", "/dev/zero", "Hi"), ("run", "--schema", "/dev/zero", "Hi"), ("chat", "--tools", "/dev/zero"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no /dev/zero here")
@pytest.mark.parametrize("arguments", ENDLESS, ids=" ".join)
def test_a_file_without_end_is_refused(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = kvq(*arguments, "-m", "kvq-books")
    assert_one_line_error(done, "/dev/zero", "more than 64 MB", code=done.returncode)
    assert done.returncode in (1, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--session-disk", "9" * 400], "more than any machine has"),
        (["serve", "--max-body", "9" * 400 + "GB"], "more than any machine has"),
        (["run", "--kv-memory", "9" * 400, "Hi"], "more than any machine has"),
        (["run", "-m", "kvq-books", "--draft", "9" * 5000, "Hi"], "draft must be"),
        (["rm", "loop", "--yes"], "no model 'loop'"),
    ],
    ids=lambda value: value[0] + value[1][:15] if isinstance(value, list) else "",
)
def test_numbers_beyond_all_and_names_of_nothing_are_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    done = kvq(*arguments)
    assert_one_line_error(done, words, code=done.returncode, who=done.stderr.split(":")[0])


def test_a_file_to_write_needs_a_name(tmp_path):
    done = kvq("inspect", "-m", "kvq-books", "Hi", "--html", "")
    assert_one_line_error(done, "--html", "the name of a file is missing", code=2, who="Error")
