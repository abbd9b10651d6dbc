"""Bundles whose manifest or files are not as written: each is refused in one line that says what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import kvq
from kvq.runtime.bundle.manifest import MANIFEST, WEIGHTS
from tests.tools.bundles import SEGMENT, Damage, edit, refusal, relist
from tests.tools.checkpoints import TINY


def rename_entry(folder: Path, name: str, new: str) -> None:
    """List a file under another name, and name it so among the segments."""

    def change(data: dict[str, Any]) -> None:
        data["files"][new] = data["files"].pop(name)
        data["segments"] = [new if segment == name else segment for segment in data["segments"]]

    edit(folder, change)


def flip_byte(folder: Path, name: str, at: int) -> None:
    data = bytearray((folder / name).read_bytes())
    data[at] ^= 1
    (folder / name).write_bytes(data)


def cut(folder: Path, name: str, by: int) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-by])


def link(folder: Path, name: str) -> None:
    """Replace a file by a symbolic link to the very same content."""
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")


def replace_by_folder(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()


def damage_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    relist(folder, "tokenizer.json")


def sub(path: str, value: Any) -> Damage:
    """Set a field of kvq.json, given by keys joined with slashes."""
    *parents, last = path.split("/")

    def change(data: dict[str, Any]) -> None:
        for key in parents:
            data = data[key]
        data[last] = value

    return lambda folder: edit(folder, change)


DAMAGED: list[tuple[str, Damage, str]] = [
    ("no manifest", lambda f: (f / MANIFEST).unlink(), "holds no kvq.json"),
    ("manifest cut", lambda f: cut(f, MANIFEST, 40), "kvq.json is damaged"),
    ("manifest empty", lambda f: (f / MANIFEST).write_text(""), "kvq.json is damaged"),
    ("manifest not UTF-8", lambda f: (f / MANIFEST).write_bytes(b"\xff{}"), "kvq.json is not UTF-8"),
    ("manifest a list", lambda f: (f / MANIFEST).write_text("[]"), "kvq.json is damaged"),
    ("manifest nested too deep", lambda f: (f / MANIFEST).write_text("[" * 100_000), "kvq.json is damaged"),
    ("manifest too large", lambda f: (f / MANIFEST).write_text(" " * (1 << 20) + "{}"), "kvq.json is larger"),
    ("manifest a link", lambda f: link(f, MANIFEST), "holds no kvq.json"),
    ("other format", sub("format", "gguf"), "not of format 'kvq-bundle'"),
    ("later version", sub("format_version", 3), "format version 3 is not 2"),
    ("earlier version", sub("format_version", 1), "format version 1 is not 2"),
    ("no version", lambda f: edit(f, lambda d: d.pop("format_version")), "KeyError: 'format_version'"),
    ("no head", lambda f: edit(f, lambda d: d.pop("head")), "KeyError: 'head'"),
    ("no architecture", sub("architecture", None), "kvq.json is damaged"),
    ("file missing", lambda f: (f / SEGMENT).unlink(), "segment_001.onnx is missing"),
    ("weights missing", lambda f: (f / WEIGHTS).unlink(), "weights.bin is missing"),
    ("file cut", lambda f: cut(f, WEIGHTS, 1), "weights.bin has .* bytes, the manifest says"),
    ("byte flipped in weights", lambda f: flip_byte(f, WEIGHTS, 5000), "weights.bin has another sha256"),
    ("byte flipped in a graph", lambda f: flip_byte(f, SEGMENT, 100), "segment_001.onnx has another sha256"),
    ("file a link", lambda f: link(f, SEGMENT), "segment_001.onnx .*not a regular file"),
    ("file a folder", lambda f: replace_by_folder(f, SEGMENT), "segment_001.onnx .*not a regular file"),
    ("name with ..", lambda f: rename_entry(f, SEGMENT, "../segment"), "file name '../segment'"),
    ("name ..", lambda f: rename_entry(f, SEGMENT, ".."), "file name '..'"),
    ("absolute name", lambda f: rename_entry(f, SEGMENT, "/etc/passwd"), "file name '/etc/passwd'"),
    ("name with a slash", lambda f: rename_entry(f, SEGMENT, "a/b.onnx"), "file name 'a/b.onnx'"),
    ("name with a backslash", lambda f: rename_entry(f, SEGMENT, "a\\b.onnx"), "file name"),
    ("name with a line break", lambda f: rename_entry(f, SEGMENT, "a.onnx\n"), "file name"),
    ("empty name", lambda f: rename_entry(f, SEGMENT, ""), "file name ''"),
    ("segments too short", lambda f: edit(f, lambda d: d["segments"].pop()), "3 segments for 3 layers"),
    ("segments no list", sub("segments", None), "kvq.json is damaged"),
    ("segment not listed", sub("segments", ["a", "b", "c", "d"]), "a is not in the file list"),
    ("segment no text", sub("segments", [[], [], [], []]), "kvq.json is damaged"),
    ("weights not listed", lambda f: edit(f, lambda d: d["files"].pop(WEIGHTS)), "weights.bin is not in the file list"),
    ("head not listed", sub("head", "../head.onnx"), "../head.onnx is not in the file list"),
    ("heads not divisible", sub("architecture/kv_heads", 3), "heads 8, kv_heads 3"),
    ("head_dim no multiple of 8", sub("architecture/head_dim", 12), "head_dim 12"),
    ("no layers", sub("architecture/layers", 0), "layers is 0"),
    ("huge vocabulary", sub("architecture/vocab", 1 << 40), "vocab is"),
    ("layers as text", sub("architecture/layers", "3"), "layers is '3'"),
    ("end of text outside", sub("eos_token_ids", [512]), r"eos_token_ids \[512\]"),
    ("size as text", sub(f"files/{WEIGHTS}/nbytes", "1"), "entry of weights.bin"),
    ("no digest", sub(f"files/{WEIGHTS}", {"nbytes": 1}), "KeyError: 'sha256'"),
    ("files no object", sub("files", ["weights.bin"]), "kvq.json is damaged"),
    ("tokenizer damaged", damage_tokenizer, "tokenizer.json cannot be read"),
]  # fmt: skip


def test_the_undamaged_copy_loads(bundle: Path) -> None:
    assert kvq.load(bundle).session().append([1, 2, 3]).shape == (TINY["vocab_size"],)


@pytest.mark.parametrize(("damage", "words"), [pytest.param(*row[1:], id=row[0]) for row in DAMAGED])
def test_damaged_bundle_is_refused(damage: Damage, words: str, bundle: Path) -> None:
    damage(bundle)
    message = refusal(bundle)
    assert re.search(words, message), message


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "kvq export" in refusal(tmp_path / "nowhere")


def test_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("GGUF")
    assert "model.bin" in refusal(tmp_path / "model.bin")
