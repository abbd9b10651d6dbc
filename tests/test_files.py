"""Atomic files: the old one or the new one, whatever happens to the writer, and no litter."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvq.runtime import files
from kvq.runtime.files import atomic_file, try_lock, write_atomically
from tests.tools.tree import ROOT


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_name_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "a.bin"
    with atomic_file(path) as file:
        file.write(b"new")
        assert names(tmp_path) == [".a.bin.tmp"]
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.bin"
    write_atomically(path, "old")

    def fail():
        with atomic_file(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.bin"]


def interrupted(path, event):
    """Writes the file and is interrupted before the event-th line of what writes it; whether it came that far."""
    left = event

    def trace(frame, kind, _argument):
        nonlocal left
        if frame.f_code.co_filename != files.__file__:
            return None
        left -= kind == "line"
        if kind == "line" and left == 0:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with atomic_file(path) as file:
            file.write(b"new")
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_at_any_line_leaves_a_whole_file_and_nothing_locked(tmp_path):
    path, event = tmp_path / "a.bin", 1
    write_atomically(path, b"old")
    while interrupted(path, event):
        assert path.read_bytes() in (b"old", b"new")
        again = try_lock(tmp_path / ".a.bin.tmp")
        assert again is not None, f"locked for ever by an interrupt before line {event}"
        again.close()
        write_atomically(path, b"old")
        assert names(tmp_path) == ["a.bin"]
        event += 1
    assert event > 20
    assert path.read_bytes() == b"new"


def test_what_a_killed_writer_left_is_taken_over(tmp_path):
    (tmp_path / ".a.bin.tmp").write_bytes(b"a long rest of something else")
    write_atomically(tmp_path / "a.bin", b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".a.bin.tmp").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"a\.bin\.tmp"):
        write_atomically(tmp_path / "a.bin", b"new")
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_folder_of_that_name_stays(tmp_path):
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(OSError, match=r"a\.bin"):
        write_atomically(tmp_path / "a.bin", b"new")
    assert names(tmp_path) == ["a.bin"]


def test_permissions_follow_the_umask_or_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    before = os.umask(0o027)
    try:
        write_atomically(path, b"new")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o600)
    write_atomically(path, b"newer")
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.name == "nt", reason="no such permissions there")
def test_a_private_file_is_never_open_to_others(tmp_path):
    path, left = tmp_path / "a.bin", tmp_path / ".a.bin.tmp"
    left.write_bytes(b"of a killed writer")
    left.chmod(0o644)
    before = os.umask(0)
    try:
        with atomic_file(path, private=True) as file:
            assert left.stat().st_mode & 0o777 == 0o600
            file.write(b"new")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)  # its user's wish
    with atomic_file(path, private=True) as file:
        file.write(b"newer")
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_session_is_its_users_alone(tiny_model, tmp_path):
    session = tiny_model.session()
    session.append([1, 2])
    session.save(tmp_path / "text.kvq")
    assert os.name == "nt" or (tmp_path / "text.kvq").stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_writers_of_one_file_never_mix(tmp_path):
    path = tmp_path / "a.bin"
    start = threading.Barrier(6)

    def work(index):
        start.wait()
        for _ in range(20):
            with atomic_file(path) as file:
                for _ in range(50):
                    file.write(bytes([index]) * 1000)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            data = path.read_bytes()
            assert len(data) == 50_000
            assert len(set(data)) == 1
    assert names(tmp_path) == ["a.bin"]


# Forks a child that saves two sessions in turn, kills it after a random time, and looks at what it left. One process
# loads the model once for all kills: a process each would leave time for a dozen.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import kvq

folder, bundle, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
model = kvq.load(bundle)
contents, sessions = [], []
for length in (40, 230):
    session = model.session("mixed")
    session.append(list(range(1, length)))
    session.metadata = {"pad": "x" * 40_000 * len(contents)}
    session.save(folder / "one.kvq")
    contents.append((folder / "one.kvq").read_bytes())
    sessions.append(session)
rng, kills, seen, cut = random.Random(0), 0, [0, 0], 0
end = time.monotonic() + seconds
while time.monotonic() < end or not (all(seen) and cut):
    child = os.fork()
    if child == 0:
        while True:
            sessions.reverse()
            sessions[kills % 2].save(folder / "one.kvq")
    time.sleep(rng.random() * rng.choice([0.02, 0.1]))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    seen[contents.index((folder / "one.kvq").read_bytes())] += 1  # raises for anything else
    found = {path.name for path in folder.iterdir()}
    assert found <= {"one.kvq", ".one.kvq.tmp"}, found
    cut += ".one.kvq.tmp" in found
assert model.load_session(folder / "one.kvq").tokens in [session.tokens for session in sessions]
sessions[0].save(folder / "one.kvq")
assert [path.name for path in folder.iterdir()] == ["one.kvq"]
print(kills, *seen, cut)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_save_killed_at_any_moment_leaves_the_old_or_the_new_session(tiny_bundle, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", KILLER, str(tmp_path), str(tiny_bundle), "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kills, first, second, cut = map(int, done.stdout.split())
    assert first + second == kills
    assert 0 < cut < kills


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_bytes)
        write_atomically(pipe, "whole")
        assert read.result(timeout=20) == b"whole"
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_device_is_written_to_and_stays_one(tmp_path):
    """A node of our own: a test that fails must not cost the system its own."""
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.stat(os.devnull).st_rdev)
        device.write_bytes(b"x")
    except (OSError, AttributeError):
        pytest.skip("no device can be made here")
    write_atomically(device, "gone")
    with atomic_file(device, private=True) as file:
        file.write(b"gone")
    assert stat.S_ISCHR(device.stat().st_mode)


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="no /dev/fd here")
def test_an_open_file_is_written_to_and_stays_the_same_file(tmp_path):
    with open(tmp_path / "out", "w+b") as file:
        write_atomically(f"/dev/fd/{file.fileno()}", "one ")
        write_atomically(f"/dev/fd/{file.fileno()}", "two")
        assert file.read() == b"one two"
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(tmp_path / "out"))


@pytest.mark.parametrize("there", [True, False])
def test_of_a_link_the_file_is_written_that_it_leads_to(there, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "target"
    if there:
        target.write_text("before")
    (tmp_path / "link").symlink_to(Path("elsewhere") / "target")
    write_atomically(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert target.read_text() == "after"
    assert not target.is_symlink()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["target"]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["link"]


def test_reading_takes_the_memory_of_what_there_is(tmp_path):
    (tmp_path / "small").write_bytes(b"a" * 3000)
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(1 << 41)
    tracemalloc.start()
    try:
        assert files.read_bounded(tmp_path / "small", 1 << 40) == b"a" * 3000
        with pytest.raises(OSError, match="it has more than 1048576 MB"):
            files.read_bounded(tmp_path / "hole", 1 << 40)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device here")
@pytest.mark.parametrize("most", [0, 1, 4096, (3 << 20) + 5])
def test_reading_ends_at_the_bound(most, tmp_path):
    (tmp_path / "whole").write_bytes(b"a" * most)
    assert files.read_bounded(tmp_path / "whole", most) == b"a" * most
    (tmp_path / "whole").write_bytes(b"a" * (most + 1))
    for path in (tmp_path / "whole", "/dev/zero"):
        with pytest.raises(OSError, match="it has more than"):
            files.read_bounded(path, most)
