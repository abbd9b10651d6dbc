"""Exports that are killed: no hidden folder stays longer than until the next one, and no bundle is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvq.composition import open_bundle
from kvq.exporter.export import export
from kvq.exporter.folder import WRITING, replaced_folder
from kvq.runtime.errors import CheckpointError
from tests.tools.signals import interruptible

pytestmark = pytest.mark.skipif(os.name == "nt", reason="what a killed process leaves stays there on Windows")
STEPS = ("writing segments", "calibrating keys", "digests", "done")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# An export that stops at a step, told by a line, until it is killed.
STOP = """
import sys, time
from kvq.exporter.export import export
def stop(done, total, what):
    if what == sys.argv[3]:
        print("there", flush=True)
        time.sleep(60)
export(sys.argv[1], sys.argv[2], weights="fp32", overwrite=True, progress=stop)
"""


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def stopped(checkpoint: Path, out: Path, step: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STOP, str(checkpoint), str(out), step],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_what_a_killed_export_leaves_goes_with_the_next_one(step: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    process = stopped(tiny_checkpoint, out, step)
    assert len(hidden(tmp_path)) == 1  # while it lives
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    assert len(hidden(tmp_path)) == 1
    export(str(tiny_checkpoint), out, weights="fp32")
    assert hidden(tmp_path) == []
    assert open_bundle(out).architecture.layers == 3


@pytest.mark.slow
def test_an_export_that_still_runs_keeps_its_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    process = stopped(tiny_checkpoint, out, "digests")
    try:
        running = hidden(tmp_path)
        export(str(tiny_checkpoint), out, weights="fp32")
        assert hidden(tmp_path) == running
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("sign", SIGNALS)
def test_a_signal_leaves_nothing_but_what_the_next_export_removes(
    sign: signal.Signals, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    process = stopped(tiny_checkpoint, tmp_path / "bundle", "writing segments")
    process.send_signal(sign)
    process.communicate()
    export(str(tiny_checkpoint), tmp_path / "bundle", weights="fp32")
    assert hidden(tmp_path) == []


def test_a_bundle_that_was_set_aside_when_the_process_died_comes_back(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    aside = tmp_path / f".bundle{WRITING}abcdefgh"
    shutil.copytree(tiny_bundle, aside / "replaced")
    with pytest.raises(CheckpointError, match="exists already"), replaced_folder(out, overwrite=False):
        pass
    assert hidden(tmp_path) == []
    assert json.loads((out / "kvq.json").read_text())["format"] == "kvq-bundle"


@pytest.mark.parametrize(
    "name",
    [".bundle", ".bundle.abcdefgh", f".bundle{WRITING}abc", f".bundle{WRITING}ABCDEFGH", f".other{WRITING}abcdefgh"],
)
def test_folders_of_others_stay(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("x")
    with replaced_folder(tmp_path / "bundle", overwrite=False) as folder:
        (folder / "new").write_text("y")
    assert (tmp_path / name / "mine").read_text() == "x"
    assert (tmp_path / "bundle" / "new").read_text() == "y"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("x")
    (tmp_path / f".bundle{WRITING}abcdefgh").symlink_to(elsewhere)
    with replaced_folder(tmp_path / "bundle", overwrite=False):
        pass
    assert (elsewhere / "mine").exists()


def test_a_failed_replacement_leaves_the_old_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with pytest.raises(RuntimeError), replaced_folder(out, overwrite=True):
        raise RuntimeError
    assert hidden(tmp_path) == []
    assert open_bundle(out).architecture.layers == 3


def test_a_name_that_no_terminal_should_show_is_written_so_that_it_can_be_read(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = export(
        str(tiny_checkpoint), tmp_path / "b", weights="fp32", center=False, name="a\x1b[2J\n" + "x" * 999
    ).path
    assert open_bundle(path).bundle.manifest.name == ("a?[2J?" + "x" * 999)[:256]


def test_a_draft_beside_what_was_left_goes_too(tmp_path: Path) -> None:
    for name in (f".bundle{WRITING}abcdefgh", f".bundle{WRITING}abcdefgh_draft01"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.bin").write_text("x")
    with replaced_folder(tmp_path / "bundle", overwrite=False):
        pass
    assert hidden(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="no such permissions there")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_folder_has_the_permissions_that_its_user_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        with replaced_folder(tmp_path / "bundle", overwrite=False) as folder:
            (folder / "file").write_text("")
    finally:
        os.umask(before)
    assert (tmp_path / "bundle").stat().st_mode & 0o777 == 0o777 & ~umask
    assert [path.name for path in (tmp_path / "bundle").iterdir()] == ["file"]
