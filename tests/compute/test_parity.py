"""A bundle's logits against transformers, on random weights in the shapes of the SmolLM family and odd ones.

With the policy fp16 and a window over the whole text, nothing but float32 noise and the window's
16 bits stands between the two.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from kvq.composition import open_bundle
from kvq.exporter.export import export
from kvq.exporter.single import export_single
from kvq.runtime.machine.threads import session_options
from kvq.runtime.session.model import Model
from tests.tools.checkpoints import TINY, family_checkpoint, save_checkpoint
from tests.tools.packages import needs
from tests.tools.references import reference_logits

PREFILL, DECODE = 100, 64
IDS = np.random.default_rng(7).integers(0, 512, PREFILL + DECODE)
TOLERANCE = 1e-3


def exported(checkpoint: Path, folder: Path, **options: Any) -> Model:
    """The model of a new fp32 bundle."""
    return open_bundle(export(str(checkpoint), folder, weights="fp32", **options).path)


def through_the_cache(model: Model, chunk: int) -> np.ndarray:
    """Logits over IDS, float32 [tokens, vocab]: a prefill in chunks, the rest token by token."""
    session = model.session("fp16", recent=256, prefill_chunk=chunk)
    logits = [session.append(IDS[:PREFILL], all_logits=True)]
    logits += [session.append([token])[None] for token in IDS[PREFILL:]]
    return np.concatenate(logits)


@pytest.fixture(scope="module", params=["tiny", "smollm-135m", "smollm-360m", "smollm-1.7b"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Model, np.ndarray]]:
    """A bundle's model, and transformers' logits over IDS for the checkpoint it was made from."""
    folder = tmp_path_factory.mktemp("parity")
    if request.param == "tiny":
        path = save_checkpoint(folder / "checkpoint", TINY)
    else:
        layers = 1 if request.param == "smollm-1.7b" else 2
        path = family_checkpoint(folder / "checkpoint", request.param, layers=layers, vocab=2048)
    yield exported(path, folder / "bundle"), reference_logits(path, IDS.tolist()).numpy()
    shutil.rmtree(folder)  # pytest would keep hundreds of megabytes


@pytest.mark.parametrize("chunk", [PREFILL, 7, 1])
def test_prefill_and_decode_equal_transformers(pair: tuple[Model, np.ndarray], chunk: int) -> None:
    model, wanted = pair
    assert np.abs(through_the_cache(model, chunk) - wanted).max() <= TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 16},
        {"head_dim": 24},  # no power of two: no rotation
        {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 8},
        {"rms_norm_eps": 1e-2},
        {"rope_theta": 500.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},  # as older checkpoints write it
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7}},
    ],
    ids=[
        "untied", "biases", "head_dim-16", "head_dim-24", "one-kv-head", "rms_norm_eps", "rope_theta", "linear",
        "linear-old-key", "llama3", "yarn", "yarn-attention-factor",
    ],
)  # fmt: skip
def test_variant_equals_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    plain = save_checkpoint(tmp_path / "plain", TINY)
    variant = save_checkpoint(tmp_path / "variant", TINY | changes)
    wanted = reference_logits(variant, IDS.tolist()).numpy()
    # If ignoring the change passed as well, this would test nothing.
    assert np.abs(wanted - reference_logits(plain, IDS.tolist()).numpy()).max() > 20 * TOLERANCE
    assert np.abs(through_the_cache(exported(variant, tmp_path / "bundle"), 7) - wanted).max() <= TOLERANCE


@pytest.mark.slow
def test_rotation_and_centring_change_the_stored_bytes_but_not_the_logits(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    logits, keys, values = {}, {}, {}
    for rotate in (False, True):
        for center in (False, True):
            way = rotate, center
            model = exported(tiny_checkpoint, tmp_path / f"{rotate}-{center}", rotate=rotate, center=center)
            session = model.session("fp16", recent=256, prefill_chunk=len(IDS))
            logits[way] = session.append(IDS, all_logits=True)
            keys[way], values[way] = session.store.window.keys.codes, session.store.window.values.codes
    for way, changed in logits.items():
        assert np.abs(changed - logits[False, False]).max() <= 1e-4, way
    assert len({k.tobytes() for k in keys.values()}) == 4
    # Only keys are centred. (From the second layer on, values differ by float32 noise.)
    assert np.array_equal(values[False, False][0], values[False, True][0])
    assert not np.array_equal(values[False, False][0], values[True, False][0])


@pytest.fixture(scope="module")
def single_file(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> onnxruntime.InferenceSession:
    """optimum's export of the tiny checkpoint, made by the command line."""
    needs("optimum.exporters.onnx")
    folder = tmp_path_factory.mktemp("single") / "tiny"
    command = [sys.executable, "-m", "kvq", "export", str(tiny_checkpoint), str(folder), "--layout", "single"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return onnxruntime.InferenceSession(folder / "model.onnx", session_options(), providers=["CPUExecutionProvider"])


def run_single(
    session: onnxruntime.InferenceSession, ids: np.ndarray, past: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Outputs by name; `past` as the outputs of the run before, empty for none."""
    start = next(iter(past.values())).shape[2] if past else 0
    feeds = {
        "input_ids": ids[None],
        "attention_mask": np.ones((1, start + len(ids)), np.int64),
        "position_ids": np.arange(start, start + len(ids))[None],
    }
    empty = np.zeros(
        (1, TINY["num_key_value_heads"], 0, TINY["hidden_size"] // TINY["num_attention_heads"]), np.float32
    )
    for i in session.get_inputs():
        if i.name.startswith("past_key_values"):
            feeds[i.name] = past.get(i.name.replace("past_key_values", "present"), empty)
    wanted = {i.name for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in wanted}), strict=True))


@pytest.mark.slow
def test_single_file_export_equals_transformers_and_the_bundle(
    single_file: onnxruntime.InferenceSession, tiny_checkpoint: Path, tiny_model: Model
) -> None:
    logits = run_single(single_file, IDS, {})["logits"][0]
    assert np.abs(logits - reference_logits(tiny_checkpoint, IDS.tolist()).numpy()).max() <= 1e-4
    session = tiny_model.session("fp16", prefill_chunk=len(IDS))
    assert np.abs(logits - session.append(IDS, all_logits=True)).max() <= 1e-4


def test_single_file_export_continues_from_its_cache(
    single_file: onnxruntime.InferenceSession, tiny_checkpoint: Path
) -> None:
    first = run_single(single_file, IDS[:PREFILL], {})
    second = run_single(single_file, IDS[PREFILL:], {k: v for k, v in first.items() if k != "logits"})
    logits = np.concatenate([first["logits"][0], second["logits"][0]])
    assert np.abs(logits - reference_logits(tiny_checkpoint, IDS.tolist()).numpy()).max() <= 1e-4


@pytest.mark.slow
def test_single_file_export_works_in_a_process_that_has_loaded_a_bundle(
    tiny_model: Model, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    needs("optimum.exporters.onnx")
    assert (export_single(str(tiny_checkpoint), tmp_path / "single") / "model.onnx").is_file()
