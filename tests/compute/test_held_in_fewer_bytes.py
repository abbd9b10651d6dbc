"""Numbers are held as halves where all of a matrix are halves, and codes in as few bits as they need."""

import numpy as np
import pytest

from kvq.runtime.bundle.manifest import WEIGHTS
from kvq.runtime.bundle.onnx_file import Region
from kvq.runtime.bundle.renaming import Matrix
from kvq.runtime.compute.products import READ_BYTES, _bits, _halves

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


@pytest.mark.parametrize("bits", [5, 6])
@pytest.mark.parametrize("odd", [None, 1 + 2**-13, 70000.0, np.nan])
def test_scales_of_5_and_6_bits_are_halves_where_they_can_be(bits, odd, tmp_path):
    scales = halves(np.random.default_rng(3))
    scales[N - 1, 2] = scales[N - 1, 2] if odd is None else odd
    matrix = matrix_in(tmp_path, scales, scales)._replace(bits=bits, offsets=None)
    assert _halves(matrix, tmp_path / WEIGHTS) == (odd is None)


def codes_in(folder, codes, zeros, bits=8):
    """A matrix whose codes and zero points lie in a file of weights, a byte each."""
    (folder / WEIGHTS).write_bytes(codes.tobytes() + zeros.tobytes())
    regions = Region(0, codes.nbytes), Region(0, 0), Region(codes.nbytes, zeros.nbytes)
    return Matrix(len(codes), codes[0].size, bits, BLOCK, *regions)


@pytest.mark.parametrize(("largest", "bits"), [(0, 5), (15, 5), (31, 5), (32, 6), (63, 6), (64, 8), (255, 8)])
@pytest.mark.parametrize("where", ["first", "last", "zero"])
def test_codes_take_the_bits_that_the_largest_one_needs(largest, bits, where, tmp_path):
    rows = 2 * READ_BYTES // (64 * BLOCK)  # read in parts
    codes, zeros = np.zeros((rows, 64, BLOCK), np.uint8), np.zeros((rows, 64), np.uint8)
    if where == "zero":
        zeros[-1, -1] = largest
    else:
        codes.reshape(-1)[0 if where == "first" else -1] = largest
    matrix = codes_in(tmp_path, codes, zeros)
    assert _bits(matrix, tmp_path / WEIGHTS) == bits
    assert _bits(matrix._replace(zeros=None), tmp_path / WEIGHTS) == 8  # less 128: of few codes no weights
    assert _bits(matrix._replace(bits=4), tmp_path / WEIGHTS) == 4
