"""The process that exports, or fetches: no code of the folder where the user stands; gone with whoever began it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kvq
from tests.tools.shelf import tree

ROOT = Path(kvq.__file__).parents[1]
NAMES = ("gguf", "onnx", "onnx_ir", "safetensors", "numpy", "click", "tokenizers", "json", "ast", "sitecustomize")
GONE_S = 2.0
# Stands for an export that takes long: found before the package of that name.
STUCK = """
import os, time
open({at!r}, "w").write(str(os.getpid()))
time.sleep(60)
"""


def environment(own: Path, *paths: Path) -> dict[str, str]:
    """Variables of a command that finds kvq wherever it stands."""
    return {**os.environ, "KVQ_HOME": str(own), "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT]))}


def name_it(checkpoint: Path, **options) -> subprocess.Popen[str]:
    """`kvq name CHECKPOINT small`, which exports it first; as the installed script does, it has no cwd on its path."""
    command = [sys.executable, "-P", "-m", "kvq", "name", str(checkpoint), "small"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **options)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked after does not."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.slow
def test_no_code_of_the_current_folder_is_run(tiny_checkpoint, tmp_path):
    here, ran = tmp_path / "downloads", tmp_path / "ran"
    (here / "kvq").mkdir(parents=True)
    for file in (*(f"{name}.py" for name in NAMES), "kvq/__init__.py", "kvq/__main__.py"):
        (here / file).write_text(f"open({str(ran)!r}, 'a').write({file!r})\nraise ImportError('not this one')\n")
    process = name_it(tiny_checkpoint, cwd=here, env=environment(tmp_path / "home"))
    _, said = process.communicate(timeout=120)
    assert not ran.exists(), ran.read_text()
    assert process.returncode == 0, said


def see_gone(parent: subprocess.Popen[str], at: Path, by: signal.Signals) -> None:
    """End a command by a signal once its child has written its number to `at`, and see that the child ends too."""
    while not (at.exists() and at.read_text()):
        assert parent.poll() is None, parent.communicate()[1]
        time.sleep(0.02)
    child = int(at.read_text())
    try:
        assert alive(child)
        parent.send_signal(by)
        assert parent.wait(10) == -by
        end = time.monotonic() + GONE_S
        while alive(child) and time.monotonic() < end:
            time.sleep(0.02)
        assert not alive(child)
    finally:
        if alive(child):
            os.kill(child, signal.SIGKILL)
        parent.communicate()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name)
def test_an_export_is_gone_with_its_parent_and_what_it_left_with_the_next_command(by, tiny_checkpoint, tmp_path):
    home, stuck, at = tmp_path / "home", tmp_path / "stuck", tmp_path / "pid"
    stuck.mkdir()
    (stuck / "safetensors.py").write_text(STUCK.format(at=str(at)))
    parent = name_it(tiny_checkpoint, env=environment(home, stuck))
    see_gone(parent, at, by)
    assert any(".partial-" in name for name in tree(home))
    again = name_it(tiny_checkpoint, env=environment(home))
    assert (again.communicate(timeout=120), again.returncode)[1] == 0
    assert not [name for name in tree(home) if name.rpartition("/")[2].startswith(".")]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
def test_a_pip_that_fetches_is_gone_with_its_killed_parent(shelf, tmp_path):
    slow, at = tmp_path / "slow", tmp_path / "pid"
    (slow / "pip").mkdir(parents=True)
    (slow / "pip" / "__init__.py").write_text("")
    (slow / "pip" / "__main__.py").write_text(STUCK.format(at=str(at)))
    command = [sys.executable, "-P", "-m", "kvq", "pull", "tiny-instruct"]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(tmp_path / "home", slow))
    see_gone(parent, at, signal.SIGKILL)
