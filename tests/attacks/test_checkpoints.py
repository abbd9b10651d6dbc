"""Checkpoints of strangers: an export refuses each in one line, at once, and writes nothing."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType as Value
from safetensors.numpy import load_file, save_file

from kvq.exporter.export import export
from kvq.exporter.key_statistics import KeyStatistics
from kvq.exporter.key_turns import turned_keys
from kvq.runtime.errors import CalibrationError, CheckpointError
from tests.attacks.conftest import MEMORY, Attack, little_memory
from tests.tools.checkpoints import TINY, edit_config, save_checkpoint
from tests.tools.gguf_files import GGUF_TINY, Raw, write_gguf
from tests.tools.work import bounded_work

pytestmark = pytest.mark.filterwarnings("error")
WEIGHTS = "model.safetensors"
LONGROPE = {"type": "longrope", "short_factor": [1] * 4, "long_factor": [1] * 4}
GEMMA = {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh"}


def pipe(name: str) -> Attack:
    """A file that whoever reads it waits for ever."""

    def attack(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return attack


def linked(name: str, target: str) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return attack


def holes(name: str, size: int = 3 << 30) -> Attack:
    """A file that takes no room."""

    def attack(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, size)

    return attack


def text(name: str, content: str, *without: str) -> Attack:
    def attack(folder: Path) -> None:
        for other in without:
            (folder / other).unlink()
        (folder / name).write_text(content)

    return attack


def config(**changes: Any) -> Attack:
    return lambda folder: edit_config(folder, **changes)


def header(content: bytes, data: bytes = b"") -> Attack:
    return lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(content)) + content + data)


def tensors(change: Callable[[np.ndarray], np.ndarray]) -> Attack:
    def attack(folder: Path) -> None:
        changed = {name: change(values) for name, values in load_file(folder / WEIGHTS).items()}
        save_file(changed, folder / WEIGHTS)

    return attack


def tokenizer(change: Callable[[dict[str, Any]], Any], **settings: Any) -> Attack:
    def attack(folder: Path) -> None:
        document = json.loads((folder / "tokenizer.json").read_text())
        change(document)
        (folder / "tokenizer.json").write_text(json.dumps(document))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    return attack


def other_pipe(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    os.mkfifo(folder / "b.safetensors")


def weights_of_holes(folder: Path) -> None:
    """A terabyte of a tensor that the model has not."""
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    listed, end = json.loads(data[8 : 8 + length]), len(data) - 8 - length
    listed["x"] = {"dtype": "F32", "shape": [1 << 38], "data_offsets": [end, end + (1 << 40)]}
    longer = json.dumps(listed).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(longer)) + longer + data[8 + length :])
    os.truncate(folder / WEIGHTS, 8 + len(longer) + end + (1 << 40))


ATTACKS: dict[str, tuple[Attack, str]] = {
    # Files that are no files
    **{
        f"a pipe for {name}": (pipe(name), f"{name} in .* is no regular file")
        for name in ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                     "generation_config.json", "chat_template.jinja")
    },
    "a pipe for other weights": (other_pipe, "b.safetensors in .* is no regular file"),
    "a pipe for an index": (
        lambda f: (other_pipe(f), pipe("model.safetensors.index.json")(f)), "index.json in .* is no regular file"
    ),
    "a pipe for tokenizer.model": (
        lambda f: ((f / "tokenizer.json").unlink(), pipe("tokenizer.model")(f)), "tokenizer.model in .* no regular file"
    ),
    "a pipe for merges.txt": (
        lambda f: (text("vocab.json", "{}", "tokenizer.json")(f), pipe("merges.txt")(f)), "merges.txt .* no regular"
    ),
    "a folder for weights": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), "is no regular file"),
    "weights that never end": (linked(WEIGHTS, "/dev/zero"), "is no regular file"),
    "a tokenizer that never ends": (linked("tokenizer.json", "/dev/zero"), "is no regular file"),
    "a configuration that is not there": (linked("config.json", "nowhere"), "config.json in .* cannot be read"),
    # Files without a bound
    **{
        f"{name} of holes": (holes(name), f"{name} in .* has more than .* bytes")
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                     "chat_template.jinja")
    },
    "a configuration of objects": (text("tokenizer_config.json", '{"a":[' + "{}," * 2_000_000 + "1]}"), "values, more"),
    "a configuration of lists": (text("config.json", "[" + "[]," * 2_000_000 + "1]"), "values, more than"),
    "a tokenizer of objects": (text("tokenizer.json", '{"a":[' + "{}," * 9_000_000 + "1]}"), "values, more than"),
    "lists in lists": (text("tokenizer_config.json", '{"a":' + "[" * 200 + "]" * 200 + "}"), "values in values"),
    "lists in lists without end": (text("tokenizer_config.json", "[" * 100_000), "not valid JSON"),
    "a header of 40 MB": (header(b'{"__metadata__":{"a":"' + b"x" * (40 << 20) + b'"}}'), "has .* bytes, more than"),
    "a hundred thousand tensors": (
        header(b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0]}' % i for i in range(100_000)) + b"}"),
        "tensors, more than",
    ),
    "a million dimensions": (
        header(json.dumps({"a": {"dtype": "F32", "shape": [1] * 1_000_000, "data_offsets": [0, 4]}}).encode(), b"1234"),
        "values, more than",
    ),
    "five million merges": (
        lambda f: (text("vocab.json", '{"a":0,"b":1,"ab":2}', "tokenizer.json")(f),
                   text("merges.txt", "a b\n" * 5_000_000)(f)),
        "more than .* merges",
    ),
    "settings of a sentencepiece model without end": (
        lambda f: ((f / "tokenizer.json").unlink(), (f / "tokenizer.model").write_bytes(b"\x12\x02\x18\x02" * 300_000)),
        "messages of settings",
    ),
    # Values of configurations
    "an original context of one": (
        config(model_type="phi3", original_max_position_embeddings=1, rope_scaling=LONGROPE), "original_max_position"
    ),
    "no context, and an original one": (
        config(model_type="phi3", max_position_embeddings=None, rope_scaling=LONGROPE), "lacks"
    ),
    "our own field as a text": (config(**GEMMA, norm_weights_include="x"), "norm_weights_include='x'"),
    "our own field as a list": (config(**GEMMA, norm_weights_include=[1]), r"norm_weights_include=\[1\]"),
    "a multiplier too small for single precision": (
        config(model_type="granite", logits_scaling=1e-300), "logits_scaling=1e-300"
    ),
    "a hundred ids that end a text": (
        lambda f: (f / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(100))})),
        "more than 64 ids",
    ),
    "a licence of half a surrogate pair": (config(license="\x1b[2J\u202e\ud800"), "its licence is"),
    "a special token of half a surrogate pair": (
        text("special_tokens_map.json", '{"bos_token":"\\ud800"}'), "bos_token is"
    ),
    "a template of half a surrogate pair": (
        text("tokenizer_config.json", '{"chat_template":"\\ud800"}'), "no Unicode text"
    ),
    # Tokenizers
    "an added token that is a list": (
        tokenizer(lambda d: d["added_tokens"].append({"content": ["x"], "id": "y"})), "tokenizer.json of .* cannot"
    ),
    "ids of two kinds": (
        tokenizer(lambda d: d["added_tokens"].append({"content": "q", "id": "y"}), additional_special_tokens=["a"]),
        "tokenizer.json of .* cannot be read",
    ),
    "no added tokens": (
        tokenizer(lambda d: d.update(added_tokens=None), additional_special_tokens=["a"]), "cannot be read"
    ),
    "an id that is an object": (
        tokenizer(lambda d: d["model"]["vocab"].update({"<s>": {"x": [1]}}), tokenizer_class="LlamaTokenizer"),
        "cannot be read",
    ),
    "a vocabulary of empty lists": (tokenizer(lambda d: d["model"].update(vocab=[[], ["a"]])), "without a vocabulary"),
    "a token named by half a surrogate pair": (
        tokenizer(lambda d: d["added_tokens"][0].update(content="\ud800"), additional_special_tokens=["a"]),
        "cannot be read",
    ),
    # Weights
    "weights beyond single precision": (tensors(lambda x: x.astype(np.float64) * 1e300), "holds NaN or infinity"),
    "the largest weights of single precision": (tensors(lambda x: np.full_like(x, 3e38)), "holds weights beyond 1e.09"),
}  # fmt: skip


def array(kind: Value, count: int, element: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + element * count


# Metadata of GGUF files: key, type, value, and why it is refused.
METADATA: dict[str, tuple[str, Value, Any, str]] = {
    "four million tokens": (
        "tokenizer.ggml.tokens", Value.ARRAY, array(Value.STRING, 4_000_000, bytes(8)), "array elements, more than"
    ),
    "four million merges": (
        "tokenizer.ggml.merges", Value.ARRAY, array(Value.STRING, 4_000_000, bytes(8)), "array elements, more than"
    ),
    "four million layers": (
        "llama.attention.sliding_window_pattern", Value.ARRAY, array(Value.INT32, 4_000_000, bytes(4)), "array elements"
    ),
    "arrays in arrays": ("x.y", Value.ARRAY, array(Value.ARRAY, 1, struct.pack("<IQ", 9, 1)), "a value of type 9"),
    "a template of megabytes": ("tokenizer.chat_template", Value.STRING, b"x" * (5 << 20), "the chat template of"),
}  # fmt: skip


def refused(checkpoint: Path, tmp_path: Path, words: str, memory: int = MEMORY) -> None:
    """Export, expect the error that the words (a pattern) describe, and nothing written."""
    with (
        bounded_work(clock=time.process_time),
        little_memory(memory),
        pytest.raises(CheckpointError, match=words) as caught,
    ):
        export(checkpoint, tmp_path / "out" / "bundle", weights="int8", center=False)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 800
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer. Read only."""
    return save_checkpoint(tmp_path_factory.mktemp("one") / "c", TINY | {"num_hidden_layers": 1})


@pytest.mark.parametrize("name", ATTACKS)
def test_a_checkpoint_of_a_stranger_is_refused(name: str, one_layer: Path, tmp_path: Path) -> None:
    attack, words = ATTACKS[name]
    folder = Path(shutil.copytree(one_layer, tmp_path / "c"))
    attack(folder)
    refused(folder, tmp_path, words)


def test_weights_of_holes_are_refused(one_layer: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(one_layer, tmp_path / "c"))
    weights_of_holes(folder)
    refused(folder, tmp_path, "bytes of weights for .* parameters", memory=2 << 40)  # it is mapped


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of one layer. Read only."""
    folder = tmp_path_factory.mktemp("gguf")
    save_checkpoint(folder / "c", GGUF_TINY | {"num_hidden_layers": 1}, tokenizer=False)
    return write_gguf(folder / "m.gguf", folder / "c", tokenizer="gpt2")


@pytest.mark.parametrize("name", METADATA)
def test_metadata_of_a_stranger_are_refused(name: str, gguf_file: Path, tmp_path: Path) -> None:
    key, kind, value, words = METADATA[name]
    (tmp_path / "m.gguf").write_bytes(Raw.of(gguf_file).put(key, kind, value).bytes())
    refused(tmp_path / "m.gguf", tmp_path, words)


def test_heads_of_no_features_are_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "c", GGUF_TINY | {"num_hidden_layers": 1}, tokenizer=False)
    file = write_gguf(tmp_path / "m.gguf", folder, llama__attention__key_length=None, llama__attention__head_count=512)
    refused(file, tmp_path, "has 512 heads for 256 features")


def test_a_gguf_file_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    refused(tmp_path / "m.gguf", tmp_path, "is no file")


def test_a_tail_of_holes_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    shutil.copy(gguf_file, tmp_path / "m.gguf")
    os.truncate(tmp_path / "m.gguf", 1 << 40)
    refused(tmp_path / "m.gguf", tmp_path, "bytes of weights for")


@pytest.mark.parametrize("size", [1e8, 1e5, 0.0, 1e-42])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_of_no_model_end_in_a_bundle_or_an_error(
    size: float, weights: str, one_layer: Path, tmp_path: Path
) -> None:
    """Keys that are no numbers once made the search for a basis go on for ever."""
    folder = Path(shutil.copytree(one_layer, tmp_path / "c"))
    tensors(lambda x: np.full_like(x, size) * np.sign(x))(folder)
    with bounded_work(clock=time.process_time):
        try:
            export(folder, tmp_path / "out" / "bundle", weights=weights, profiles=False)
        except (CheckpointError, CalibrationError) as error:
            print(error)


def test_statistics_that_no_basis_suits_end_the_search() -> None:
    statistics = KeyStatistics(2, 1, 8)
    statistics.wave_keys[:], statistics.weight[:] = np.nan, 1
    statistics.keys[:] = statistics.queries[:] = np.eye(8)
    with pytest.raises(CalibrationError, match="keys of layer 1 cannot be balanced"):
        turned_keys(statistics, np.eye(8))
