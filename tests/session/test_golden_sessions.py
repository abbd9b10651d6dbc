"""Session files written elsewhere: every instruction set and numpy read them alike, and write them back unchanged."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kvq.runtime.errors import BackendError
from kvq.runtime.native.library import kernels
from tests.golden.make import FOLDER, content_digest
from tests.tools.session_files import continued, split

GOLDEN = json.loads((FOLDER / "golden.json").read_text())
try:
    READERS = ["numpy", *kernels()]
except BackendError:  # no native library here
    READERS = ["numpy"]


def load(embedded, name, reader, monkeypatch):
    if reader == "numpy":
        return embedded.load_session(FOLDER / f"{name}.kvq", backend="numpy")
    monkeypatch.setenv("KVQ_NATIVE_ISA", reader)
    session = embedded.load_session(FOLDER / f"{name}.kvq", backend="native")
    assert session.stats().backend_detail == reader
    return session


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("reader", READERS)
def test_every_instruction_set_reads_the_same_and_goes_on_with_the_same_text(
    embedded, name, reader, monkeypatch, tmp_path
):
    expected = GOLDEN[name]
    session = load(embedded, name, reader, monkeypatch)
    assert (session.tokens, session.pending) == (expected["tokens"], expected["pending"])
    assert content_digest(session) == expected["content_sha256"]
    assert session.metadata == {"title": "Golden, größer als ASCII", "pages": [1, 2.5, None, True]}
    session.save(tmp_path / "again.kvq")
    header, payload = split(FOLDER / f"{name}.kvq")
    again, same = split(tmp_path / "again.kvq")
    assert same == payload
    assert again | {"kvq": ""} == {"prefill": "auto", "protect_bits": 16} | header | {
        "kvq": ""
    }  # older files lack these
    assert [token for token, _ in continued(session, 12)] == expected["next"]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_bytes_are_where_docs_sessions_says_and_little_endian(embedded, name):
    """Read without any of kvq's code: ids, positions, and the values of the tokens at 8 and 2 bits."""
    header, payload = split(FOLDER / f"{name}.kvq")
    shape = header["architecture"]
    layers, heads, dim = shape["layers"], shape["kv_heads"], shape["head_dim"]
    at = 0

    def take(count, dtype):
        nonlocal at
        part = np.frombuffer(payload, dtype, count, at)
        at += part.nbytes
        return part

    assert take(header["tokens"], "<u4").tolist() == GOLDEN[name]["tokens"]
    if header["logits"]:
        assert take(shape["vocab"], "<f4").argmax() == GOLDEN[name]["next"][0]
    places = []
    for k, v, count in header["buckets"]:
        left, capacity = count, 0
        while left:
            page = 16 if not capacity else min(capacity, 128)
            capacity += page
            n = min(page, left)
            left -= n
            places += take(n, "<i4").tolist()
            take(layers * heads * n * dim * k // 8, "u1")
            assert (take(layers * heads * n * (k < 16), "<f2") > 0).all()
            take(layers * heads * n * dim * v // 8, "u1")
            assert (take(layers * heads * n * (v < 16), "<f2") > 0).all()
    assert sorted(places) == list(range(header["tokens"] - header["window"]))
    for _ in ("keys", "values"):
        codes = take(layers * heads * header["window"] * dim, "<i2").reshape(-1, dim)
        assert (abs(codes).max(axis=1) >= 32700).all()  # a scale is that of the largest value
        assert (take(len(codes), "<f2") > 0).all()
    assert {2, 4, 8, 16} >= set(take(2 * header["window"], "u1").tolist())
    assert at == len(payload)
