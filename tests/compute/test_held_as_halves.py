"""Scales and offsets are held as halves where all of a matrix are halves, and nowhere else."""

import numpy as np
import pytest

from kvq.runtime.bundle.manifest import WEIGHTS
from kvq.runtime.bundle.onnx_file import Region
from kvq.runtime.bundle.renaming import Matrix
from kvq.runtime.compute.products import _halves

N, K, BLOCK = 5, 96, 32


def matrix_in(folder, scales, offsets):
    """A matrix whose scales and offsets lie in a file of weights, its codes nowhere."""
    (folder / WEIGHTS).write_bytes(scales.tobytes() + offsets.tobytes())
    size = scales.nbytes
    return Matrix(N, K, 4, BLOCK, Region(0, 0), Region(0, size), None, Region(size, size))


def halves(random):
    return random.standard_normal((N, K // BLOCK)).astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("odd", [1 + 2**-13, 70000.0, 1e-9, np.inf, -np.inf, np.nan])
def test_one_number_that_is_no_half_keeps_a_matrix_in_floats(which, odd, tmp_path):
    random = np.random.default_rng(3)
    parts = [halves(random), halves(random)]
    assert _halves(matrix_in(tmp_path, *parts), tmp_path / WEIGHTS)
    parts[which][N - 1, 2] = odd
    assert not _halves(matrix_in(tmp_path, *parts), tmp_path / WEIGHTS)


def test_a_matrix_without_offsets_stays_in_floats(tmp_path):
    random = np.random.default_rng(3)
    matrix = matrix_in(tmp_path, halves(random), halves(random))._replace(offsets=None)
    assert not _halves(matrix, tmp_path / WEIGHTS)
