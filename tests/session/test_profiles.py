"""Sessions of a model whose classes have precisions by layer: bytes, both backends, files, forks, trims."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kvq.composition import open_bundle
from kvq.runtime.bundle.manifest import MANIFEST
from kvq.runtime.compute.backends import BACKENDS
from kvq.runtime.errors import BundleError, SessionError
from kvq.runtime.kv.records import stored_tokens
from tests.tools.command_line import kvq
from tests.tools.kvdata import arrays_in
from tests.tools.profiles import PROFILES, with_profiles
from tests.tools.session_files import contents, continued, sealed, split

IDS = np.random.default_rng(0).integers(1, 512, 150).tolist()
AVAILABLE = sorted(name for name, backend in BACKENDS.items() if not backend.unavailable())
every_backend = pytest.mark.parametrize("backend", AVAILABLE)
POLICIES = ("int3", "int4", "k8v4", "mixed", "random")


@pytest.fixture(scope="module")
def profiled(tiny_bundle, tmp_path_factory):
    return open_bundle(with_profiles(tiny_bundle, tmp_path_factory.mktemp("profiled") / "tiny"))


def session_of(model, policy, backend, **options):
    session = model.session(policy, recent=5, sink=2, backend=backend, **options)
    session.append(IDS[:120])
    for token in IDS[120:]:
        session.append([token])
    return session


@every_backend
@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_are_those_of_the_layers(profiled, policy, backend):
    store = session_of(profiled, policy, backend).store
    assert sum(row["nbytes"] for row in store.account().values()) == store.nbytes
    assert sum(x.nbytes for x in arrays_in(store)) == store.nbytes
    assert stored_tokens(store).nbytes.sum() == store.used_nbytes
    for pair, bucket in store.buckets.items():
        by_layer = PROFILES.get(str(pair), [[*pair]] * 3)
        vectors = [{2: 6, 3: 10, 4: 6, 5: 6, 8: 10, 16: 16}[id_] for own in by_layer for id_ in own]
        assert bucket.token_bytes == 4 * sum(vectors) + 4, str(pair)
        for page in bucket.pages:
            for side, parts in ((0, page.keys), (1, page.values)):
                held = [parts.slots_of(layer)[0].codec.precision.id for layer in range(3)]
                assert held == [own[side] for own in by_layer]


@pytest.mark.skipif("native" not in AVAILABLE, reason="the native library was not built")
@pytest.mark.parametrize("policy", POLICIES)
def test_both_backends_store_the_same_classes_and_say_the_same(profiled, policy):
    sessions = [session_of(profiled, policy, backend) for backend in ("native", "numpy")]
    assert sessions[0].store.account() == sessions[1].store.account()
    assert np.abs(sessions[0].last_logits - sessions[1].last_logits).max() < 0.1


def test_a_profile_changes_what_its_class_is_read_as(profiled, tiny_model):
    ours, plain = (session_of(model, "int3", "numpy") for model in (profiled, tiny_model))
    assert ours.store.used_nbytes == plain.store.used_nbytes - 4 * 12 * (150 - 5 - 2)
    assert np.abs(ours.last_logits - plain.last_logits).max() > 0.01
    ours, plain = (session_of(model, "int2", "numpy") for model in (profiled, tiny_model))
    np.testing.assert_array_equal(ours.last_logits, plain.last_logits)


@every_backend
@pytest.mark.parametrize("policy", POLICIES)
def test_a_file_gives_the_session_back(profiled, policy, backend, tmp_path):
    session = session_of(profiled, policy, backend)
    session.save(tmp_path / "kept.kvq")
    loaded = profiled.load_session(tmp_path / "kept.kvq", backend=backend)
    assert contents(loaded) == contents(session)
    assert split(tmp_path / "kept.kvq")[0]["architecture"]["profiles"] == PROFILES
    assert continued(loaded, 20) == continued(session, 20)


@every_backend
def test_forks_and_trims_go_their_own_way(profiled, backend):
    session = session_of(profiled, "mixed", backend)
    twin = session.fork()
    before = contents(session)
    twin.append(IDS[:40])
    twin.trim(60)
    assert contents(session) == before
    fresh = session_of(profiled, "mixed", backend)
    fresh.append(IDS[:40])
    fresh.trim(60)
    assert contents(twin) == contents(fresh)
    twin.append(IDS[60:90])
    fresh.append(IDS[60:90])
    assert contents(twin) == contents(fresh)


def test_a_model_with_other_profiles_refuses_the_file(profiled, tiny_model, tmp_path):
    for writer, reader in ((profiled, tiny_model), (tiny_model, profiled)):
        session_of(writer, "int3", "numpy").save(tmp_path / "kept.kvq")
        with pytest.raises(SessionError, match="other precisions by layer than this bundle's"):
            reader.load_session(tmp_path / "kept.kvq")


@pytest.mark.parametrize(
    "profiles",
    [{"k3v3": [[16, 3]] * 3}, {"k3v3": [[3, 3]] * 2}, {"k3v3": [[3, 7]] * 3}, {"int3": [[3, 3]] * 3}, {"k3v3": 3}, [1]],
    ids=str,
)
def test_a_header_with_profiles_that_cannot_be_is_refused(profiled, profiles, tmp_path):
    session_of(profiled, "int3", "numpy").save(tmp_path / "kept.kvq")
    header, payload = split(tmp_path / "kept.kvq")
    header["architecture"]["profiles"] = profiles
    (tmp_path / "kept.kvq").write_bytes(sealed(header, payload))
    with pytest.raises(SessionError, match=r"makes no sense|bytes follow") as caught:
        profiled.load_session(tmp_path / "kept.kvq")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("profiles", "says"),
    [
        ({"k3v3": [[16, 3]] * 3}, "k3v3 takes more bytes than its class"),
        ({"k3v3": [[3, 3]] * 2}, "of 2 layers, the model has 3"),
        ({"k3v3": [[3, 3]] * 4}, "of 4 layers, the model has 3"),
        ({"k8v8": [[3, 3]] * 3}, "k8v8 is of a class that protects tokens"),
        ({"k16v16": [[3, 3]] * 3}, "k16v16 is of a class that protects tokens"),
        ({"k3v3": [[3, 7]] * 3}, "unknown precisions"),
        ({"k3v3": [[3, True]] * 3}, "a layer of profile k3v3 is True"),
        ({"k3v3": [[3]] * 3}, "a layer of profile k3v3"),
        ({"k3v3": [[3, 3, 3]] * 3}, "a layer of profile k3v3"),
        ({"k3v3": {"0": [3, 3]}}, "profile k3v3"),
        ({"int3": [[3, 3]] * 3}, "'int3', which is no class"),
        ([["k3v3", [[3, 3]] * 3]], "profiles is"),
    ],
    ids=str,
)
def test_a_manifest_with_profiles_that_cannot_be_is_refused(tiny_bundle, profiles, says, tmp_path):
    folder = with_profiles(tiny_bundle, tmp_path / "bundle")
    data = json.loads((folder / MANIFEST).read_text())
    data["architecture"]["profiles"] = profiles
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="damaged") as caught:
        open_bundle(folder)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_show_names_them(tiny_bundle, tmp_path):
    folder = with_profiles(tiny_bundle, tmp_path / "bundle")
    shown, plain = kvq("show", folder), kvq("show", tiny_bundle)
    assert "by layer     k2v8 at 2.0 + 5.0 bits, k3v3 at 4.3 + 4.7 bits" in shown.stdout
    assert "by layer     all layers alike" in plain.stdout
    assert json.loads(kvq("show", folder, "--json").stdout)["architecture"]["profiles"] == PROFILES
