"""Every field of a configuration or of a GGUF file's metadata with values that no model has: one line, or a model."""

from __future__ import annotations

import copy
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType as Value

from kvq.exporter.checkpoint import load_checkpoint
from kvq.runtime.errors import CheckpointError
from tests.tools.families import SMALL, longrope, save_described
from tests.tools.gguf_files import Raw, write_gguf
from tests.tools.work import LITTLE, bounded_work

pytestmark = pytest.mark.filterwarnings("error")
# As JSON has them: some are no numbers of Python's.
VALUES = [
    "null", "true", '"x"', '"\\ud800"', "-1", "0", "1", "1.5", "1e-320", "1e11", "1e400", "NaN", str(10**30), "9" * 400,
    "[]", "[1]", "{}", '{"x": {"x": [1]}}', "[" * 60 + "]" * 60,
]  # fmt: skip
# Fields that a family reads, or looks for, besides those that it has.
FIELDS = (
    "head_dim", "hidden_act", "hidden_activation", "attention_bias", "mlp_bias", "rms_norm_eps", "layer_types",
    "sliding_window", "sliding_window_pattern", "use_sliding_window", "max_window_layers", "no_rope_layers",
    "no_rope_layer_interval", "rope_local_base_freq", "query_pre_attn_scalar", "norm_weights_include", "text_part_of",
    "partial_rotary_factor", "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings",
    "quantization_config", "license", "eos_token_id", "text_config", "tie_word_embeddings", "attention_multiplier",
    "embedding_multiplier", "residual_multiplier", "logits_scaling", "final_logit_softcapping",
)  # fmt: skip
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0, "type": "linear", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    "llama3": SMALL["llama-3.2"]["rope_scaling"],
    "yarn": {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "attention_factor": None,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0, "truncate": True,
    },
    "factors": {"rope_type": "factors", "factors": [1.0] * 16, "attention_factor": 1.0},
    "longrope": longrope(12) | {"attention_factor": None, "original_max_position_embeddings": None},
}  # fmt: skip
# Values of metadata, of types that a file may give them.
METADATA: list[tuple[Value, Any]] = [
    (Value.STRING, b"x"), (Value.BOOL, True), (Value.INT32, -1), (Value.UINT32, 0), (Value.UINT32, 1),
    (Value.UINT32, 3), (Value.UINT64, 2**64 - 1), (Value.FLOAT32, float("nan")), (Value.FLOAT32, float("inf")),
    (Value.FLOAT64, 1e300), (Value.FLOAT64, 1e-320), (Value.ARRAY, struct.pack("<IQ", Value.INT32, 0)),
    (Value.ARRAY, struct.pack("<IQi", Value.INT32, 1, 1)),
    (Value.ARRAY, struct.pack("<IQQ", Value.STRING, 1, 1) + b"x"),
]  # fmt: skip
KEYS = (
    "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length",
    "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_log_multiplier", "expert_count",
    "attention.causal", "attention.sliding_window_pattern", "rope.freq_base_swa", "attention.scale", "logit_scale",
)  # fmt: skip


def outcome(checkpoint: Path, what: str) -> bool:
    """Whether a checkpoint is one whose parts can all be had; else it was refused in one line, at once."""
    error: BaseException | None = None
    with bounded_work(LITTLE // 4, clock=time.process_time):
        try:
            found = load_checkpoint(checkpoint)
            found.tokenizer_json(), found.chat_template(), found.said()
            for name in found.model.adapted.keys() & found.source.shapes.keys():
                found.tensor(name)
        except Exception as caught:
            error = caught
    if error is not None:
        assert isinstance(error, CheckpointError), f"{what}: {type(error).__name__}: {error}"
        assert str(error).isprintable(), what
        assert len(str(error)) < 800, what
    return error is None


def mutants(fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Texts of config.json with one field of another value, or left out; and what was changed."""
    for field in dict.fromkeys((*fields, *FIELDS)):
        rest = {name: value for name, value in fields.items() if name != field}
        yield json.dumps(rest), f"no {field}"
        for value in VALUES:
            yield json.dumps(rest)[:-1] + f', "{field}": {value}}}', f"{field} {value:.40}"


@pytest.fixture(scope="module", params=SMALL)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a family, its configuration whole; its config.json may be written."""
    fields = SMALL[request.param] | {"num_hidden_layers": 2, "intermediate_size": 16, "vocab_size": 32}
    return save_described(tmp_path_factory.mktemp(request.param) / "c", fields)


def test_no_field_of_a_configuration_ends_in_another_error(family: Path) -> None:
    file = family / "config.json"
    kept = file.read_text()
    assert outcome(family, "as it is")
    found = []
    for text, what in mutants(json.loads(kept)):
        file.write_text(text)
        found.append(outcome(family, what))
    file.write_text(kept)
    assert 0 < sum(found) < len(found)  # some say nothing new


@pytest.mark.parametrize("kind", SCALINGS)
def test_no_field_of_a_scaling_does(kind: str, tmp_path: Path) -> None:
    family = "phi3" if kind == "longrope" else "llama-3.2"
    folder = save_described(tmp_path / "c", SMALL[family] | {"rope_scaling": SCALINGS[kind], "vocab_size": 32})
    fields = json.loads((folder / "config.json").read_text())
    assert outcome(folder, kind)
    rest = {name: value for name, value in fields.items() if name != "rope_scaling"}
    for place in ("rope_scaling", "rope_parameters"):
        for text, what in mutants(SCALINGS[kind]):
            (folder / "config.json").write_text(json.dumps(rest)[:-1] + f', "{place}": {text}}}')
            outcome(folder, f"{kind} in {place}, {what}")


@pytest.mark.parametrize("name", [name for name in SMALL if name != "mistral"])
def test_no_field_of_a_gguf_file_does(name: str, tmp_path: Path) -> None:
    fields = SMALL[name] | {"vocab_size": 512, "rms_norm_eps": 1e-5, "intermediate_size": 32, "num_hidden_layers": 2}
    folder = save_described(tmp_path / "c", fields)
    with_tokenizer = {"llama-3.2": "gpt2", "granite": "llama"}  # of one family each, since they take long to read
    file = write_gguf(tmp_path / "m.gguf", folder, tokenizer=with_tokenizer.get(name))
    whole = Raw.of(file)
    assert outcome(file, "as it is")
    architecture = name.partition("-")[0] if name.startswith("llama") else name
    keys = [key.decode() for key, _ in whole.fields]
    for key in dict.fromkeys((*keys, *(f"{architecture}.{key}" for key in KEYS), "general.alignment")):
        raw = copy.copy(whole)
        file.write_bytes(raw.without(key).bytes())
        outcome(file, f"no {key}")
        for kind, value in METADATA:
            file.write_bytes(raw.put(key, kind, value).bytes())
            outcome(file, f"{key} {kind.name} {value!r}")
