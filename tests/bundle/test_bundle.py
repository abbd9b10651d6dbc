"""Bundles: what an export writes, and that loading refuses everything else in one line."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import kvq
from kvq.composition import open_bundle
from kvq.exporter.export import export
from kvq.runtime.bundle.bundle import Bundle, digest
from kvq.runtime.bundle.guard import check_graph
from kvq.runtime.bundle.manifest import MANIFEST, WEIGHTS
from kvq.runtime.errors import BundleError, TokenizerError
from tests.tools.checkpoints import TINY, save_checkpoint

Damage = Callable[[Path], Any]
SEGMENT = "segment_001.onnx"


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle, to be damaged."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def refusal(folder: Path) -> str:
    """Load a bundle, expect a refusal of one line with a remedy, return the line."""
    with pytest.raises(BundleError) as caught:
        kvq.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert "export" in message, f"no remedy in: {message}"
    return message


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change kvq.json in place."""
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def relist(folder: Path, name: str) -> None:
    """Write the true size and digest of a file into the manifest, as an attacker would."""
    entry = {"nbytes": (folder / name).stat().st_size, "sha256": digest(folder / name)}
    edit(folder, lambda data: data["files"].update({name: entry}))


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


# Graphs whose size and digest are right, so that only the look into them can object.


def rewritten(change: Callable[[onnx.ModelProto], Any]) -> Damage:
    def damage(file: Path) -> None:
        model = onnx.load(file, load_external_data=False)
        change(model)
        file.write_bytes(model.SerializeToString())

    return damage


def raw(data: bytes) -> Damage:
    return lambda file: file.write_bytes(data)


def foreign_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("NonZero", ["residual"], ["indices"]))


def foreign_domain(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Add", ["residual", "residual"], ["sum"], domain="evil.custom"))


def body() -> onnx.GraphProto:
    return helper.make_graph([], "body", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])])


def branch(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("If", ["c"], ["x"], then_branch=body(), else_branch=body()))


def loop(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Loop", ["n", "c"], ["x"], body=body()))


def subgraph_in_an_allowed_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("body", body()))


def subgraphs_in_an_allowed_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("bodies", [body()]))


def function(model: onnx.ModelProto) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    model.functions.append(helper.make_function("evil", "Add", ["x"], ["y"], [node], [helper.make_opsetid("", 21)]))


def external(location: str) -> Callable[[onnx.ModelProto], None]:
    """Point the first external tensor somewhere else."""

    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        next(e for e in tensor.external_data if e.key == "location").value = location

    return change


def second_location(model: onnx.ModelProto) -> None:
    """A harmless location first, and another behind it."""
    tensor = next(t for t in model.graph.initializer if t.external_data)
    tensor.external_data.add(key="location", value="/etc/passwd")


def external_in_an_attribute(model: onnx.ModelProto) -> None:
    tensor = TensorProto(name="t", dims=[1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node[0].attribute.append(helper.make_attribute("value", tensor))


def keyless_external_data(model: onnx.ModelProto) -> None:
    """An entry that is empty on the wire: protobuf reads key and value as empty texts."""
    next(t for t in model.graph.initializer if t.external_data).external_data.add()


def sparse_initializer(model: onnx.ModelProto) -> None:
    values = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("indices", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))


def offset_beyond_the_file(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == "offset").value = str(1 << 40)


def negative_offset(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == "offset").value = "-4096"


def no_output(model: onnx.ModelProto) -> None:
    """A graph of allowed operators that lacks what the runtime binds."""
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("residual_out", TensorProto.FLOAT, None))


def message(field: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    size, encoded = len(content), b""
    while size > 127:
        size, encoded = size >> 7, encoded + bytes([size & 127 | 128])
    return bytes([field << 3 | 2]) + encoded + bytes([size]) + content


# A node whose operator name is sent as the number 2**62 rather than as text.
NUMBER_AS_OPERATOR = message(7, message(1, bytes([4 << 3]) + b"\x80" * 8 + b"\x40"))

GRAPHS: list[tuple[str, Damage, str]] = [
    ("foreign operator", rewritten(foreign_operator), "operator NonZero"),
    ("foreign domain", rewritten(foreign_domain), "operator evil.custom::Add"),
    ("If", rewritten(branch), "subgraph"),
    ("Loop", rewritten(loop), "subgraph"),
    ("subgraph in Add", rewritten(subgraph_in_an_allowed_operator), "subgraph"),
    ("subgraphs in Add", rewritten(subgraphs_in_an_allowed_operator), "subgraphs"),
    ("function", rewritten(function), "functions"),
    ("data from ../secret", rewritten(external("../secret")), "external data from '../secret'"),
    ("data from an absolute path", rewritten(external("/etc/passwd")), "external data from '/etc/passwd'"),
    ("data from the manifest", rewritten(external(MANIFEST)), "external data from 'kvq.json'"),
    ("data from memory", rewritten(external("*/_ORT_MEM_ADDR_/*")), "external data from"),  # onnxruntime's own marker
    ("data by a detour", rewritten(external(f"./{WEIGHTS}")), "external data from"),
    ("data from a second location", rewritten(second_location), "external data from '/etc/passwd'"),
    ("data in an attribute", rewritten(external_in_an_attribute), "external data from '/etc/passwd'"),
    ("data without a key", rewritten(keyless_external_data), SEGMENT),
    ("data beyond the file", rewritten(offset_beyond_the_file), SEGMENT),
    ("data before the file", rewritten(negative_offset), SEGMENT),
    ("sparse initializer", rewritten(sparse_initializer), "sparse initializers"),
    ("no query_key", rewritten(no_output), SEGMENT),
    ("number for an operator", raw(NUMBER_AS_OPERATOR), SEGMENT),
    ("random bytes", raw(np.random.default_rng(0).bytes(4096)), "not a readable ONNX file"),
    ("text", raw(b"<html>404 Not Found</html>"), "not a readable ONNX file"),
    ("zeros", raw(bytes(64)), SEGMENT),
    ("nothing", raw(b""), SEGMENT),
]


# The backend that runs a graph, and the graph.
every_form = pytest.mark.parametrize(("backend", "graph"), [("numpy", SEGMENT), ("native", "decoder.onnx")])


@every_form
@pytest.mark.parametrize(("damage", "words"), [pytest.param(*row[1:], id=row[0]) for row in GRAPHS])
def test_foreign_graph_is_refused(monkeypatch, backend, graph, damage: Damage, words: str, bundle: Path) -> None:
    monkeypatch.setenv("KVQ_BACKEND", backend)
    damage(bundle / graph)
    relist(bundle, graph)
    Bundle(bundle)  # nothing about the file itself is wrong
    message = refusal(bundle)
    assert graph in message
    assert words.replace(SEGMENT, graph) in message


def test_a_foreign_graph_is_refused_even_where_another_form_would_run(monkeypatch, bundle: Path) -> None:
    monkeypatch.setenv("KVQ_BACKEND", "numpy")
    rewritten(foreign_operator)(bundle / "decoder.onnx")
    relist(bundle, "decoder.onnx")
    assert "operator NonZero" in refusal(bundle)


def test_swapped_segments_are_refused(monkeypatch, bundle: Path) -> None:
    monkeypatch.setenv("KVQ_BACKEND", "numpy")
    edit(bundle, lambda data: data["segments"].reverse())
    refusal(bundle)


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden", 128), ("heads", 4), ("kv_heads", 8), ("head_dim", 16), ("vocab", 1024), ("vocab", 256)],
)
@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_shape_other_than_that_of_the_graphs_is_refused(
    monkeypatch, backend: str, name: str, value: int, bundle: Path
) -> None:
    monkeypatch.setenv("KVQ_BACKEND", backend)
    edit(bundle, lambda data: data["architecture"].update({name: value}))
    refusal(bundle)


def test_the_rewriting_itself_is_harmless(bundle: Path) -> None:
    rewritten(lambda model: None)(bundle / SEGMENT)
    relist(bundle, SEGMENT)
    assert kvq.load(bundle).session().append([1]).shape == (TINY["vocab_size"],)


def test_every_cut_of_a_graph_is_a_bundle_error_or_passes_the_guard(tiny_bundle: Path) -> None:
    data = (tiny_bundle / SEGMENT).read_bytes()
    refused = 0
    for length in range(0, len(data), 7):
        try:
            check_graph(data[:length], SEGMENT, {WEIGHTS})
        except BundleError:
            refused += 1
    assert refused > 0.9 * len(range(0, len(data), 7))


def test_no_byte_of_a_graph_makes_the_guard_fail_otherwise(tiny_bundle: Path) -> None:
    data = (tiny_bundle / SEGMENT).read_bytes()
    rng = np.random.default_rng(1)
    for at in rng.integers(0, len(data), 1500):
        damaged = bytearray(data)
        damaged[at] = rng.integers(256)
        with contextlib.suppress(BundleError):  # anything else fails the test
            check_graph(bytes(damaged), SEGMENT, {WEIGHTS})


# What an export writes.


def test_the_manifest_lists_every_file_with_size_and_digest(tiny_bundle: Path) -> None:
    files = json.loads((tiny_bundle / MANIFEST).read_text())["files"]
    assert {f.name for f in tiny_bundle.iterdir()} == {*files, MANIFEST}
    assert {WEIGHTS, "tokenizer.json", "head.onnx", "uncertainty.onnx", "segment_003.onnx"} <= files.keys()
    for name, entry in files.items():
        assert entry == {"nbytes": (tiny_bundle / name).stat().st_size, "sha256": digest(tiny_bundle / name)}


def test_the_manifest_describes_the_checkpoint(tiny_bundle: Path) -> None:
    manifest = Bundle(tiny_bundle).manifest
    shape = manifest.architecture
    assert (shape.layers, shape.hidden, shape.ffn, shape.vocab, shape.context) == (3, 64, 172, 512, 256)
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (8, 4, 8)
    common = {"layers": "fp32", "head": "fp32", "block": 64, "activations": "int8"}
    assert manifest.weights == common | {"exact": 7, "matrices": 13}  # the rotation of values changes q+k+v and o
    assert manifest.kv == {"rotation": "hadamard", "centered": True, "values": "folded"}
    assert manifest.eos_token_ids == [0]
    parameters = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 172 * 64) + 512 * 64  # products alone; the head's table once
    assert manifest.decode_weight_nbytes == 4 * parameters


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_exporting_twice_gives_identical_files(weights: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    first, second = (export(str(tiny_checkpoint), tmp_path / name, weights=weights).path for name in "ab")
    names = sorted(f.name for f in first.iterdir())
    assert names == sorted(f.name for f in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert Bundle(first).digest == Bundle(second).digest


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["calibrating keys", "writing segments", "digests", "done"])
def test_interrupted_export_leaves_nothing_behind(
    step: str, error: type[BaseException], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if what == step:
            raise error(step)

    with pytest.raises(error, match=step):
        export(str(tiny_checkpoint), tmp_path / "bundle", weights="fp32", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_progress_counts_up_to_its_total(tiny_checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    export(str(tiny_checkpoint), tmp_path / "bundle", progress=lambda *state: seen.append(state))
    assert [done for done, _, _ in seen] == sorted({done for done, _, _ in seen})
    assert {total for _, total, _ in seen} == {seen[-1][0]}


def test_checkpoint_without_tokenizer_runs_on_token_ids_alone(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "checkpoint", TINY | {"num_hidden_layers": 1}, tokenizer=False)
    summary = export(str(path), tmp_path / "bundle", weights="int8")
    assert any("token ids only" in note for note in summary.notes)
    assert not summary.manifest.kv["centered"]
    model = open_bundle(summary.path)
    assert len(list(model.session().generate([1, 2, 3], max_tokens=4, ignore_eos=True))) == 4
    for use in (lambda: model.encode("text"), lambda: list(model.session().generate("text", max_tokens=1))):
        with pytest.raises(TokenizerError, match="no tokenizer; pass token ids") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_chat_template_is_carried_over(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    bundle = export(str(path), tmp_path / "bundle", weights="fp32").path
    assert (bundle / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "chat_template.jinja" in Bundle(bundle).manifest.files
