"""The command line as users meet it: real processes, both output streams, exit codes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvq.runtime.policy.base import DEFAULT_POLICY
from tests.tools.command_line import GENERATED, HEAVY, LOADED, assert_one_line_error, command, kvq, python, run

# Beside the interpreter, wherever the environment is; not every installation has scripts.
SCRIPT = Path(sys.executable).parent / "kvq-run"


@pytest.fixture(scope="module")
def greedy(tiny_bundle):
    """A finished greedy run after "Hello"."""
    return run(tiny_bundle, "Hello")


@pytest.fixture(scope="module")
def expected_text(tiny_model):
    """The text the greedy run has to print, by the library."""
    responses = tiny_model.session().generate(
        "Hello", max_tokens=12, temperature=0, ignore_eos=True, top_k=40, top_p=0.95
    )
    return "".join(response.text for response in responses)


def test_text_goes_to_stdout_and_one_line_of_statistics_to_stderr(greedy, expected_text):
    assert greedy.returncode == 0
    assert greedy.stdout == expected_text + "\n"
    assert greedy.stderr.count("\n") == 1
    for part in ("length after 12 tokens", "tokens cached in", f"policy {DEFAULT_POLICY}", "ms/token", "attention"):
        assert part in greedy.stderr
        assert part not in greedy.stdout


@pytest.mark.slow
def test_the_kvq_run_script_is_the_same_command(tiny_bundle, greedy):
    if not SCRIPT.exists():
        pytest.skip(f"no {SCRIPT}")
    done = command([str(SCRIPT), "--model", str(tiny_bundle), *GENERATED, "Hello"])
    assert (done.returncode, done.stdout) == (0, greedy.stdout)
    error = command([str(SCRIPT), "--model", str(tiny_bundle), "-p", "nonsense", "Hello"])
    assert_one_line_error(error, "unknown policy 'nonsense'", code=2)


def test_quiet_leaves_stderr_empty(tiny_bundle, greedy):
    done = run(tiny_bundle, "--quiet", "Hello")
    assert (done.returncode, done.stdout, done.stderr) == (0, greedy.stdout, "")


@pytest.mark.slow
def test_json_is_one_object_on_one_line(tiny_bundle, expected_text):
    done = run(tiny_bundle, "--json", "-p", "mixed", "--recent", "4", "Hello")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert {"text", "tokens", "finish_reason", "stats", "prompt"} <= set(result)
    assert (result["tokens"], result["finish_reason"], result["prompt"]) == (12, "length", "Hello")
    assert isinstance(result["text"], str)
    stats = result["stats"]
    assert (stats["policy"], stats["recent"]) == ("mixed", 4)
    assert sum(row["nbytes"] for row in stats["precisions"].values()) == stats["kv_nbytes"]
    assert sum(row["tokens"] for row in stats["precisions"].values()) == stats["tokens"]
    same = json.loads(run(tiny_bundle, "--json", "Hello").stdout)
    assert same["text"] == expected_text


@pytest.mark.slow
def test_the_same_seed_gives_the_same_text(tiny_bundle):
    options = ["-q", "-t", "1.2", "-n", "20", "Hello"]
    texts = [run(tiny_bundle, *options, "--seed", seed).stdout for seed in ("7", "7", "8")]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.slow
def test_argument_file_and_stdin_are_the_same_prompt(tiny_bundle, tmp_path, greedy):
    file = tmp_path / "prompt.txt"
    file.write_text("Hello\n")
    for arguments, stdin in (
        (["-f", str(file)], ""),
        (["--file", "-"], "Hello\n"),
        ([], "Hello"),
        (["Hello"], ""),
    ):
        done = run(tiny_bundle, *arguments, input=stdin)
        assert (done.returncode, done.stdout) == (0, greedy.stdout), arguments


def test_a_file_goes_before_the_argument(tiny_bundle, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("One\n")
    assert json.loads(run(tiny_bundle, "--json", "-f", str(file), "two").stdout)["prompt"] == "One\ntwo"


def test_a_stop_string_ends_the_text(tiny_bundle, expected_text):
    stop = expected_text[4:6]
    done = run(tiny_bundle, "--stop", "\x01", "--stop", stop, "Hello")
    assert done.stdout == expected_text[: expected_text.index(stop)] + "\n"
    assert done.stderr.startswith("stop after ")


@pytest.fixture(scope="module")
def damaged_bundle(tiny_bundle, tmp_path_factory):
    """A copy of the bundle with one byte of its weights changed."""
    folder = tmp_path_factory.mktemp("damaged") / "bundle"
    shutil.copytree(tiny_bundle, folder)
    weights = bytearray((folder / "weights.bin").read_bytes())
    weights[100] ^= 1
    (folder / "weights.bin").write_bytes(weights)
    return folder


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (["Hello", "-m", "no-such-model"], "", ["no-such-model", "kvq export"]),
        (["Hello", "-m", "no/such/folder"], "", ["no/such/folder"]),
        ([""], "", ["the prompt is empty"]),
        ([" \n\t "], "", ["the prompt is empty"]),
        ([], "", ["the prompt is empty"]),
        ([], " \n\n", ["the prompt is empty"]),
        (["word " * 3000], "", ["do not fit", "context of 256"]),
        ([], "word " * 3000, ["do not fit", "context of 256"]),
        ([], b"caf\xe9", ["stdin is not UTF-8", "byte 3"]),
        ([b"caf\xe9"], "", ["UTF-8"]),
        (["-f", "latin1.txt"], "", ["latin1.txt is not UTF-8"]),
        (["-f", "missing.txt"], "", ["cannot read missing.txt"]),
        (["-f", "."], "", ["cannot read ."]),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_known_error_is_one_line_and_exit_code_1(tiny_bundle, tmp_path, monkeypatch, arguments, stdin, words):
    monkeypatch.chdir(tmp_path)
    Path("latin1.txt").write_bytes(b"caf\xe9")
    assert_one_line_error(run(tiny_bundle, *arguments, input=stdin), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["Hello", "-p", "int5"], ["unknown policy 'int5'", "fp16"]),
        (["Hello", "--recent=-1"], ["recent must be an integer of at least 0"]),
        (["Hello", "--temperature=-1"], ["temperature must be at least 0"]),
        (["Hello", "--temperature", "nan"], ["temperature"]),
        (["Hello", "--top-p", "0"], ["top_p must be above 0"]),
        (["Hello", "-n", "0"], ["max_tokens must be at least 1"]),
        (["Hello", "--seed=-1"], ["seed must not be negative"]),
        (["Hello", "--threads", "0"], ["threads must be at least 1"]),
        (["Hello", "--backend", "nonsense"], ["nonsense", "numpy"]),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_bad_option_value_is_one_line_and_exit_code_2(tiny_bundle, arguments, words):
    assert_one_line_error(run(tiny_bundle, *arguments), *words, code=2)


def test_a_damaged_bundle_is_one_line_and_exit_code_1(damaged_bundle):
    assert_one_line_error(run(damaged_bundle, "Hello"), "weights.bin", "sha256")


def test_an_unknown_backend_in_the_environment_is_one_line(tiny_bundle):
    assert_one_line_error(run(tiny_bundle, "Hello", env={"KVQ_BACKEND": "nonsense"}), "nonsense", "numpy", code=2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--no-such-option", "Hello"],
        ["run", "-n", "many", "Hello"],
        ["run", "-t", "warm", "Hello"],
        ["run", "Hello", "world"],
        ["no-such-command"],
        ["--no-such-option"],
        ["export"],
        ["export", "checkpoint", "out", "--weights", "int3"],
        ["export", "checkpoint", "out", "--layout", "single", "--weights", "int8"],
        [],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(arguments):
    done = kvq(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: " if arguments else "Usage:")
    assert done.stderr.count("\n") == 1 or not arguments
    assert "Traceback" not in done.stderr


def test_layout_single_names_the_option_it_does_not_take():
    done = kvq("export", "checkpoint", "out", "--layout", "single", "--weights", "int8")
    assert done.returncode == 2
    assert "--layout single takes no --weights" in done.stderr


def test_help_lists_the_commands_and_imports_no_model_code():
    done = kvq("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("run", "export", "train-model"):
        assert f"  {name} " in done.stdout
    out = python(f"import sys; sys.argv = ['kvq', '--help']\nfrom kvq.runtime.cli.main import main\nmain()\n{LOADED}")
    assert "Commands:" in out
    assert not {*HEAVY, "onnxruntime", "numpy", "tokenizers"} & set(out.splitlines()[-1].split())


@pytest.mark.parametrize("name", ["run", "export"])
def test_help_of_a_command_shows_options_with_defaults_and_imports_no_torch(name):
    out = python(
        f"import sys; sys.argv = ['kvq', {name!r}, '-h']\nfrom kvq.runtime.cli.main import main\nmain()\n{LOADED}"
    )
    assert "Examples:" in out
    assert "[default: " in out
    assert not {*HEAVY, "onnxruntime"} & set(out.splitlines()[-1].split())


def test_the_version_is_that_of_the_package():
    import kvq as package

    assert package.__version__ in kvq("--version").stdout


def test_importing_kvq_imports_next_to_nothing():
    loaded = set(python(f"import kvq; dir(kvq); {LOADED}").split())
    assert not {*HEAVY, "numpy", "onnxruntime", "tokenizers", "click"} & loaded
    assert "kvq" in loaded


def test_every_public_name_resolves_without_the_export_extra():
    code = f"import kvq; assert all(hasattr(kvq, name) for name in kvq.__all__); {LOADED}"
    assert not HEAVY & set(python(code).split())


def test_generating_never_imports_the_export_extra(tiny_bundle):
    code = (
        f"import kvq; session = kvq.load({str(tiny_bundle)!r}).session('rule')\n"
        f"list(session.generate('Hello', max_tokens=3)); session.stats().line(); {LOADED}"
    )
    loaded = set(python(code).split())
    assert not {*HEAVY, "jinja2", "readline"} & loaded
    assert "onnxruntime" in loaded


def long_run(**options) -> subprocess.Popen:
    """A generation of many seconds (the embedded model up to its context); unbuffered reading of what it prints."""
    arguments = [sys.executable, "-m", "kvq", "run", "-m", "kvq-books", "-n", "-1", "--ignore-eos", "-s", "1", "Hello"]
    # A child of a job in the background inherits that interrupts are ignored.
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, **options)


@pytest.mark.slow
def test_a_closed_pipe_ends_without_a_traceback():
    process = long_run()
    assert process.stdout.read(1)
    process.stdout.close()
    stderr = process.stderr.read().decode()
    process.stderr.close()
    # 141 as the docstring of `guarded` says; a shell reports death by SIGPIPE with the same number.
    assert process.wait(60) in (141, -signal.SIGPIPE)
    assert stderr == ""


def test_head_in_a_shell_pipe_leaves_stderr_clean(tiny_bundle):
    line = f'"{sys.executable}" -m kvq run -q -m "{tiny_bundle}" -n 200 --ignore-eos -s 1 Hello | head -c 1'
    done = command(["sh", "-c", line])
    assert len(done.stdout.encode()) == 1
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("closing", "code", "words"),
    [
        (">&-", 1, "kvq: stdout is closed"),
        ("2>&-", 0, ""),
        ("<&-", 0, "length after 12"),
        (">/dev/full", 1, "No space left"),
    ],
)
def test_closed_and_full_streams_end_without_a_traceback(tiny_bundle, closing, code, words):
    line = f'"{sys.executable}" -m kvq run -m "{tiny_bundle}" {" ".join(GENERATED)} Hello {closing}'
    done = command(["sh", "-c", line])
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert words in done.stderr


@pytest.mark.slow
def test_an_interrupt_keeps_the_text_so_far_and_exits_with_130():
    process = long_run()
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(first + rest) > 1
    assert rest.endswith(b"\n")
    assert b"Traceback" not in stderr
    text = (first + rest).decode()[:-1]
    again = kvq("run", "-q", "-n", "60", "--ignore-eos", "-s", "1", "Hello").stdout[:-1]
    assert text.startswith(again) or again.startswith(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "env",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["ascii", "C locale", "C locale without UTF-8 mode"],
)
@pytest.mark.parametrize("output", ["text", "json"])
def test_a_terminal_without_unicode_does_not_crash(tiny_bundle, env, output):
    # This seed's text goes beyond ASCII: random weights make many incomplete characters.
    arguments = ["-n", "40", "-t", "2", "-s", "3", *(["--json"] if output == "json" else [])]
    plain = run(tiny_bundle, *arguments, "Hello")
    assert not plain.stdout.isascii()
    done = run(tiny_bundle, *arguments, "Hello", env=env)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0
    if output == "text":
        assert len(done.stdout) == len(plain.stdout)  # replaced or not, no character is lost


def test_a_prompt_beyond_ascii_reaches_the_model_in_the_c_locale(tiny_bundle):
    prompt = "Ünïcödé 😀"
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run(tiny_bundle, "--json", prompt.encode(), env=env)
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["prompt"] == prompt


@pytest.mark.slow
def test_export_prints_the_summary_on_stdout_and_progress_on_stderr(tiny_checkpoint, tmp_path):
    out = tmp_path / "bundle"
    done = kvq("export", str(tiny_checkpoint), str(out), "--weights", "int4", "--no-center")
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    assert "MB in" in done.stdout
    assert "3 layers, 8/4 heads of 8, context 256" in done.stdout
    assert "%" not in done.stdout
    assert "Warning" not in done.stderr
    generated = run(out, "-q", "Hello")
    assert (generated.returncode, generated.stderr) == (0, "")


def test_exporting_what_is_no_checkpoint_is_a_one_line_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = kvq("export", str(tmp_path), str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("kvq: ")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
