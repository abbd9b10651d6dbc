"""Files that cannot be exported, damaged or made up to do harm: one line that says why, nothing left behind."""

from __future__ import annotations

import math
import os
import re
import struct
import time
import tracemalloc
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvq.composition import open_bundle
from kvq.exporter.export import export
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.errors import CheckpointError, KvqError
from tests.tools.checkpoints import TINY, save_checkpoint
from tests.tools.gguf_files import Raw, RawTensor, write_gguf
from tests.tools.work import SOME, bounded_work

SMALL = TINY | {"intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 8}
MOST_MEMORY = 200 << 20
LIES: dict[str, Callable[[int], int]] = {
    "+1": lambda n: n + 1, "*2": lambda n: 2 * n, "2^31": lambda n: 1 << 31, "2^60": lambda n: 1 << 60,
    "2^63": lambda n: 1 << 63,
}  # fmt: skip
Change = Callable[[Raw], Any]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("small") / "c", SMALL, tokenizer=False)


@pytest.fixture(scope="module")
def good(small: Path) -> Path:
    """A file that is exported."""
    return write_gguf(small.parent / "good.gguf", small, "Q8_0", tokenizer="gpt2")


@pytest.fixture(scope="module")
def pieces(good: Path) -> Raw:
    return Raw.of(good)


@pytest.fixture
def raw(pieces: Raw) -> Raw:
    """The good file in pieces, to be changed."""
    return deepcopy(pieces)


def refusal(source: Path, **options: Any) -> CheckpointError:
    """Export, expect a refusal of one line at once and nothing left; return the error."""
    folder = source.parent / "out"
    folder.mkdir(exist_ok=True)
    with bounded_work(clock=time.process_time), pytest.raises(CheckpointError) as caught:
        export(source, folder / "bundle", weights="fp32", center=False, **options)
    assert not list(folder.iterdir())
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert re.search(r"[;:] ", message), f"no remedy in: {message}"
    return caught.value


def refused(folder: Path, content: Raw | bytes, name: str = "bad.gguf") -> str:
    """The message of the refusal of a file of this content."""
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.bytes())
    return str(refusal(file))


def exported(folder: Path, content: Raw | bytes) -> Bundle:
    file = folder / "fine.gguf"
    file.write_bytes(content if isinstance(content, bytes) else content.bytes())
    return Bundle(export(file, folder / "fine", weights="fp32", center=False, overwrite=True).path)


def test_file_put_together_is_the_file(raw: Raw, good: Path) -> None:
    assert raw.bytes() == good.read_bytes()


def test_cut_file_is_refused_wherever_it_ends(raw: Raw, tmp_path: Path) -> None:
    data, header = raw.bytes(), len(raw.header())
    places = {*range(0, header, header // 25), *range(header, len(data), (len(data) - header) // 25), len(data) - 32}
    for place in sorted(places):
        message = refused(tmp_path, data[:place])
        assert "bad.gguf" in message, place
        if place > 4:
            assert "is damaged" in message, place


NEEDED = [
    "general.architecture", "llama.block_count", "llama.context_length", "llama.embedding_length",
    "llama.feed_forward_length", "llama.attention.head_count", "llama.attention.head_count_kv",
    "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.pre",
]  # fmt: skip


def test_every_field_is_needed_or_has_a_default(pieces: Raw, tmp_path: Path) -> None:
    names = [name.decode() for name, _ in pieces.fields]
    assert set(NEEDED) < set(names)
    for name in names:
        changed = deepcopy(pieces).without(name)
        if name in NEEDED:  # without head_count_kv there is one for every query head, which keys here are not
            assert refused(tmp_path, changed), name
        else:
            exported(tmp_path, changed)


def test_every_tensor_is_needed(pieces: Raw, tmp_path: Path) -> None:
    for name, _ in pieces.tensors:
        assert re.search("is missing|no matrix", refused(tmp_path, deepcopy(pieces).without(name.decode()))), name


@pytest.mark.parametrize("shape", ["transposed", "short", "flat", "deep"])
def test_tensors_of_other_shapes_are_refused(shape: str, pieces: Raw, tmp_path: Path) -> None:
    for name, _ in pieces.tensors:
        changed = deepcopy(pieces)
        tensor = changed.tensor(name.decode())
        dims = tensor.dims
        tensor.dims = {
            "transposed": dims[::-1] if len(dims) > 1 else [1, *dims],
            "short": [*dims[:-1], dims[-1] // 2],
            "flat": [math.prod(dims)],
            "deep": [*dims, 1],
        }[shape]
        if tensor.dims != dims:
            assert re.search("shape|no matrix|embeddings", refused(tmp_path, changed)), name


def q(tensor: str = "blk.0.ffn_up.weight", **changes: Any) -> Change:
    """A change of a tensor's description."""

    def change(raw: Raw) -> None:
        for field, value in changes.items():
            setattr(raw.tensor(tensor), field, value)

    return change


def renamed(tensor: str, name: str, copy: bool = False) -> Change:
    def change(raw: Raw) -> None:
        raw.tensors.append((name.encode(), deepcopy(raw.tensor(tensor))))
        if not copy:
            raw.without(tensor)

    return change


def scale(bits: int, tensor: str) -> Change:
    """A scale of a Q8_0 block in the middle."""

    def change(raw: Raw) -> None:
        found = raw.tensor(tensor)
        found.data = found.data[:340] + struct.pack("<H", bits) + found.data[342:]

    return change


def factors(*values: float, type_: Type = Type.F32) -> Change:
    data = np.array(values, np.float32).tobytes()
    return lambda raw: raw.tensors.append((b"rope_freqs.weight", RawTensor([len(values)], type_, data)))


UP, NORM, DOWN = "blk.0.ffn_up.weight", "blk.0.attn_norm.weight", "blk.0.ffn_down.weight"
HEAD_COUNT, KEY = "llama.attention.head_count", "llama.attention.key_length"
DAMAGED: list[tuple[str, Change, str]] = [
    ("unknown type", q(type=999), "type 999"),
    ("unused type", q(type=4), "type 4"),
    ("type of another quantization", q(type=Type.IQ4_NL), "IQ4_NL"),
    ("integers", q(NORM, type=Type.I32), "I32"),
    ("foreign architecture", lambda r: r.put("general.architecture", Value.STRING, b"qwen2moe"), "experts"),
    ("architecture no text", lambda r: r.put("general.architecture", Value.UINT32, 3), "architecture 3"),
    ("split count", lambda r: r.put("split.count", Value.UINT32, 2), "one part of a split model"),
    ("version 1", lambda r: setattr(r, "version", 1), "version 1;"),
    ("version 99", lambda r: setattr(r, "version", 99), "version 99;"),
    ("big-endian", lambda r: setattr(r, "version", 3 << 24), "big-endian"),
    ("no tensors", lambda r: r.tensors.clear(), "no matrix"),
    ("offset outside", q(offset=1 << 40), "is damaged"),
    ("offset near 2^64", q(offset=2**64 - 32), "is damaged"),
    ("offset of another", q(offset=0), "inside"),
    ("offset unaligned", q(NORM, offset=8), "not aligned"),
    ("alignment 3", lambda r: r.put("general.alignment", Value.UINT32, 3), "alignment"),
    ("alignment 0", lambda r: r.put("general.alignment", Value.UINT32, 0), "alignment"),
    ("alignment 2^31", lambda r: r.put("general.alignment", Value.UINT32, 1 << 31), "is damaged"),
    ("alignment a text", lambda r: r.put("general.alignment", Value.STRING, b"32"), "alignment"),
    ("field twice", lambda r: r.fields.append(r.fields[3]), "two fields"),
    ("tensor twice", lambda r: r.tensors.append(r.tensors[3]), "two tensors"),
    ("tensor twice by another number", renamed(UP, "blk.00.ffn_up.weight", copy=True), "blk.00.ffn_up"),
    ("layer beyond the last", renamed(UP, "blk.1.ffn_up.weight", copy=True), "1 layers by llama.block_count"),
    ("layer number far away", renamed(UP, "blk.99999.ffn_up.weight"), "layers.99999"),
    ("scale NaN", scale(0x7E00, UP), "mlp.up_proj.weight of bad holds NaN"),
    ("scale inf", scale(0x7C00, DOWN), "mlp.down_proj.weight of bad holds NaN"),
    ("embedding's scale inf", scale(0xFC00, "token_embd.weight"), "embed_tokens.weight of bad holds NaN"),
    ("norm NaN", lambda r: setattr(r.tensor(NORM), "data", b"\0\0\xc0\x7f" * 64), "input_layernorm.weight of bad"),
    ("text not UTF-8", lambda r: r.put("general.name", Value.STRING, b"\xff\xfe"), "not UTF-8"),
    ("name not UTF-8", lambda r: r.fields.append((b"\xff", struct.pack("<IB", 0, 1))), "not UTF-8"),
    ("tensor name not UTF-8", lambda r: r.tensors.append((b"\xff", r.tensors[0][1])), "not UTF-8"),
    ("tensor name of lines", renamed(NORM, "a\nb\x1b[31m"), r"tensor 'a\\nb"),
    ("field type 13", lambda r: r.fields.append((b"x", struct.pack("<IQ", 13, 0))), "value of type 13"),
    ("array of arrays", lambda r: r.fields.append((b"x", struct.pack("<IIQIQ", 9, 9, 1, 9, 1))), "value of type 9"),
    ("foreign tensor", renamed(NORM, "blk.0.attn_q_norm.weight", copy=True), "attn_q_norm.weight"),
    ("bias of a norm", renamed(NORM, "blk.0.attn_norm.bias", copy=True), "input_layernorm.bias"),
    ("bias at the end", renamed(NORM, "output_norm.bias", copy=True), "model.norm.bias"),
    ("some biases", renamed(NORM, "blk.0.attn_q.bias", copy=True), "k_proj.bias"),
    ("experts", lambda r: r.put("llama.expert_count", Value.UINT32, 8), "mixture of experts"),
    ("looks ahead", lambda r: r.put("llama.attention.causal", Value.BOOL, False), "causal=False"),
    ("partial rotation", lambda r: r.put("llama.rope.dimension_count", Value.UINT32, 4), "only part of a head"),
    ("values of another size", lambda r: r.put("llama.attention.value_length", Value.UINT32, 4), "other sizes"),
    ("heads per layer", lambda r: r.put(HEAD_COUNT, Value.ARRAY, struct.pack("<IQII", 4, 2, 8, 8)), "head_count="),
    ("heads a text", lambda r: r.put(HEAD_COUNT, Value.STRING, b"8"), "head_count='8'"),
    ("no heads", lambda r: r.put(HEAD_COUNT, Value.UINT32, 0), "head_count=0"),
    ("negative heads", lambda r: r.put(HEAD_COUNT, Value.INT32, -8), "head_count=-8"),
    ("true heads", lambda r: r.put(HEAD_COUNT, Value.BOOL, True), "head_count=True"),
    ("64 heads", lambda r: r.put(HEAD_COUNT, Value.UINT32, 64), "."),
    ("layers 2^31 - 1", lambda r: r.put("llama.block_count", Value.UINT32, 2**31 - 1), "num_hidden_layers=2147483647"),
    ("layers 2^60", lambda r: r.put("llama.block_count", Value.UINT64, 1 << 60), "block_count="),
    ("context 2^60", lambda r: r.put("llama.context_length", Value.UINT64, 1 << 60), "context_length="),
    ("epsilon NaN", lambda r: r.put("llama.attention.layer_norm_rms_epsilon", Value.FLOAT32, math.nan), "epsilon=nan"),
    ("epsilon 2", lambda r: r.put("llama.attention.layer_norm_rms_epsilon", Value.FLOAT32, 2.0), "rms_norm_eps=2.0"),
    ("base 0", lambda r: r.put("llama.rope.freq_base", Value.FLOAT32, 0.0), "freq_base=0"),
    ("base negative", lambda r: r.put("llama.rope.freq_base", Value.FLOAT32, -1e4), "freq_base=-10000"),
    ("base infinite", lambda r: r.put("llama.rope.freq_base", Value.FLOAT32, math.inf), "freq_base=inf"),
    ("unknown scaling", lambda r: r.put("llama.rope.scaling.type", Value.STRING, b"longrope"), "'longrope'"),
    ("scaling NaN", lambda r: r.put("llama.rope.scaling.factor", Value.FLOAT32, math.nan), "factor=nan"),
    ("scaling negative", lambda r: r.put("llama.rope.scaling.factor", Value.FLOAT32, -4.0), "factor=-4"),
    (
        "factors and a scaling",
        lambda r: (factors(1, 1, 1, 1)(r), r.put("llama.rope.scaling.factor", Value.FLOAT32, 2.0)),
        "one of them",
    ),
    ("factors too few", factors(1, 1, 1), "rope_freqs.weight"),
    ("factors 0", factors(1, 1, 1, 0), "rope_freqs.weight"),
    ("factors NaN", factors(1, 1, 1, math.nan), "rope_freqs.weight"),
    ("factors integers", factors(1, 1, 1, 1, type_=Type.I32), "rope_freqs.weight"),
]  # fmt: skip


@pytest.mark.filterwarnings("error::RuntimeWarning")  # of numpy, beside the one line
@pytest.mark.parametrize(("change", "cause"), [pytest.param(*row[1:], id=row[0]) for row in DAMAGED])
def test_damaged_file_is_refused(change: Change, cause: str, raw: Raw, tmp_path: Path) -> None:
    change(raw)
    message = refused(tmp_path, raw)
    assert re.search(cause, message), message


def test_huge_heads_are_refused_before_anything_is_computed(raw: Raw, tmp_path: Path) -> None:
    for name in (KEY, "llama.attention.value_length", "llama.rope.dimension_count"):
        raw.put(name, Value.UINT64, (1 << 31) - 8)
    assert "head_dim=2147483640" in refused(tmp_path, raw)


@pytest.mark.parametrize("lie", LIES)
def test_counts_that_lie_are_refused(lie: str, pieces: Raw, tmp_path: Path) -> None:
    untrue = LIES[lie]
    places = {
        "fields": (pieces.bytes().index(struct.pack("<Q", len(pieces.fields))), len(pieces.fields)),
        "tensors": (8, len(pieces.tensors)),
    }
    data = pieces.bytes()
    for name in (b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type"):
        at = data.index(name) + len(name) + 8
        places[name.decode()] = at, struct.unpack_from("<Q", data, at)[0]
    at = data.index(b"general.name") + len(b"general.name")
    places["length of a text"] = at + 4, struct.unpack_from("<Q", data, at + 4)[0]
    places["length of a name"] = at - 20, 12
    at = data.index(UP.encode()) + len(UP) + 4
    for i in (0, 1):
        places[f"dimension {i}"] = at + 8 * i, struct.unpack_from("<Q", data, at + 8 * i)[0]
    places["offset"] = at + 20, struct.unpack_from("<Q", data, at + 20)[0]
    tracemalloc.start()
    try:
        for what, (place, count) in places.items():
            assert struct.unpack_from("<Q", data, place)[0] == count, what
            message = refused(tmp_path, data[:place] + struct.pack("<Q", untrue(count)) + data[place + 8 :])
            assert "bad" in message
        dims = struct.pack("<I", 1 << 31) + data[at : at + 8]
        assert refused(tmp_path, data[: at - 4] + dims + data[at + 8 :])
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()


def test_long_arrays_of_a_large_file_are_refused(raw: Raw, tmp_path: Path) -> None:
    """A byte of an array becomes a Python object, so what a file may hold of them is bounded."""
    file = tmp_path / "bad.gguf"
    for kind, count in ((Value.UINT8, 1 << 26), (Value.STRING, 1 << 23), (Value.FLOAT64, 1 << 24)):
        head = raw.header()[:24] + struct.pack("<Q", 1) + b"x" + struct.pack("<IIQ", Value.ARRAY, kind, count)
        file.write_bytes(head)
        os.truncate(file, 1 << 30)  # sparse
        tracemalloc.start()
        try:
            assert "array elements" in str(refusal(file))
            assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("name", ["m-00001-of-00002.gguf", "m-00001-of-00001.gguf"])
def test_part_of_a_split_model_is_refused(name: str, raw: Raw, tmp_path: Path) -> None:
    assert "one part of a split model" in refused(tmp_path, raw, name)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "text.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.gguf")
        assert "is no file" in str(refusal(tmp_path / "pipe.gguf"))
    for name, cause in (
        ("folder", "no config.json"), ("empty", "no GGUF file"), ("text", "no GGUF file"),
        ("absent", "No such file"),
    ):  # fmt: skip
        assert cause in str(refusal(tmp_path / f"{name}.gguf"))


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_changed_header_is_exported_or_refused(data: st.DataObject, pieces: Raw, tmp_path: Path) -> None:
    content, header = bytearray(pieces.bytes()), len(pieces.header())
    # Fields of the model and descriptions of tensors; texts of the tokenizer, which are most of it, now and then.
    tokens, ends = (content.index(name) for name in (b"tokenizer.ggml.pre", b"blk.0"))
    places = st.one_of(st.integers(0, tokens), st.integers(ends, header - 1), st.integers(0, header - 1))
    if data.draw(st.booleans()):
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(places)] ^= 1 << data.draw(st.integers(0, 7))
    else:
        start, to = data.draw(places), data.draw(places)
        content[to:to] = content[start : start + data.draw(st.integers(1, 64))]
        if data.draw(st.booleans()):
            del content[start : start + 8]
    file, out = tmp_path / "changed.gguf", tmp_path / "bundle"
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with bounded_work(SOME, time.process_time):
            export(file, out, weights="fp32", center=False, overwrite=True)
    except KvqError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        model = open_bundle(out)
        assert np.isfinite(model.session().append([1, 2, 3])).all()
        assert model.encode("text")
    finally:
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
        tracemalloc.stop()
    assert {path.name for path in tmp_path.iterdir()} <= {"changed.gguf", "bundle"}
