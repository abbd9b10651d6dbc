"""Precisions by layer and keys that turn, from a stranger: in bundles and in session files, refused or harmless."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import time

import numpy as np
import pytest

import kvq
from kvq.composition import open_bundle
from kvq.exporter.export import export
from kvq.runtime.bundle.manifest import KEY_TURNS
from kvq.runtime.session.header import _parse
from tests.attacks.conftest import refused
from tests.fuzz.targets import HEADER
from tests.tools.bundles import edit
from tests.tools.session_files import continued, sealed, split
from tests.tools.work import bounded_work

LAYERS, KV_HEADS, HEAD_DIM = 3, 4, 8
MOST_PAIRS = HEAD_DIM // 2
# Profiles in kvq.json, and why they are refused; "": they are not.
PROFILES = {
    "every class there is": ({f"k{k}v{v}": [[k, v]] * LAYERS for k in (2, 3, 4) for v in (2, 3, 4)}, ""),
    "fewer bits than the class": ({"k3v3": [[2, 2]] * LAYERS}, ""),
    "bits of the other side": ({"k16v2": [[2, 16]] * LAYERS}, ""),
    "none": ({}, ""),
    "an unknown class": ({"k9v9": [[2, 2]] * LAYERS}, "no class"),
    "a class of codes that have no name": ({"k5v5": [[5, 5]] * LAYERS}, "no class"),
    "an empty class": ({"": [[2, 2]] * LAYERS}, "no class"),
    "a class that moves the cursor": ({"\x1b[2J": 1}, "no class"),
    "a class of 5,000 characters": ({"k3v3" + "x" * 5000: [[2, 2]] * LAYERS}, "too long"),
    "a hundred thousand layers": ({"k3v3": [[3, 3]] * 100_000}, "profile k3v3 is"),
    "no layers": ({"k3v3": []}, "of 0 layers"),
    "more bytes in one layer than all had": ({"k2v2": [[2, 2]] * (LAYERS - 1) + [[16, 16]]}, "more bytes"),
    "lists in lists": ({"k3v3": [[[3], 3]] * LAYERS}, "a layer of profile"),
    "fractions": ({"k3v3": [[3.0, 3]] * LAYERS}, "a layer of profile"),
    "a negative precision": ({"k3v3": [[-1, 3]] * LAYERS}, "a layer of profile"),
    "a precision of nothing": ({"k3v3": [[0, 3]] * LAYERS}, "a layer of profile"),
    "a precision of 255": ({"k3v3": [[255, 255]] * LAYERS}, "a layer of profile"),
    "a precision of 2^53": ({"k3v3": [[1 << 53, 3]] * LAYERS}, "a layer of profile"),
    "texts": ({"k3v3": ["33"] * LAYERS}, "a layer of profile"),
    "objects": ({"k3v3": [{"0": 3, "1": 3}] * LAYERS}, "a layer of profile"),
    "a class that protects": ({"k8v8": [[2, 2]] * LAYERS}, "protects tokens"),
    "null": (None, "profiles is"),
    "a text": ("k3v3", "profiles is"),
    "a hundred classes": ({f"k{number}v2": [] for number in range(100)}, "profiles is"),
}


def turned(pairs, frequency, vector):
    """A file of turns that are all alike."""
    return (
        np.full(LAYERS * pairs, frequency, "<f4").tobytes()
        + np.full(LAYERS * KV_HEADS * pairs * 2 * HEAD_DIM, vector, "<f2").tobytes()
    )


TURNS = {
    "as many pairs as there are": (turned(MOST_PAIRS, 4, 1), ""),
    "another frequency in each layer": (
        np.linspace(0.1, 4, LAYERS * 2).astype("<f4").tobytes() + turned(2, 1, 1)[LAYERS * 2 * 4 :], "",
    ),
    "as far as keys may turn": (turned(1, 1, 8192), ""),
    "backwards": (turned(2, -4, 1), ""),
    "the least frequency there is": (turned(2, 1e-45, 1), ""),
    "the least vectors there are": (turned(MOST_PAIRS, 4, 6e-8), ""),
    "zeros with a sign": (turned(3, -0.0, -0.0), ""),
    "a pair too many": (turned(MOST_PAIRS + 1, 1, 1), "larger than"),
    "further than keys may turn": (turned(1, 1, 8200), "too far"),
    "the largest halves": (turned(1, 1, 65504), "too far"),
    "the least halves": (turned(1, 1, -65504), "too far"),
    "the largest frequency": (turned(1, 3e38, 0), "too far"),
    "faster than any": (turned(2, 4.1, 1), "too far"),
    "faster than any, backwards": (turned(2, -4.1, 1), "too far"),
    "a frequency that is no number": (turned(1, np.nan, 1), "no number"),
    "one that is no number, of nothing": (turned(1, np.nan, 0), "no number"),
    "a frequency without end": (turned(1, np.inf, 0), "no number"),
    "vectors that are no numbers": (turned(1, 1, np.nan), "no number"),
    "vectors without end": (turned(1, 1, -np.inf), "no number"),
    "nothing": (b"", "no number of pairs"),
    "a byte": (b"\0", "no number of pairs"),
    "a byte too few": (turned(1, 1, 1)[:-1], "no number of pairs"),
    "a zip": (b"PK\x03\x04" + bytes(100), "no number of pairs"),
}  # fmt: skip


@pytest.fixture(scope="module")
def turning(tiny_checkpoint, tmp_path_factory):
    """A bundle as an export makes it, with turns. Read only."""
    return export(str(tiny_checkpoint), tmp_path_factory.mktemp("turning") / "bundle").path


@pytest.fixture
def bundle(turning, tmp_path):
    return shutil.copytree(turning, tmp_path / "bundle")


def used(folder):
    """What is accepted is used: both backends read what they stored, saved and loaded."""
    found = []
    for backend in ("numpy", "native"):
        session = open_bundle(folder).session("mixed", recent=4, sink=1, backend=backend)
        session.append(np.arange(1, 91).tolist())
        assert np.isfinite(session.last_logits).all()
        found.append(session.last_logits.copy())  # before it goes on: of two that are near, backends may say either
        session.save(folder.parent / "text.kvq")
        again = open_bundle(folder).load_session(folder.parent / "text.kvq", backend=backend)
        assert continued(again, 5) == continued(session, 5)
    assert np.abs(found[0] - found[1]).max() < 0.05 * np.abs(found[0]).max() + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", PROFILES)
def test_profiles_of_a_bundle(bundle, name):
    profiles, words = PROFILES[name]
    edit(bundle, lambda data: data["architecture"].update(profiles=profiles))
    refused(bundle, words) if words else used(bundle)


def put(folder, content):
    (folder / KEY_TURNS).unlink()
    (folder / KEY_TURNS).write_bytes(content)
    entry = {"nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(folder, lambda data: data["files"].update({KEY_TURNS: entry}))


@pytest.mark.slow
@pytest.mark.parametrize("name", TURNS)
def test_turns_of_a_bundle(bundle, name):
    content, words = TURNS[name]
    put(bundle, content)
    refused(bundle, words) if words else used(bundle)


@pytest.mark.parametrize("kind", ["link", "pipe", "missing", "head"])
def test_a_file_of_turns_that_is_none(bundle, kind):
    words = "not a regular file"
    if kind == "head":
        edit(bundle, lambda data: data.update(head=KEY_TURNS))
        words = "readable ONNX|refused"
    else:
        (bundle / KEY_TURNS).unlink()
    if kind == "link":
        (bundle.parent / "aim").write_bytes(turned(1, 1, 1))
        (bundle / KEY_TURNS).symlink_to(bundle.parent / "aim")
    if kind == "pipe":
        os.mkfifo(bundle / KEY_TURNS)
    refused(bundle, words)


HUGE = 10**400
MANY = 1 << 31
PAIR = [[3, 3]] * LAYERS
# Fields of a header's architecture, and of the header; why it is refused.
HEADERS = {
    "layers of 2^31 and profiles of three": ({"layers": MANY, "profiles": {"k3v3": PAIR}}, {}, "the model has"),
    "layers of 2^31 and windows of three": ({"layers": MANY, "windows": [0, 5, 0]}, {}, "windows of"),
    "layers of 10^400 with profiles": ({"layers": HUGE, "profiles": {"k3v3": PAIR}}, {}, "layers is"),
    "layers of nothing with profiles": ({"layers": 0, "profiles": {"k3v3": []}}, {}, "layers is"),
    "layers of true with profiles of one": ({"layers": True, "profiles": {"k3v3": [[3, 3]]}}, {}, "layers is"),
    "heads of 2^31 with profiles": ({"kv_heads": MANY + 1, "profiles": {"k3v3": PAIR}}, {}, "kv_heads is"),
    "profiles of 1,025 layers": ({"layers": 1025, "profiles": {"k3v3": [[3, 3]] * 1025}}, {}, "profile k3v3"),
    "profiles of an unknown class": ({"profiles": {"k9v9": PAIR}}, {}, "no class"),
    "profiles of more bytes": ({"profiles": {"k2v2": [[16, 16]] * LAYERS}}, {}, "more bytes"),
    "profiles of what protects": ({"profiles": {"k16v16": [[2, 2]] * LAYERS}}, {}, "protects"),
    "profiles of null": ({"profiles": None}, {}, "profiles is"),
    "profiles of 100,000 layers": ({"profiles": {"k3v3": [[3, 3]] * 100_000}}, {}, "values|profile k3v3"),
    "windows of true": ({"windows": [True] * LAYERS}, {}, "window"),
    "windows below nothing": ({"windows": [-1] * LAYERS}, {}, "window"),
    "windows of 100,000 layers": ({"windows": [5] * 100_000}, {}, "window"),
    "narrow pages without windows": ({}, {"narrow": [1, 0]}, "narrow pages"),
    "narrow pages of 2^40": ({"windows": [0, 5, 0]}, {"narrow": [1 << 40, 0]}, "narrow pages"),
    "narrow pages of true": ({"windows": [0, 5, 0]}, {"narrow": [True, 0]}, "narrow pages"),
    "narrow pages of one bucket too many": ({}, {"narrow": [0, 0, 0]}, "narrow is no list"),
    "narrow pages of null": ({}, {"narrow": None}, "narrow is no list"),
    "a field of turns": ({"turns": 1}, {}, "other fields"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_contradicts_itself(name):
    shape, fields, words = HEADERS[name]
    header = copy.deepcopy(HEADER) | fields
    header["architecture"] |= shape
    with bounded_work(clock=time.process_time), pytest.raises(kvq.SessionError, match=words) as caught:
        _parse(json.dumps(header).encode(), "file")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.slow
def test_pages_of_other_profiles_than_the_header_s_are_refused(bundle, tmp_path):
    """The payload of a model without profiles, under a header that has some, for a model that has them."""
    plain = open_bundle(bundle).session("int3", recent=4, sink=1)
    plain.append(np.arange(1, 91).tolist())
    plain.save(tmp_path / "text.kvq")
    header, payload = split(tmp_path / "text.kvq")
    for profile, words in (([[2, 3], [3, 2], [2, 2]], "are stated"), ([[3, 2], [3, 3], [2, 3]], "are stated")):
        edit(bundle, lambda data, own=profile: data["architecture"].update(profiles={"k3v3": own}))
        model = open_bundle(bundle)
        header["architecture"]["profiles"] = {"k3v3": profile}
        (tmp_path / "text.kvq").write_bytes(sealed(header, payload))
        with pytest.raises(kvq.SessionError, match=words):
            model.load_session(tmp_path / "text.kvq")
    header["architecture"]["profiles"] = {"k3v3": [[2, 3], [3, 3], [3, 2]]}
    (tmp_path / "text.kvq").write_bytes(sealed(header, payload[: -len(payload) // 2]))
    with pytest.raises(kvq.SessionError, match=r"are stated|other precisions by layer"):
        model.load_session(tmp_path / "text.kvq")
