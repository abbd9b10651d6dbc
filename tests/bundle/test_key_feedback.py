"""The feedback of a bundle's keys: what an export measures, what a session does with it, and damaged files."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from kvq.composition import open_bundle
from kvq.exporter.export import export
from kvq.runtime.bundle.bundle import Bundle, digest
from kvq.runtime.bundle.manifest import KEY_FEEDBACK, MANIFEST, Manifest
from kvq.runtime.errors import BundleError

IDS = np.random.default_rng(5).integers(0, 500, 90).tolist()


@pytest.fixture(scope="module")
def exported(tiny_checkpoint, tmp_path_factory):
    return export(str(tiny_checkpoint), tmp_path_factory.mktemp("feedback") / "bundle").path


def with_feedback(exported, folder, data):
    """A copy whose feedback has this content, listed as it should be; None: there is none, as in older bundles."""
    shutil.copytree(exported, folder)
    manifest = Manifest.of_file(folder / MANIFEST)
    if data is None:
        (folder / KEY_FEEDBACK).unlink()
        del manifest.files[KEY_FEEDBACK]
    else:
        (folder / KEY_FEEDBACK).write_bytes(data)
        manifest.files[KEY_FEEDBACK].update(nbytes=len(data), sha256=digest(folder / KEY_FEEDBACK))
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return folder


def stored(path, policy):
    session = open_bundle(path).session(policy=policy, recent=4, sink=1)
    session.append(IDS)
    return np.concatenate([keys for keys, _ in session.store.blocks(0, 1024)], axis=1), session


def test_an_export_measures_it_and_a_session_stores_keys_by_it(exported, tmp_path):
    feedback, shape = Bundle(exported).key_feedback, Bundle(exported).manifest.architecture
    assert feedback.shape == (shape.layers, shape.kv_heads, shape.head_dim, shape.head_dim)
    assert np.abs(feedback).max() > 0.05
    assert not np.tril(feedback).any()
    older = with_feedback(exported, tmp_path / "older", None)
    assert Bundle(older).key_feedback is None
    assert not np.array_equal(stored(exported, "int2")[0], stored(older, "int2")[0])
    np.testing.assert_array_equal(stored(exported, "int8")[0], stored(older, "int8")[0])
    session = stored(exported, "int2")[1]
    assert session.fork().store.codecs.feedback is not None


@pytest.mark.parametrize("change", ["short", "long", "nan", "infinity", "growing", "unread"])
def test_a_damaged_one_is_refused_by_name(exported, tmp_path, change):
    data = (exported / KEY_FEEDBACK).read_bytes()
    halves = np.frombuffer(data, "<f2").copy()
    if change in ("nan", "infinity"):
        halves[1] = np.nan if change == "nan" else np.inf
    if change == "unread":  # below the diagonal, where nothing looks today
        halves[Bundle(exported).manifest.architecture.head_dim] = np.nan
    if change == "growing":
        halves[:] = 60000
    data = {"short": data[:-2], "long": data + bytes(2)}.get(change, halves.tobytes())
    folder = with_feedback(exported, tmp_path / "bundle", data)
    with pytest.raises(BundleError, match=KEY_FEEDBACK):  # when it is loaded, not when it is used
        open_bundle(folder)
