"""Where the bytes are: external data outside of weights.bin or beyond it, shared, left over; files that are none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from kvq.runtime.bundle.manifest import WEIGHTS
from tests.attacks.conftest import Attack, refused
from tests.attacks.graphs import HEAD, SEGMENT, Model, constant, external, model, wire
from tests.tools.bundles import edit, relist
from tests.tools.mutants import DELIMITED, Fields


def at(location: str) -> Attack:
    return model(SEGMENT, external("location", location))


def entry(key: str, value: str | None, more: tuple[str, str] | None = None) -> Attack:
    return model(SEGMENT, external(key, value, more))


def moved(by: int) -> Attack:
    """Another place for a constant."""

    def change(found: Model) -> None:
        tensor = next(t for t in found.graph.initializer if t.external_data)
        offset = next(e for e in tensor.external_data if e.key == "offset")
        offset.value = str(int(offset.value) + by)

    return model(SEGMENT, change)


def both_there(found: Model) -> None:
    """Two constants of one shape at one place."""
    outside = [t for t in found.graph.initializer if t.external_data]
    first = next(t for t in outside if sum(list(t.dims) == list(other.dims) for other in outside) > 1)
    second = next(t for t in outside if list(t.dims) == list(first.dims) and t.name != first.name)
    kept = [(e.key, e.value) for e in first.external_data]
    del second.external_data[:]
    for key, value in kept:
        second.external_data.add(key=key, value=value)


def other_name(found: Model) -> None:
    tensor = next(t for t in found.graph.initializer if t.external_data)
    for node in found.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = "evil" if name == tensor.name else name
    tensor.name = "evil"


def other_shape(found: Model) -> None:
    tensor = next(t for t in found.graph.initializer if t.external_data and len({*t.dims}) == 2)
    tensor.dims[:] = [tensor.dims[1], tensor.dims[0]]


def longer(data: bytes) -> Attack:
    """Bytes behind the last tensor."""

    def attack(folder: Path) -> None:
        with open(folder / WEIGHTS, "ab") as file:
            file.write(data)
        relist(folder, WEIGHTS)

    return attack


def shorter(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-4096])
    relist(folder, WEIGHTS)


def empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")
    relist(folder, WEIGHTS)


def in_a_hole(folder: Path) -> None:
    """Something written into the padding between two tensors."""
    import onnx

    spans: set[tuple[int, int]] = set()
    for file in folder.glob("*.onnx"):
        for tensor in onnx.load(file, load_external_data=False).graph.initializer:
            found = {e.key: e.value for e in tensor.external_data}
            if found:
                spans.add((int(found["offset"]), int(found["length"])))
    ends, starts = {start + length for start, length in spans}, {start for start, _ in spans}
    hole = min(ends - starts - {max(ends)})
    with open(folder / WEIGHTS, "r+b") as weights:
        weights.seek(hole)
        weights.write(b"x")
    relist(folder, WEIGHTS)


def holes(folder: Path) -> None:
    """A file of a terabyte that takes no room."""
    os.truncate(folder / WEIGHTS, 1 << 40)
    edit(folder, lambda data: data["files"][WEIGHTS].update(nbytes=1 << 40))


def other_holes(folder: Path) -> None:
    os.truncate(folder / "tokenizer.json", 1 << 40)
    edit(folder, lambda data: data["files"]["tokenizer.json"].update(nbytes=1 << 40))


def linked(name: str, target: str) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return attack


def pipe(folder: Path) -> None:
    """Whoever reads it waits for ever."""
    (folder / HEAD).unlink()
    os.mkfifo(folder / HEAD)


def two_locations(tree: Fields) -> None:
    """A location twice in one entry, on the wire."""
    graph = next(content for number, _, content in tree if number == 7)
    tensors = [content for number, _, content in graph if number == 5]
    entries = next(content for tensor in tensors for number, _, content in tensor if number == 13)
    entries.append([2, DELIMITED, b"/etc/passwd"])


ATTACKS: dict[str, tuple[Attack, str]] = {
    # Other files
    "the folder above": (at("../weights.bin"), r"external data from '\.\./weights\.bin'"),
    "far above": (at("../" * 30 + "etc/passwd"), "external data from"),
    "an absolute path": (at("/etc/passwd"), "external data from '/etc/passwd'"),
    "a path of Windows": (at("C:\\weights.bin"), "external data from"),
    "a share": (at("\\\\host\\weights.bin"), "external data from"),
    "a URL": (at("file:///etc/passwd"), "external data from"),
    "a detour": (at("./weights.bin"), "external data from"),
    "a detour down and up": (at("a/../weights.bin"), "external data from"),
    "two slashes": (at("//weights.bin"), "external data from"),
    "a slash behind": (at("weights.bin/"), "external data from"),
    "capitals": (at("WEIGHTS.BIN"), "external data from"),
    "a space behind": (at("weights.bin "), "external data from"),
    "a zero behind": (at("weights.bin\0"), "control characters"),
    "no path": (at(""), "external data from ''"),
    "a dot": (at("."), r"external data from '\.'"),
    "the manifest": (at("kvq.json"), "external data from 'kvq.json'"),
    "another graph": (at(HEAD), "external data from 'head.onnx'"),
    "a process's memory": (at("/proc/self/mem"), "external data from"),
    "a device that never ends": (at("/dev/zero"), "external data from"),
    "onnxruntime's mark for memory": (at("*/_ORT_MEM_ADDR_/*"), "external data from"),
    "a location that is not said": (entry("location", None), "is given by"),
    "a second location": (entry("location", WEIGHTS, ("location", WEIGHTS)), "is given by"),
    "a second location elsewhere": (
        entry("location", WEIGHTS, ("location", "/etc/passwd")),
        "external data from '/etc/pa",
    ),
    "a location twice in one entry": (wire(SEGMENT, two_locations), "value twice in a pair of texts"),
    # Offsets and lengths
    "no offset": (entry("offset", None), "is given by"),
    "no length": (entry("length", None), "is given by"),
    "a checksum": (entry("offset", "0", ("checksum", "0" * 40)), "is given by .*checksum"),
    "a key that is not known": (entry("offset", "0", ("basepath", "/")), "is given by .*basepath"),
    "an entry that is empty": (entry("offset", "0", ("", "")), "is given by"),
    "offset below nothing": (entry("offset", "-4096"), "the offset of .* is '-4096'"),
    "offset with a sign": (entry("offset", "+0"), r"the offset of .* is '\+0'"),
    "offset with a space": (entry("offset", " 0"), "the offset of .* is ' 0'"),
    "offset with letters behind": (entry("offset", "0x1000"), "the offset of .* is '0x1000'"),
    "offset with zeros before": (entry("offset", "0000"), "the offset of .* is '0000'"),
    "offset as a power": (entry("offset", "1e3"), "the offset of .* is '1e3'"),
    "offset in other digits": (entry("offset", "٠"), "the offset of"),
    "offset of 2^64": (entry("offset", str(1 << 64)), "the offset of .* is '18446744073709551616'"),
    "offset of 2^63 - 4096": (entry("offset", str((1 << 63) - 4096)), "the offset of"),
    "offset of 2^40": (entry("offset", str(1 << 40)), "lies beyond the .* bytes of weights.bin"),
    "offset off by one": (moved(1), "is not aligned"),
    "offset off by 32": (moved(32), "is not aligned"),
    "length of nothing": (entry("length", "0"), "has 0 bytes of external data"),
    "length of 2^40": (entry("length", str(1 << 40)), "bytes of external data, its shape asks for"),
    "length one less": (entry("length", "2047"), "bytes of external data, its shape asks for"),
    "length below nothing": (entry("length", "-1"), "the length of .* is '-1'"),
    "a shape of more than its bytes": (
        model(SEGMENT, lambda m: next(t for t in m.graph.initializer if t.external_data).dims.insert(0, 2)),
        "bytes of external data, its shape asks for",
    ),
    "a shape that overflows to its bytes": (
        model(
            SEGMENT, lambda m: next(t for t in m.graph.initializer if t.external_data).dims.extend([1 << 32, 1 << 32])
        ),
        "its shape asks for|has the shape",
    ),
    "data here and there": (
        model(SEGMENT, lambda m: setattr(next(t for t in m.graph.initializer if t.external_data), "raw_data", b"x")),
        "is in two places, or in none",
    ),
    "data that is said to be here": (
        model(SEGMENT, lambda m: setattr(next(t for t in m.graph.initializer if t.external_data), "data_location", 0)),
        "is in two places, or in none",
    ),
    "data that is nowhere": (
        model(
            SEGMENT, constant(lambda t: (t.ClearField("raw_data"), setattr(t, "data_location", TensorProto.EXTERNAL)))
        ),
        "is given by",
    ),
    # Regions
    "one tensor into another": (moved(64), "overlaps the tensor before it|is another tensor|lies beyond"),
    "one tensor for two": (model("decoder.onnx", both_there), "is another tensor than in other graphs"),
    "two names for one tensor": (model(SEGMENT, other_name), "decoder.onnx is refused: .* has the bytes of 'evil'"),
    "another shape than in other graphs": (
        model(SEGMENT, other_shape),
        "is another tensor than in other graphs|operator",
    ),
    "a page of zeros behind": (longer(bytes(1 << 16)), "65536 bytes at .* belong to no tensor"),
    "a megabyte behind": (longer(np.random.default_rng(0).bytes(1 << 20)), "bytes at .* belong to no tensor"),
    "one byte behind": (longer(b"x"), "that belong to no tensor are not zero"),
    "something in a hole": (in_a_hole, "that belong to no tensor are not zero"),
    "a page less": (shorter, "lies beyond the .* bytes of weights.bin"),
    "nothing": (empty, "lies beyond the 0 bytes of weights.bin"),
    "a terabyte of holes": (holes, "weights.bin has 1099511627776 bytes, for a model of .* parameters"),
    "a terabyte of holes elsewhere": (other_holes, "files besides weights.bin have .* bytes"),
    # Files that are no files
    "weights a link": (linked(WEIGHTS, "/etc/passwd"), "weights.bin is missing .* or not a regular file"),
    "weights a link to a device": (linked(WEIGHTS, "/dev/zero"), "not a regular file"),
    "weights a link into the bundle": (linked(WEIGHTS, "head.onnx"), "not a regular file"),
    "a graph a link": (linked(HEAD, "decoder.onnx"), "not a regular file"),
    "a graph a link to nowhere": (linked(HEAD, "/nowhere/at/all"), "not a regular file"),
    "a graph a link to itself": (linked(HEAD, HEAD), "not a regular file"),
    "a graph a pipe": (pipe, "not a regular file"),
    "a graph of no bytes": (lambda f: (f / HEAD).write_bytes(b"") and None, "head.onnx has 0 bytes"),
    "sizes that are another's": (
        lambda f: edit(f, lambda d: d["files"].update({HEAD: d["files"][SEGMENT], SEGMENT: d["files"][HEAD]})),
        "bytes, the",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_bundle_is_refused(name: str, fp32: Path) -> None:
    attack, words = ATTACKS[name]
    attack(fp32)
    refused(fp32, words)


def test_a_hard_link_is_a_file_like_any_other(fp32: Path) -> None:
    """Package managers make them; what they hold is known by its digest."""
    os.link(fp32 / WEIGHTS, fp32.parent / "elsewhere")
    from kvq.composition import open_bundle

    assert open_bundle(fp32).architecture.layers == 3


def test_a_hard_link_to_something_else_is_refused(fp32: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes((fp32 / WEIGHTS).stat().st_size))
    (fp32 / WEIGHTS).unlink()
    os.link(secret, fp32 / WEIGHTS)
    refused(fp32, "weights.bin has another sha256 than the manifest says")
