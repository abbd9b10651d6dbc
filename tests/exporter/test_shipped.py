"""What comes with the package for a known file of weights: controllers, and precisions by layer."""

from __future__ import annotations

import json

import pytest

from kvq.exporter.export import export
from kvq.models import shipped
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.bundle.profiles import check_profiles, json_of, profiles_of
from kvq.runtime.precision.table import Geometry, Pair
from tests.tools.checkpoints import TINY, save_checkpoint

WIDE = TINY | {"head_dim": 64, "num_hidden_layers": 2}
# One byte for another: keys of the first layer get what those of the second have less.
PROFILES = {"k3v3": [[4, 3], [2, 3]]}


@pytest.fixture
def known(tmp_path, monkeypatch):
    """A folder of the package's as `shipped` would find it, for any source."""
    folder = tmp_path / "known"
    folder.mkdir()
    (folder / shipped.PROFILES).write_text(json.dumps(PROFILES), encoding="utf-8")
    monkeypatch.setattr(shipped, "shipped", lambda sha256: (folder, {}))
    return folder


def exported(tmp_path, **options):
    checkpoint = tmp_path / "checkpoint"
    if not checkpoint.exists():
        save_checkpoint(checkpoint, WIDE)
    return export(str(checkpoint), tmp_path / "bundle", weights="int8", block=32, overwrite=True, **options)


def test_an_export_of_a_known_file_gets_its_precisions_by_layer(known, tmp_path):
    done = exported(tmp_path)
    assert json_of(done.manifest.architecture.profiles) == PROFILES
    assert json_of(Bundle(done.path).manifest.architecture.profiles) == PROFILES
    assert "precisions by layer: k3v3" in "\n".join(done.lines())
    assert exported(tmp_path, profiles=False).manifest.architecture.profiles == ()


def test_keys_of_another_kind_get_none(known, tmp_path):
    assert exported(tmp_path, keys="plain").manifest.architecture.profiles == ()


def test_a_known_file_without_them_has_none(known, tmp_path):
    (known / shipped.PROFILES).unlink()
    assert exported(tmp_path).manifest.architecture.profiles == ()


def test_those_of_the_package_fit_its_controllers():
    folder, controllers = shipped.shipped("b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
    profiles = profiles_of(json.loads((folder / shipped.PROFILES).read_text(encoding="utf-8")))
    geometry = Geometry(30, 3, 64, profiles=profiles)
    check_profiles(geometry)
    entry = controllers["adaptive"]
    for pair, nbytes in zip(entry["classes"], entry["bytes"], strict=True):
        assert geometry.token_bytes(Pair(*pair)) <= nbytes
