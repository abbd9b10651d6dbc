"""Writers killed at every step that they take: ``python -m tests.tools.kills`` records how many, for docs/security.md.

A writer runs in a child process, which ends itself with SIGKILL before the nth thing that it does to a file: opening,
renaming, removing, making a folder, changing rights, synchronising. n goes from 1 until the writer comes to its end.
After each kill somebody else looks at what is there, writes once more and looks again.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.tools.tree import ROOT

FILE = ROOT / "tests" / "fuzz" / "kills.json"
STEPS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}
TIMEOUT_S = 60
MOST = 2000  # steps of a writer


@dataclass(frozen=True)
class Writer:
    """What is killed.

    Attributes:
        what: it writes.
        begin: makes what was there before, in an empty folder.
        write: writes what comes after.
        look: what is there: "old", "new", or what is wrong with it.
        found: what may be there after a kill, besides "old" and "new".
    """

    what: str
    begin: Callable[[Path], None]
    write: Callable[[Path], None]
    look: Callable[[Path], str]
    found: tuple[str, ...] = ()


@dataclass
class Kills:
    """How often a writer was killed, and after how many kills which of the two was there."""

    what: str
    kills: int = 0
    old: int = 0
    new: int = 0


def killed(writer: Writer) -> Kills:
    """Kill a writer at every step.

    Raises:
        AssertionError: after a kill neither the old nor the new is there, or the next write does not go through.
    """
    found = Kills(writer.what)
    for number in itertools.count(1):
        assert number < MOST, writer.what
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            writer.begin(folder)
            assert writer.look(folder) == "old", writer.what
            if not _dies(writer, folder, number):
                assert writer.look(folder) == "new", writer.what
                return found
            there = writer.look(folder)
            assert there in ("old", "new"), f"{writer.what}, killed at step {number}: {there}"
            found.kills += 1
            found.old += there == "old"
            found.new += there == "new"
            writer.write(folder)
            assert writer.look(folder) == "new", f"{writer.what}, written again after a kill at step {number}"
            assert not left(folder), f"{writer.what}, killed at step {number}, leaves {left(folder)}"
    raise AssertionError("not reached")


def left(folder: Path) -> list[str]:
    """Hidden files and folders, which are nobody's once a writer has come to its end."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*")]


def _dies(writer: Writer, folder: Path, number: int) -> bool:
    """Write in a child that ends itself before a step; whether it did."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, -signal.SIGKILL), f"{writer.what} ends with {code} at step {number}"
        return code != 0
    try:
        signal.alarm(TIMEOUT_S)
        left_over = number
        home = os.path.realpath(folder)

        def step() -> None:
            nonlocal left_over
            left_over -= 1
            if not left_over:
                os.kill(os.getpid(), signal.SIGKILL)

        def heard(event: str, arguments: tuple[object, ...]) -> None:
            if event in STEPS and any(
                isinstance(each, str) and each.startswith(home) for each in map(_text, arguments)
            ):
                step()

        sync = os.fsync

        def synchronised(descriptor: int) -> None:
            step()
            sync(descriptor)

        os.fsync = synchronised  # type: ignore[assignment]
        sys.addaudithook(heard)
        writer.write(folder)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def _text(value: object) -> object:
    return os.fsdecode(value) if isinstance(value, str | bytes | os.PathLike) else value


# -- writers --------------------------------------------------------------------------------------------


def session() -> Writer:
    """`Session.save` over an older file."""
    import kvq

    model = kvq.load("kvq-books")
    sessions = []
    for count in (20, 60):
        sessions.append(model.session("k8v4"))
        sessions[-1].append(list(range(1, count)))
    old, new = sessions

    def look(folder: Path) -> str:
        return {19: "old", 59: "new"}.get(len(model.load_session(folder / "text.kvq").tokens), "another")

    return Writer("save of a session over an older file", lambda folder: old.save(folder / "text.kvq"),
                  lambda folder: new.save(folder / "text.kvq"), look)  # fmt: skip


def history() -> Writer:
    """A chat's history that has become too long."""
    from kvq.runtime.cli.keyboard import MOST_CHARACTERS, MOST_LINES, History

    entries = [f"{number} " + "x" * (MOST_CHARACTERS // 2) for number in range(MOST_LINES + 10)]

    def begin(folder: Path) -> None:
        (folder / "history").write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    def look(folder: Path) -> str:
        found = History(folder / "history").entries()
        kept = [entry for entry in found if entry != "newest"]
        if kept != entries[-len(kept) :] or len(kept) < MOST_LINES // 2 - 1:
            return f"{len(found)} entries"
        return "new" if found[-1] == "newest" else "old"

    return Writer("history of a chat, made shorter", begin, lambda folder: History(folder / "history").add("newest"),
                  look)  # fmt: skip


def choices() -> Writer:
    """The user's names of models."""
    from kvq.runtime.catalog.choices import changed, choices

    def write(folder: Path, name: str) -> None:
        os.environ["KVQ_HOME"] = str(folder)
        with changed() as chosen:
            chosen.names[name] = "/models/" + name

    def look(folder: Path) -> str:
        os.environ["KVQ_HOME"] = str(folder)
        found = choices()
        return found.damage or {("a",): "old", ("a", "b"): "new"}.get(tuple(found.names), str(found.names))

    return Writer("names and default of models", lambda folder: write(folder, "a"), lambda folder: write(folder, "b"),
                  look)  # fmt: skip


def batch() -> Writer:
    """Answers of a batch, appended."""
    from kvq.runtime.server.batchfiles import MARK, Answers, Requests

    def answers(folder: Path) -> tuple[Requests, Answers]:
        (folder / "in.jsonl").write_text('{"custom_id": "a"}\n{"custom_id": "b"}\n')
        requests = Requests(folder / "in.jsonl")
        return requests, Answers(folder / "out.jsonl", requests)

    def write(folder: Path, name: str) -> None:
        requests, found = answers(folder)
        if name not in found.marks:
            found.append({"id": MARK + name, "custom_id": name})
        found.close()
        requests.close()

    def look(folder: Path) -> str:
        requests, found = answers(folder)
        found.close()
        requests.close()
        return {("a",): "old", ("a", "b"): "new"}.get(tuple(found.marks), str(found.marks))

    return Writer("answer of a batch", lambda folder: write(folder, "a"), lambda folder: write(folder, "b"), look)


def _bundle(folder: Path) -> str:
    """Which of the two bundles stands there, by a file that only one of them has."""
    from kvq.runtime.bundle.bundle import Bundle

    return "new" if Bundle(folder).manifest.name == "new" else "old"


def _named(folder: Path, name: str) -> Path:
    """The embedded bundle under another name, whole."""
    from kvq.runtime.bundle.manifest import MANIFEST

    shutil.copytree(ROOT / "models" / "bundles" / "kvq-books", folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"name": name}))
    return folder


def install() -> Writer:
    """A model that is fetched again, in the place of an older one."""
    from kvq.runtime.catalog.home import claimed, models, sweep
    from kvq.runtime.catalog.pull import Job, pull

    sources = Path(tempfile.mkdtemp())
    old, new = _named(sources / "old", "old"), _named(sources / "new", "new")

    def write(folder: Path, source: Path) -> None:
        os.environ["KVQ_HOME"] = str(folder)
        pull(Job("owner/model", None, offline=True), source, again=True)

    def look(folder: Path) -> str:
        os.environ["KVQ_HOME"] = str(folder)
        target = models() / "owner" / "model"
        if not target.exists():  # between two renames: whoever wants it next puts it back
            with claimed(target):
                sweep(target)
        return _bundle(target)

    return Writer("install of a model over an older one", lambda folder: write(folder, old),
                  lambda folder: write(folder, new), look)  # fmt: skip


def export() -> Writer:
    """The folder of an export, or of a bundle that gets a controller, in the place of an older one."""
    from kvq.exporter.folder import _remove_leftovers, replaced_folder

    sources = Path(tempfile.mkdtemp())
    old, new = _named(sources / "old", "old"), _named(sources / "new", "new")

    def write(folder: Path, source: Path) -> None:
        with replaced_folder(folder / "bundle", True) as made:
            for path in source.iterdir():
                shutil.copyfile(path, made / path.name)

    def look(folder: Path) -> str:
        if not (folder / "bundle").exists():  # between two renames: the next export puts it back
            _remove_leftovers(folder / "bundle")
        return _bundle(folder / "bundle")

    return Writer("export of a bundle, or a controller put into one", lambda folder: write(folder, old),
                  lambda folder: write(folder, new), look)  # fmt: skip


def checkpoint() -> Writer:
    """State of a training run."""
    from kvq.runtime.files import atomic_file

    def write(folder: Path, content: bytes) -> None:
        with atomic_file(folder / "checkpoint.pt") as file:
            for _ in range(8):
                file.write(content * 50_000)

    def look(folder: Path) -> str:
        found = (folder / "checkpoint.pt").read_bytes()
        return {b"o" * 400_000: "old", b"n" * 400_000: "new"}.get(found, f"{len(found)} bytes")

    return Writer("checkpoint of a training run", lambda folder: write(folder, b"o"),
                  lambda folder: write(folder, b"n"), look)  # fmt: skip


WRITERS: dict[str, Callable[[], Writer]] = {
    "session": session, "history": history, "choices": choices, "batch": batch, "install": install, "export": export,
    "checkpoint": checkpoint,
}  # fmt: skip


def recorded() -> list[Kills]:
    """What was recorded last."""
    return [Kills(**row) for row in json.loads(FILE.read_text(encoding="utf-8"))]


def main() -> None:
    """Kill the writers that are named, each in a process of its own, or all; then what is found is recorded."""
    if sys.argv[1:]:
        print(json.dumps(asdict(killed(WRITERS[sys.argv[1]]()))))
        return
    rows = [found_of(name) for name in WRITERS]
    FILE.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def found_of(name: str) -> dict[str, object]:
    """What killing a writer comes to, in a process that has no threads but its own."""
    import subprocess

    done = subprocess.run([sys.executable, "-m", "tests.tools.kills", name], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
