"""Training knows every family's cache: keys, values and what comes of them are those of the runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kvq
from kvq.exporter.calibration import calibration_text
from kvq.exporter.export import export
from kvq.runtime.bundle.bundle import Bundle
from tests.tools.families import SMALL, save_family
from tests.tools.packages import needs

torch = needs("torch")
from kvq.controller.training.parallel import ParallelModel
from kvq.controller.training.train import Recipe, train_controllers

IDS = np.random.default_rng(2).integers(0, 512, 80)
TEXT = calibration_text()


@pytest.fixture(params=SMALL)
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    checkpoint = save_family(tmp_path / "checkpoint", SMALL[request.param])
    return export(checkpoint, tmp_path / "bundle", weights="fp32", calibration=TEXT[:2000]).path


def test_training_sees_the_keys_and_values_of_the_cache(bundle: Path) -> None:
    session = kvq.load(bundle).session("fp16", recent=128, prefill_chunk=len(IDS))
    logits = session.append(IDS, all_logits=True)
    window = session.store.window
    keys, values = window.read(window.slots(0, len(IDS)))
    with torch.inference_mode():
        found = ParallelModel.load(Bundle(bundle)).run(torch.from_numpy(IDS)[None])
    assert np.abs(found.logits[0].numpy() - logits).max() <= 1e-3
    for kept, seen in ((keys, found.keys[0]), (values, found.values[0])):
        np.testing.assert_allclose(seen.numpy(), kept, atol=2e-3 * np.abs(kept).max())


@pytest.mark.slow
@pytest.mark.parametrize("bundle", ["gemma3"], indirect=True)
def test_a_controller_is_trained_and_keeps_a_budget(bundle: Path) -> None:
    train_controllers(bundle, TEXT, [Recipe(tokens=400, epochs=1)])
    session = kvq.load(bundle).session("adaptive", recent=4, kv_bits=9)
    list(session.generate("once upon a time", max_tokens=60, ignore_eos=True, seed=0))
    assert session.store.used_nbytes <= session.chooser.budget.allowed(session.store.length)
