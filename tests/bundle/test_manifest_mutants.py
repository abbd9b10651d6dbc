"""Manifests changed at random: each is refused in one line, or is a manifest with every field in its bounds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

import kvq
from kvq.runtime.bundle import limits
from kvq.runtime.bundle.manifest import MANIFEST, Manifest
from kvq.runtime.errors import BundleError
from tests.tools.profiles import PROFILES

STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 40),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([10**400, 1 << 63, -1, 0, "", "../x", "\x1b[2J", "\ud800", "head.onnx", "kvq.json", [], {}, [[]]]),
    st.lists(st.integers(-1, 20), max_size=4),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=3),
)


@pytest.fixture(scope="module", params=["tiny", "books", "windowed", "profiled"])
def text(request: pytest.FixtureRequest, tiny_bundle: Path) -> str:
    folder = kvq.load("kvq-books").path if request.param == "books" else tiny_bundle
    content = json.loads((folder / MANIFEST).read_text())
    if request.param == "windowed":
        content["format_version"] = 3
        content["architecture"]["windows"] = [8] * (content["architecture"]["layers"] - 1) + [0]
    if request.param == "profiled":
        content["architecture"]["profiles"] = PROFILES
    return json.dumps(content, indent=1)


def read(content: str) -> Manifest | None:
    """The manifest, with its bounds looked at once more; None where it is refused."""
    try:
        manifest, refused = Manifest.from_json(content), ""
    except BundleError as error:
        manifest, refused = None, str(error)
    assert len(refused.splitlines()) <= 1
    assert len(refused) < 600
    if manifest is None:
        return None
    shape = asdict(manifest.architecture)
    windows, profiles = shape.pop("windows"), shape.pop("profiles")
    assert all(len(by_layer) == shape["layers"] for _, by_layer in profiles)
    assert all({1 <= k <= 31, 1 <= v <= 31} == {True} for _, by_layer in profiles for k, v in by_layer)
    assert not windows or (len(windows) == shape["layers"] and any(windows))
    assert all(type(window) is int and 0 <= window <= 1 << 24 for window in windows)
    assert all(type(value) is int and 0 < value <= 1 << 24 for value in shape.values())
    assert manifest.name.isprintable()
    assert all(type(end) is int and 0 <= end < shape["vocab"] for end in manifest.eos_token_ids)
    assert len(manifest.segments) == shape["layers"] + 1
    for name, entry in manifest.files.items():
        assert "/" not in name
        assert not name.startswith(".")
        assert 0 <= entry["nbytes"] <= limits.FILE_BYTES
    assert manifest.model_digest
    return manifest


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything in a JSON value; of long lists the first entries."""
    found = [path] if path else []
    entries = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in entries[:20]:
        found += places(inner, (*path, key))
    return found


@pytest.mark.slow
@hypothesis.given(st.data())
@hypothesis.settings(max_examples=300, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_a_field_of_anything(text: str, data: st.DataObject) -> None:
    content = json.loads(text)
    for _ in range(data.draw(st.integers(1, 3))):
        *above, last = data.draw(st.sampled_from(places(content)))
        parent = content
        for key in above:
            parent = parent[key]
        if data.draw(st.integers(0, 5)):
            parent[last] = data.draw(STRANGE)
        else:
            del parent[last]
    read(json.dumps(content))


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=300, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_a_text_of_anything(text: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 12))
    new = data.draw(
        st.text(max_size=12) | st.sampled_from(['"', "{", "}", "[[[[", "NaN", "-0", "1e999", "\\ud800", ","])
    )
    read(text[:at] + new + text[at + cut :])


def test_it_is_read_as_it_was_written(text: str) -> None:
    manifest = read(text)
    assert manifest is not None
    assert read(manifest.to_json()) == manifest
