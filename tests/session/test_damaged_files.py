"""Session files that are cut, changed or no files: each is a one-line SessionError, and costs no memory."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.runtime.cli.info import _session as info
from kvq.runtime.errors import SessionError
from tests.tools.bad_sessions import IDS, refused
from tests.tools.kvdata import examples
from tests.tools.session_files import START, continued, sealed, split


def test_the_good_file_is_good(tiny_model, good):
    session = tiny_model.load_session(good)
    assert session.tokens == IDS
    assert split(good)[0]["logits"]
    assert continued(session, 3)


# The file as a whole: name -> (bytes of the good file -> bytes, words of the message).
BYTES = {
    "empty": (lambda b: b"", "not a session file"),
    "text": (lambda b: b"Once upon a time", "not a session file"),
    "half of the magic": (lambda b: b[:4], "cut off"),
    "magic alone": (lambda b: b[:8], "cut off"),
    "preamble without its last byte": (lambda b: b[: START.size - 1], "cut off"),
    "preamble alone": (lambda b: b[: START.size], "cut off in its header"),
    "cut in the header": (lambda b: b[: START.size + 50], "cut off in its header"),
    "another magic": (lambda b: b"GGUF" + b[4:], "not a session file"),
    "a later version": (lambda b: b[:8] + struct.pack("<I", 2) + b[12:], "format version 2, this kvq reads 1"),
    "version 0": (lambda b: b[:8] + struct.pack("<I", 0) + b[12:], "format version 0"),
    "big-endian version": (lambda b: b[:8] + struct.pack(">I", 1) + b[12:], "format version 16777216"),
    "header of no bytes": (lambda b: b[:12] + struct.pack("<I", 0) + b[16:], "another sha256"),
    "header of 4 GB": (lambda b: b[:12] + struct.pack("<I", 2**32 - 1) + b[16:], "a header of 4294967295 bytes"),
    "header of 16 MB": (lambda b: b[:12] + struct.pack("<I", 1 << 24) + b[16:], "cut off in its header"),
    "header one byte shorter": (lambda b: b[:12] + struct.pack("<I", START.unpack(b[:48])[2] - 1) + b[16:], "sha256"),
    "header changed": (lambda b: b.replace(b'"recent": 5', b'"recent": 4'), "its header has another sha256"),
    "payload without its last byte": (lambda b: b[:-1], "is cut off"),
    "half of the payload": (lambda b: b[: len(b) // 2], "is cut off"),
    "payload missing": (lambda b: b[: START.size + START.unpack(b[:48])[2]], "is cut off"),
    "a byte behind the end": (lambda b: b + b"\0", "has bytes behind its end"),
    "itself behind the end": (lambda b: b + b, "has bytes behind its end"),
    "first payload byte changed": (lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:], "is damaged"),
    "last payload byte changed": (lambda b: b[:-1] + bytes([b[-1] ^ 128]), "is damaged"),
}


@pytest.mark.parametrize("name", BYTES)
def test_a_damaged_file_is_refused(tiny_model, good, tmp_path, name):
    change, words = BYTES[name]
    path = tmp_path / "bad.kvq"
    path.write_bytes(change(good.read_bytes()))
    refused(tiny_model, path, words, str(path))


TEXTS = {
    "not UTF-8": b"\xff\xfe",
    "not JSON": b"{",
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "nested too deep": b"[" * 1_000_000,
    "a number of a million digits": b'{"tokens": ' + b"9" * 1_000_000 + b"}",
    "nothing": b"",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_header_that_is_none_is_refused(tiny_model, tmp_path, name):
    path = tmp_path / "bad.kvq"
    path.write_bytes(sealed(TEXTS[name], b""))
    with pytest.raises(SessionError, match="makes no sense") as caught:
        tiny_model.load_session(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(SessionError):
        info(path)


def test_what_is_no_file_is_refused(tiny_model, good, tmp_path):
    (tmp_path / "folder.kvq").mkdir()
    (tmp_path / "link.kvq").symlink_to(good)
    (tmp_path / "lost.kvq").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.kvq")
    for name, words in (
        ("folder.kvq", "is a folder"), ("link.kvq", "is a link"), ("lost.kvq", "is a link"),
        ("pipe.kvq", "not a regular file"), ("missing.kvq", "no session file"), ("missing/x.kvq", "no session file"),
        ("folder.kvq/x", "no session file"), ("x" * 300, "is no name for a session file"),
    ):  # fmt: skip
        refused(tiny_model, tmp_path / name, words)
    for device in ("/dev/null", "/dev/zero"):
        refused(tiny_model, device, "not a regular file")


def test_a_link_or_a_folder_is_not_overwritten(tiny_model, good, tmp_path):
    session = tiny_model.load_session(good)
    (tmp_path / "folder.kvq").mkdir()
    (tmp_path / "link.kvq").symlink_to(tmp_path / "nowhere")
    for name in ("folder.kvq", "link.kvq"):
        with pytest.raises(SessionError, match="no session replaces"):
            session.save(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.kvq", "link.kvq"]


def test_a_file_of_another_model_is_refused_by_name(good):
    import kvq

    refused(kvq.load(), good, "belongs to the model 'tiny'", "this is 'kvq-books'", "its own model")


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(tiny_model, good, tmp_path, monkeypatch):
    import kvq.runtime.session.file as session_file

    path = tmp_path / "shrinking.kvq"
    path.write_bytes(good.read_bytes())
    check = session_file._check_model

    def shrink(*arguments):
        os.truncate(path, path.stat().st_size - 100)
        check(*arguments)

    monkeypatch.setattr(session_file, "_check_model", shrink)
    with pytest.raises(SessionError, match="became shorter"):
        tiny_model.load_session(path)


@pytest.mark.slow
@given(place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
@examples(150)
def test_a_file_with_any_byte_changed_is_refused(tiny_model, good, tmp_path_factory, place, mask):
    data = bytearray(good.read_bytes())
    data[int(place * len(data))] ^= mask
    path = tmp_path_factory.getbasetemp() / "flipped.kvq"
    path.write_bytes(data)
    with pytest.raises(SessionError) as caught:
        tiny_model.load_session(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(SessionError):
        info(path)


@given(place=st.floats(0, 1, exclude_max=True))
@examples(80)
def test_a_file_cut_anywhere_is_refused(tiny_model, good, tmp_path_factory, place):
    data = good.read_bytes()
    path = tmp_path_factory.getbasetemp() / "cut.kvq"
    path.write_bytes(data[: int(place * len(data))])
    with pytest.raises(SessionError):
        tiny_model.load_session(path)


@pytest.mark.parametrize("held", [b"notes", b"K", b"", b"KVQSESS\nold", b"KVQ"], ids=repr)
def test_a_save_takes_no_place_of_what_is_no_session(held, tmp_path, tiny_model):
    """An empty file, a session, even a torn one, is replaced: nobody misses it."""
    session = tiny_model.session()
    session.append([1, 2, 3])
    path = tmp_path / "file"
    path.write_bytes(held)
    if held == b"notes":
        with pytest.raises(SessionError, match="no session file and would be lost") as caught:
            session.save(path)
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == held
        session.save(path, overwrite=True)
        assert tiny_model.load_session(path).tokens == session.tokens
    else:
        session.save(path)
        assert tiny_model.load_session(path).tokens == session.tokens
    assert list(tmp_path.iterdir()) == [path]
