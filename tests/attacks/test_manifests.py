"""Manifests with one thing wrong each: kvq.json of a bundle that is otherwise as it was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvq.composition import open_bundle
from kvq.runtime.bundle.manifest import MANIFEST, WEIGHTS
from tests.attacks.conftest import Attack, refused
from tests.tools.bundles import edit

HUGE = 10**400


def put(path: str, value: Any) -> Attack:
    """Set a field, given by its keys joined with slashes."""
    *parents, last = path.split("/")

    def change(data: dict[str, Any]) -> None:
        for key in parents:
            data = data[key]
        data[last] = value

    return lambda folder: edit(folder, change)


def raw(old: str, new: str) -> Attack:
    """Replace the first such text of the file as it stands."""

    def change(folder: Path) -> None:
        text = (folder / MANIFEST).read_text()
        assert old in text
        (folder / MANIFEST).write_text(text.replace(old, new, 1))

    return change


def controller(**fields: Any) -> Attack:
    """One more controller, a good one but for these fields."""
    entry = {"file": "head.onnx", "classes": [[2, 2], [4, 4]], "curve": {"bytes": [1.0, 2.0], "mu": [0.0, 1.0]}}
    return lambda folder: edit(folder, lambda data: data["controllers"].update(adaptive={**entry, **fields}))


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


ATTACKS: dict[str, tuple[Attack, str]] = {
    # JSON
    "a key twice": (raw('"name"', '"name": "a", "name"'), "'name' comes twice"),
    "a key twice inside": (raw('"layers"', '"layers": 3, "layers"'), "'layers' comes twice"),
    "a file twice": (raw('"decoder.onnx": {', '"decoder.onnx": {}, "decoder.onnx": {'), "'decoder.onnx' comes twice"),
    "fifty thousand keys, the last one twice": (
        raw('"name"', ", ".join(f'"k{i}": 0' for i in range(50_000)) + ', "k49999": 1, "name"'),
        "'k49999' comes twice",
    ),
    "NaN": (put("source", {"x": float("nan")}), "NaN is no number"),
    "Infinity": (put("source", {"x": float("inf")}), "Infinity is no number"),
    "1e400": (raw('"decode_weight_nbytes"', '"x": 1e400, "decode_weight_nbytes"'), "1e400 is too large"),
    "10^400": (put("decode_weight_nbytes", HUGE), "1000.* is too large"),
    "10^5000": (lambda f: raw('"kv_heads": 4', '"kv_heads": 4' + "0" * 5000)(f), "40000.* is too large"),
    "half a surrogate": (put("name", "\ud800"), "no text"),
    "half a surrogate as a key": (put("special_tokens", {"\udfff": "a"}), "no text"),
    "a text of a megabyte": (put("name", "x" * 900_000), "too long"),
    "brackets a hundred thousand deep": (lambda f: (f / MANIFEST).write_text("[" * 100_000), "kvq.json is damaged"),
    "objects ten thousand deep": (lambda f: (f / MANIFEST).write_text('{"a":' * 10_000), "kvq.json is damaged"),
    "a bill of brackets": (put("eos_token_ids", deep(300)), "eos_token_ids"),
    "a second value behind": (lambda f: (f / MANIFEST).open("a").write("{}") and None, "kvq.json is damaged"),
    "a megabyte of spaces": (lambda f: (f / MANIFEST).write_text(" " * (1 << 20) + "{}"), "is larger than"),
    "UTF-16": (lambda f: (f / MANIFEST).write_text("{}", encoding="utf-16"), "not UTF-8"),
    "a number": (lambda f: (f / MANIFEST).write_text("1"), "kvq.json is damaged"),
    "nothing": (lambda f: (f / MANIFEST).write_text("null"), "kvq.json is damaged"),
    # What the model is
    "true layers": (put("architecture/layers", True), "layers is True"),
    "true heads": (put("architecture/kv_heads", True), "kv_heads is True"),
    "layers 3.0": (put("architecture/layers", 3.0), "layers is 3.0"),
    "negative hidden": (put("architecture/hidden", -64), "hidden is -64"),
    "no context": (put("architecture/context", 0), "context is 0"),
    "context of 2^40": (put("architecture/context", 1 << 40), "context is"),
    "vocabulary of 2^31": (put("architecture/vocab", 1 << 31), "vocab is"),
    "hidden of 2^20": (put("architecture/hidden", 1 << 20), "hidden is"),
    "heads of 2^14": (put("architecture/heads", 1 << 14), "heads is"),
    "heads of 1024 by 1024": (
        lambda f: edit(f, lambda d: d["architecture"].update(heads=1024, kv_heads=1024, head_dim=1024)),
        "too many features",
    ),
    "keys of a gigabyte a token": (
        lambda f: edit(
            f,
            lambda d: (
                d["architecture"].update(layers=1024, heads=64, kv_heads=64, head_dim=1024),
                d.update(segments=["a"] * 1025),
            ),
        ),
        "too many",
    ),
    "a thousand layers": (put("architecture/layers", 1000), "segments for 1000 layers"),
    "head_dim of 7": (put("architecture/head_dim", 7), "head_dim 7"),
    "five KV heads": (put("architecture/kv_heads", 5), "kv_heads 5"),
    "no shape": (put("architecture", []), "kvq.json is damaged"),
    # Fields of another type
    "name a number": (put("name", 7), "name is 7"),
    "name a list": (put("name", ["a"]), r"name is \['a'\]"),
    "name that clears a terminal": (put("name", "\x1b[2J"), r"name is '\\x1b"),
    "name that turns text around": (put("name", "a\u202eb"), "name is"),
    "name of a thousand letters": (put("name", "n" * 1000), "name is 'nnn"),
    "weights a text": (put("weights", "int8"), "weights is 'int8'"),
    "weights of lists": (put("weights", {"layers": ["int8"]}), "layers of weights"),
    "weights of a thousand names": (put("weights", {str(i): 0 for i in range(1000)}), "weights is"),
    "weights that clear a terminal": (put("weights", {"layers": "\x1b[2J"}), "layers of weights"),
    "kv nothing": (put("kv", None), "kv is None"),
    "kv of objects": (put("kv", {"rotation": {"a": "b"}}), "rotation of kv"),
    "bytes of weights a truth": (put("decode_weight_nbytes", True), "decode_weight_nbytes is True"),
    "bytes of weights below nothing": (put("decode_weight_nbytes", -1), "decode_weight_nbytes is -1"),
    "bytes of weights beyond any disk": (put("decode_weight_nbytes", 1 << 50), "decode_weight_nbytes is"),
    "end of text a truth": (put("eos_token_ids", [True]), "one of which is True"),
    "end of text below nothing": (put("eos_token_ids", [-1]), "one of which is -1"),
    "end of text a number": (put("eos_token_ids", 0), "eos_token_ids is 0"),
    "a hundred ends of text": (put("eos_token_ids", [0] * 100), "eos_token_ids is"),
    "special tokens a list": (put("special_tokens", []), "special_tokens is"),
    "special token a number": (put("special_tokens", {"bos_token": 1}), "special token bos_token is 1"),
    "special token with a name that clears": (put("special_tokens", {"\x1b[2J": "a"}), "a name in special_tokens"),
    "a thousand special tokens": (put("special_tokens", {str(i): "a" for i in range(1000)}), "special_tokens is"),
    "source a list": (put("source", [1]), r"source is \[1\]"),
    "source of objects": (put("source", {"name": {"a": 1}}), "name of source"),
    "types of the source a list": (put("source", {"types": ["Q8_0"]}), "types of source"),
    "sampling a list": (put("sampling", [0.2]), r"sampling is \[0.2\]"),
    "sampling of another option": (put("sampling", {"seed": 1}), "sampling {'seed': 1}"),
    "sampling hot": (put("sampling", {"temperature": 1e9}), "temperature of sampling is 1000000000.0"),
    "sampling huge": (put("sampling", {"temperature": HUGE}), "is too large"),
    "sampling of text": (put("sampling", {"top_p": "0.9"}), "top_p of sampling is '0.9'"),
    "sampling with nothing": (put("sampling", {"top_p": None}), "sampling {'top_p': None}"),
    "sampling with half a token": (put("sampling", {"top_k": 0.5}), "top_k of sampling is 0.5"),
    "sampling beyond all": (put("sampling", {"top_k": -1}), "sampling {'top_k': -1}"),
    # Files
    "head a number": (put("head", 7), "a file name is 7"),
    "decoder a truth": (put("decoder", True), "a file name is True"),
    "decoder nothing": (put("decoder", None), "a file name is None"),
    "head and decoder one file": (put("head", "decoder.onnx"), "decoder.onnx is named twice"),
    "one segment twice": (lambda f: edit(f, lambda d: d["segments"].__setitem__(1, d["segments"][2])), "named twice"),
    "weights as head": (put("head", WEIGHTS), "weights.bin is named twice"),
    "tokenizer as head": (put("head", "tokenizer.json"), "tokenizer.json is not a readable ONNX|is refused"),
    "segment a number": (put("segments", [1, 2, 3, 4]), "a file name is 1"),
    "segments an object": (put("segments", {"a": 1}), "segments is"),
    "size a truth": (put("files/head.onnx/nbytes", True), "entry of head.onnx"),
    "size below nothing": (put("files/head.onnx/nbytes", -1), "entry of head.onnx"),
    "size of 2^50": (put("files/head.onnx/nbytes", 1 << 50), "entry of head.onnx"),
    "size 1.0": (put("files/head.onnx/nbytes", 1.0), "entry of head.onnx"),
    "digest a number": (put("files/head.onnx/sha256", 7), "entry of head.onnx"),
    "digest of capitals": (put("files/head.onnx/sha256", "A" * 64), "entry of head.onnx"),
    "digest too short": (put("files/head.onnx/sha256", "ab"), "entry of head.onnx"),
    "more in an entry": (
        lambda f: edit(f, lambda d: d["files"]["head.onnx"].update(url="http://a")),
        "entry of head.onnx",
    ),
    "an entry a list": (put("files/head.onnx", [1, 2]), "kvq.json is damaged"),
    "the manifest lists itself": (put("files/kvq.json", {"nbytes": 1, "sha256": "0" * 64}), "file name 'kvq.json'"),
    "a hidden file": (put("files/.netrc", {"nbytes": 1, "sha256": "0" * 64}), "file name '.netrc'"),
    "a file of a drive": (put("files/C:x", {"nbytes": 1, "sha256": "0" * 64}), "file name 'C:x'"),
    "a file with a zero": (put("files/a\0b", {"nbytes": 1, "sha256": "0" * 64}), "file name"),
    "ten thousand files": (
        lambda f: edit(f, lambda d: d.update(files={f"a{i}": {} for i in range(10_000)})),
        "files is",
    ),
    # Controllers
    "controllers a list": (put("controllers", []), "controllers is"),
    "a hundred controllers": (
        lambda f: edit(f, lambda d: d.update(controllers={f"c{i}": {} for i in range(100)})),
        "controllers is",
    ),
    "a controller a text": (put("controllers", {"a": "b"}), "controller a is 'b'"),
    "a controller without a file": (put("controllers", {"a": {}}), "KeyError: 'file'"),
    "a controller's file a number": (controller(file=1), "file of controller adaptive"),
    "a controller's file elsewhere": (controller(file="../x"), r"\.\./x is not in the file list"),
    "a controller's name that clears": (
        put("controllers", {"\x1b[2J": {"file": "head.onnx"}}),
        "a name in controllers",
    ),
    "classes of 300 bits": (controller(classes=[[300, 300]]), "a precision of controller adaptive is 300"),
    "classes of -1 bits": (controller(classes=[[-1, 2]]), "a precision of controller adaptive is -1"),
    "classes of truths": (controller(classes=[[True, True]]), "a precision of controller adaptive is True"),
    "classes of texts": (controller(classes=["22"]), "a class of controller adaptive is '22'"),
    "a thousand classes": (controller(classes=[[2, 2]] * 1000), "classes of controller adaptive"),
    "classes of threes": (controller(classes=[[2, 2, 2]]), "a class of controller adaptive"),
    "curve of 10^400": (controller(curve={"bytes": [HUGE], "mu": [1]}), "is too large"),
    "curve of 10^15": (controller(curve={"bytes": [1e31], "mu": [1]}), "bytes of controller adaptive is 1e"),
    "curve of NaN": (controller(curve={"bytes": [float("nan")], "mu": [1]}), "NaN is no number"),
    "curve of texts": (controller(curve={"bytes": ["1"], "mu": ["1"]}), "bytes of controller adaptive"),
    "curve a number": (controller(curve=7), "curve of controller adaptive"),
    "curve of three sides": (controller(curve={"a": [], "b": [], "c": []}), "curve of controller adaptive"),
    "curve of a hundred thousand points": (
        controller(curve={"bytes": [1] * 100_000, "mu": [1] * 100_000}),
        "bytes of controller adaptive|is larger",
    ),
    "model of a controller a list": (controller(model=[]), "model of controller adaptive"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_manifest_is_refused(name: str, fp32: Path) -> None:
    attack, words = ATTACKS[name]
    attack(fp32)
    refused(fp32, words)


def test_more_fields_than_this_kvq_knows_are_no_harm(fp32: Path) -> None:
    """A later kvq may say more of a bundle of the same version."""
    put("colour", "blue")(fp32)
    assert open_bundle(fp32).bundle.manifest.name == json.loads((fp32 / MANIFEST).read_text())["name"]
