"""Heads whose logits are as large as single precision has them: refused, or drawn of without a NaN or a warning."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper

from kvq.composition import open_bundle
from kvq.runtime.errors import BundleError, NonFiniteError
from tests.attacks.graphs import HEAD, NORM, Model, model, nodes, replace

BACKENDS = ["native", "numpy"]
PROMPT = list(range(1, 30))
# What single precision holds is used, what penalties would have infinite is refused.
SIZES = {"none": 0.0, "least": 1e-45, "large": 1e20, "larger": 1e28, "huge": 1e32, "largest": 3.4e38}
REFUSED = {"huge", "largest"}
OPTIONS = {
    "plain": {},
    "greedy": {"temperature": 0},
    "cold": {"temperature": 5e-324},
    "hot": {"temperature": 1e300},
    "nucleus": {"top_p": 0.1, "top_k": 0, "min_p": 0.5},
    "repetition divided": {"repetition_penalty": 0.01},
    "repetition multiplied": {"repetition_penalty": 100.0},
    "penalties": {"presence_penalty": 100.0, "frequency_penalty": -100.0, "logit_bias": {3: -100.0, 4: 100.0}},
    "all of it": {"repetition_penalty": 0.01, "temperature": 1e-300, "top_p": 0.2, "top_logprobs": 20},
}


def gain(size: float):
    """A head whose norm multiplies with that much."""

    def change(found: Model) -> None:
        norm = nodes(found, NORM)[0]
        values = np.full(64, size, np.float32)
        found.graph.initializer.append(numpy_helper.from_array(values, "another_gain"))
        replace(found, norm, 1, "another_gain")

    return model(HEAD, change)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_a_head_of_any_size_is_drawn_of_or_refused(weights, size, backend, request):
    folder: Path = request.getfixturevalue(weights)
    gain(SIZES[size])(folder)
    loaded = open_bundle(folder)
    vocab = loaded.architecture.vocab
    for options in OPTIONS.values():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            session = loaded.session(backend=backend)
            if size in REFUSED:
                with pytest.raises(NonFiniteError, match="logits"):
                    session.append(PROMPT)
                continue
            session.append(PROMPT)
            said = list(session.generate(max_tokens=4, seed=1, ignore_eos=True, **options))
        assert all(0 <= each.token < vocab and np.isfinite(each.logprob) for each in said)


# The 8-bit head reshapes, folds and sums: whole numbers of its constants, and floats that it divides by.
NUMBERS = {"const_int64_3_0_-1_64": 3, "const_int64_2_0_-1": 2, "const_int64_1_-1": 1, "const_int64_1_0": 1}
ODD = (0, 1, -1, 2, -2, 64, 1 << 31, -(1 << 31), 1 << 62, -(1 << 63))


def changed(name: str, at: int, number: int):
    """That constant of the head, changed in one place."""

    def change(found: Model) -> None:
        tensor = next(each for each in found.graph.initializer if each.name == name)
        values = numpy_helper.to_array(tensor).copy()
        values[at] = number
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    return model(HEAD, change)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_head_of_odd_whole_numbers_is_refused_or_runs_alike_on_both_backends(name, int4, tmp_path):
    refusals = 0
    for at in range(NUMBERS[name]):
        for number in ODD:
            folder = Path(shutil.copytree(int4, tmp_path / f"{at} {number}"))
            changed(name, at, number)(folder)
            try:
                loaded = open_bundle(folder)
            except BundleError:
                refusals += 1
                continue
            found = [loaded.session("fp16", backend=backend).append(PROMPT) for backend in BACKENDS]
            np.testing.assert_allclose(*found, rtol=0, atol=1e-2 * np.abs(found[0]).max())
    assert refusals > len(ODD) // 2
