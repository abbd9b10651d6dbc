"""What turns of a bundle's keys: what an export writes, what a session does with it, and damage."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from kvq.composition import open_bundle
from kvq.exporter.export import export
from kvq.runtime.bundle.bundle import Bundle, digest
from kvq.runtime.bundle.manifest import KEY_TURNS, MANIFEST, Manifest
from kvq.runtime.errors import BundleError, SessionError

IDS = np.random.default_rng(5).integers(0, 500, 90).tolist()


@pytest.fixture(scope="module")
def exported(tiny_checkpoint, tmp_path_factory):
    return export(str(tiny_checkpoint), tmp_path_factory.mktemp("turns") / "bundle").path


def with_turns(exported, folder, data):
    """A copy whose turns have this content, listed as it should be; None: there are none, as in older bundles."""
    shutil.copytree(exported, folder)
    manifest = Manifest.of_file(folder / MANIFEST)
    if data is None:
        (folder / KEY_TURNS).unlink()
        del manifest.files[KEY_TURNS]
    else:
        (folder / KEY_TURNS).write_bytes(data)
        manifest.files[KEY_TURNS] = {"nbytes": len(data), "sha256": digest(folder / KEY_TURNS)}
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return folder


def run(path, policy, backend="numpy", prefill="stepwise"):
    session = open_bundle(path).session(policy=policy, recent=4, sink=1, backend=backend, prefill=prefill)
    session.append(IDS)
    return session


def codes(session):
    pages = [page for bucket in session.store.buckets.values() for page in bucket.pages]
    return [slots.codes.tobytes() for page in pages for slots in page.keys.slots]


def test_an_export_measures_it_and_a_session_stores_keys_by_it(exported, tmp_path):
    turns, shape = Bundle(exported).key_turns, Bundle(exported).manifest.architecture
    assert turns.vectors.shape[:2] == (shape.layers, shape.kv_heads)
    assert turns.which.max() >= 0
    older = with_turns(exported, tmp_path / "older", None)
    assert Bundle(older).key_turns is None
    ours, others = (run(path, "int2") for path in (exported, older))
    assert codes(ours) != codes(others)
    assert ours.fork().store.codecs.turns is not None
    for mixed in ("int8", "fp16"):
        assert codes(run(exported, mixed)) == codes(run(older, mixed))


@pytest.mark.parametrize("policy", ["int2", "int4", "k8v4"])
@pytest.mark.parametrize("prefill", ["stepwise", "chunked"])
def test_both_backends_read_what_they_stored(exported, policy, prefill):
    rows = [run(exported, policy, backend, prefill) for backend in ("numpy", "native")]
    # A code on a border falls either way, and what follows it differs.
    assert np.abs(rows[0].last_logits - rows[1].last_logits).max() < 0.05 * np.abs(rows[0].last_logits).max()


def test_a_session_s_file_belongs_to_a_bundle_that_turns_as_its_own(exported, tmp_path):
    session = run(exported, "int2")
    session.save(tmp_path / "text.kvq")
    again = open_bundle(exported).load_session(tmp_path / "text.kvq")
    assert codes(again) == codes(session)
    older = with_turns(exported, tmp_path / "older", None)
    halved = bytearray((exported / KEY_TURNS).read_bytes())
    halved[-2:] = bytes(2)
    other = with_turns(exported, tmp_path / "other", bytes(halved))
    for path in (older, other):
        with pytest.raises(SessionError, match="belongs to the model"):
            open_bundle(path).load_session(tmp_path / "text.kvq")


@pytest.mark.parametrize("change", ["short", "long", "empty", "nan", "infinity", "far"])
def test_a_damaged_one_is_refused_by_name(exported, tmp_path, change):
    data = (exported / KEY_TURNS).read_bytes()
    halves = np.frombuffer(data, "<f2").copy()
    if change in ("nan", "infinity"):
        halves[-1] = np.nan if change == "nan" else np.inf
    if change == "far":
        halves[-100:] = 60000
    data = {"short": data[:-2], "long": data + bytes(2), "empty": b""}.get(change, halves.tobytes())
    folder = with_turns(exported, tmp_path / "bundle", data)
    with pytest.raises(BundleError, match=KEY_TURNS):  # when it is loaded, not when it is used
        open_bundle(folder)
