"""What a model's makers recommend for drawing: from their files into a bundle, and from there into every draw."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvq.composition import open_bundle
from kvq.exporter.export import export
from kvq.runtime.bundle.manifest import Manifest
from kvq.runtime.catalog.registry import Shape, entry_of
from kvq.runtime.errors import CheckpointError
from kvq.runtime.session.sampling import DEFAULTS
from tests.tools.bundles import edit
from tests.tools.checkpoints import TINY, save_checkpoint
from tests.tools.command_line import kvq
from tests.tools.gguf_files import GGUF_TINY, write_gguf
from tests.tools.serving import served

ADVICE = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1}
OTHER = {"bos_token_id": 0, "max_new_tokens": 2048, "transformers_version": "4.51.0", "pad_token_id": None}
SMOLLM = Shape(30, 576, 49152)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "of", TINY)


def exported(checkpoint: Path, folder: Path, generation: dict[str, Any], **options: Any) -> Manifest:
    """The manifest of a checkpoint whose makers say this of generation."""
    source = shutil.copytree(checkpoint, folder / "source")
    (source / "generation_config.json").write_text(json.dumps(OTHER | generation))
    return export(source, folder / "bundle", center=False, **options).manifest


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (ADVICE | {"do_sample": True}, ADVICE),
        ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        ({"top_k": -1, "temperature": None}, {"top_k": 0}),
        (ADVICE | {"do_sample": False}, {}),
        ({}, {}),
    ],
)
def test_a_folder_says_it(checkpoint: Path, tmp_path: Path, generation: dict, expected: dict) -> None:
    assert exported(checkpoint, tmp_path, generation).sampling == expected
    assert open_bundle(tmp_path / "bundle").sampling == {**DEFAULTS, **expected}


def test_a_file_says_it(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "of", GGUF_TINY, tokenizer=False)
    said = {"temp": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "penalty_repeat": 1.1, "mirostat": 2}
    fields = {f"general.sampling.{name}": value for name, value in said.items()}
    file = write_gguf(tmp_path / "model.gguf", folder, **fields)
    assert export(file, tmp_path / "bundle", center=False).manifest.sampling == ADVICE


@pytest.mark.parametrize(
    "generation",
    [
        {"temperature": "hot"}, {"temperature": -1}, {"temperature": 10**400}, {"temperature": True}, {"top_p": 1.5},
        {"temperature": float("nan")}, {"top_k": 2.5}, {"top_k": -2}, {"repetition_penalty": 0}, {"min_p": [0.1]},
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(checkpoint: Path, tmp_path: Path, generation: dict) -> None:
    with pytest.raises(CheckpointError, match=f"{next(iter(generation))} of its recommended sampling is") as caught:
        exported(checkpoint, tmp_path, generation)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("SmolLM2-135M-Instruct.Q4_1", "smollm2-135m-instruct"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
        ("SmolLM2-135M-Instruct-Q8_0", "smollm2-135m-instruct"),
        ("SmolLM2-135M.Q4_1", "smollm2-135m"),
        ("SmolLM2-135Million", None),
        ("SmolLM2-360M-Instruct", None),  # of another shape
        ("model", None),
    ],
)
def test_the_registry_knows_models_by_what_their_files_are_called(name: str, expected: str | None) -> None:
    entry = entry_of(name, SMOLLM)
    assert (entry and entry.name) == expected
    assert dict(entry.sampling if entry else {}) == (
        {"temperature": 0.2, "top_p": 0.9} if name.lower().count("instruct") and expected else {}
    )


def test_what_a_source_says_goes_before_the_registry(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"layers": TINY["num_hidden_layers"], "hidden": TINY["hidden_size"], "vocab": TINY["vocab_size"]}
    known = {"name": "it", "about": "b", "licence": "c", "sources": [{"hub": "a/b"}], "shape": shape}
    models = [known | {"sampling": {"temperature": 0.2}}]
    registry = tmp_path / "registry.json"
    registry.write_text(json.dumps({"format": "kvq-registry", "format_version": 1, "models": models}))
    monkeypatch.setenv("KVQ_REGISTRY", str(registry))
    cases = [("it", {}, {"temperature": 0.2}), ("it", {"top_k": 7}, {"top_k": 7}), ("that", {}, {})]
    for number, (name, generation, expected) in enumerate(cases):
        (folder := tmp_path / f"{number}").mkdir()
        assert exported(checkpoint, folder, generation, name=name).sampling == expected


@pytest.fixture(scope="module")
def greedy(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose makers recommend that nothing be drawn."""
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("greedy") / "bundle")
    edit(folder, lambda data: data.update(sampling={"temperature": 0.0}))
    return folder


def test_it_is_what_happens_unless_asked_for_otherwise(greedy: Path, tiny_bundle: Path) -> None:
    def text(folder: Path, **options: Any) -> list[int]:
        return [r.token for r in open_bundle(folder).generate([5, 6, 7], max_tokens=24, ignore_eos=True, **options)]

    best = text(tiny_bundle, temperature=0)
    assert text(greedy) == best
    drawn = text(greedy, temperature=0.8, seed=1)
    assert drawn == text(tiny_bundle, seed=1)
    assert drawn != best


def test_commands_do_as_the_model_has_it(greedy: Path) -> None:
    rest = ["--raw", "-n", "24", "--ignore-eos", "--json", "The"]
    texts = [json.loads(kvq("run", "-m", str(greedy), *options, *rest).stdout)["text"]
             for options in ([], ["-t", "0"], ["-t", "1.5", "-s", "1"])]  # fmt: skip
    assert texts[0] == texts[1] != texts[2]
    shown = kvq("chat", "-m", str(greedy), input="/set\n/set temperature 0.7\n/set\n").stderr
    assert "temperature 0.0," in shown
    assert "temperature 0.7," in shown
    assert "sampling     temperature 0\n" in kvq("show", str(greedy)).stdout
    assert json.loads(kvq("show", str(greedy), "--json").stdout)["sampling"] == {"temperature": 0.0}


def test_a_server_does_as_the_model_has_it(greedy: Path) -> None:
    with served("-m", greedy) as server:
        found = server.get("/props").json()["default_generation_settings"]["params"]
        assert (found["temperature"], found["top_k"]) == (0.0, DEFAULTS["top_k"])
        body = {"prompt": [5, 6, 7], "max_tokens": 24, "ignore_eos": True}
        texts = [server.post("/v1/completions", body | more).json()["choices"][0]["text"]
                 for more in ({}, {"temperature": 0}, {"temperature": 1.5, "seed": 1})]  # fmt: skip
        assert texts[0] == texts[1] != texts[2]
        assert server.post("/api/show", {}).json()["parameters"].split() == ["temperature", "0"]
