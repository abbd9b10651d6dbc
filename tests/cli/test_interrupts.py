"""Ctrl-C while modules are imported, or after the command has ended: exit code 130, and never a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kvq.runtime.cli.main import guarded

ROOT = Path(__file__).resolve().parents[2]
# Interrupts itself as soon as a module is looked for.
AT = """
import atexit, os, signal, sys

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

class At:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            sys.meta_path.remove(self)
            interrupt()

sys.meta_path.insert(0, At())
if {name!r} == "the end":
    atexit.register(interrupt)
sys.argv = ["kvq", *{arguments!r}]
from kvq.runtime.cli.entry import main
main()
"""


def interrupted(name: str, *arguments: str, **options) -> tuple[int, str]:
    """Exit code and stderr of a command that is interrupted there."""
    code = AT.format(name=name, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **options)
    return done.returncode, done.stderr.strip()  # click ends the line in which the terminal writes ^C


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("kvq.runtime.cli.main", ["--help"]),
        ("click", ["--help"]),
        ("kvq.runtime.errors", ["--help"]),
        ("kvq.runtime.machine.pipes", ["--help"]),
        ("kvq.runtime.cli.run", ["run", "--help"]),
        ("numpy", ["run", "hello"]),
        ("onnxruntime", ["run", "hello"]),
        ("the end", ["--help"]),
    ],
)
def test_an_interrupt_while_modules_are_imported_says_nothing(name, arguments):
    assert interrupted(name, *arguments) == (130, "")


def test_who_is_not_to_be_interrupted_goes_on():
    """As a shell starts what it puts in the background."""
    ignoring = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    assert interrupted("click", "--version", **ignoring) == (0, "")


def test_an_import_that_makes_another_error_of_it_was_interrupted(capsys):
    def importing() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:  # what Python says of a module in C
            raise ImportError("initialization failed") from error

    with pytest.raises(SystemExit) as ended:
        guarded(importing)
    assert ended.value.code == 130
    assert capsys.readouterr().err == ""


def test_an_import_that_fails_by_itself_is_not_hidden():
    def importing() -> None:
        raise ImportError("initialization failed")

    with pytest.raises(ImportError, match="initialization failed"):
        guarded(importing)


def test_the_commands_begin_there():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"kvq": "kvq.runtime.cli.entry:main", "kvq-run": "kvq.runtime.cli.entry:run_main"}
