"""The native library's products beside MatMulNBits of ONNX Runtime, whose rounding of activations is the same.

Forms of weights: (bits, whether blocks have zero points, whether they have offsets).
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.runtime.errors import BackendError
from kvq.runtime.machine.threads import session_options
from kvq.runtime.native import library
from kvq.runtime.native.matrices import BETWEEN, PANEL, PackedMatrix, multiplies, packs
from tests.tools.kvdata import examples

helper, FLOAT = onnx.helper, onnx.TensorProto.FLOAT
IMPORTS = [helper.make_opsetid(name, version) for name, version in (("", 21), ("kvq", 1), ("com.microsoft", 1))]
# Sums of blocks are whole numbers in both; they add the same floats in another order.
TOLERANCE = 1e-6

KERNELS = st.sampled_from(sorted(library.kernels().items()))


class Weights:
    """Random codes, scales and, of 4 bits, zero points or none, as a bundle holds them; offsets or none.

    halves: scales and offsets are numbers that halves hold.
    """

    def __init__(self, random, n, k, bits, block, zeros=False, offsets=False, halves=False):
        blocks = -(-k // block)
        self.k, self.n, self.bits, self.block = k, n, bits, block
        self.filed = 4 if bits == 4 else 8  # bits that a code takes in a file
        most = 256 if bits == 4 else 1 << bits
        self.codes = random.integers(0, most, (n, blocks, block * self.filed // 8), dtype=np.uint8)
        self.scales = random.uniform(0.5, 2, (n, blocks)).astype(np.float32)
        points = (n, -(-blocks // 2) if bits == 4 else blocks)
        self.zeros = random.integers(0, most, points, dtype=np.uint8) if zeros else None
        self.offsets = random.uniform(-9, 9, (n, blocks)).astype(np.float32) if offsets else None
        self.halves = halves
        if halves:
            self.scales, self.offsets = (
                None if x is None else x.astype(np.float16).astype(np.float32) for x in (self.scales, self.offsets)
            )

    @property
    def has(self):
        return [part is not None for part in (self.zeros, self.offsets)] + [self.halves]

    @property
    def parts(self):
        return [part for part in (self.codes, self.scales, self.zeros) if part is not None]

    def floats(self, less=1):
        """The weights but their offsets, float64 [n, k]; with `less` -1 zero points are added to the codes instead."""
        codes = self.codes
        if self.bits == 4:
            codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*codes.shape[:2], -1)
        middle = np.full(self.scales.shape, 1.0 * (1 << (self.bits - 1)))
        if self.zeros is not None:
            zeros = self.zeros
            if self.bits == 4:
                zeros = np.stack((zeros & 15, zeros >> 4), axis=-1).reshape(self.n, -1)[:, : middle.shape[1]]
            middle = zeros.astype(float)
        weights = (codes.astype(np.float64) - less * middle[..., None]) * self.scales[..., None]
        return weights.reshape(self.n, -1)[:, : self.k]


def session_of(node, *constants):
    values = [helper.make_tensor_value_info(name, FLOAT, None) for name in ("x", "out")]
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in constants]
    graph = helper.make_graph([node], "product", values[:1], values[1:], initializers)
    model = helper.make_model(graph, opset_imports=IMPORTS, ir_version=10)
    options = session_options()
    options.register_custom_ops_library(str(library.FILE))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def matmul_nbits(weights, x):
    names = ["codes", "scales", "zeros"][: len(weights.parts)]
    node = helper.make_node(
        "MatMulNBits", ["x", *names], ["out"], domain="com.microsoft",
        K=weights.k, N=weights.n, bits=weights.filed, block_size=weights.block, accuracy_level=4,
    )  # fmt: skip
    return session_of(node, *zip(names, weights.parts, strict=True)).run(None, {"x": x})[0]


def of_offsets(weights, x, change=lambda values: values):
    """What offsets add: totals of blocks of a row times them, float64 [rows, n]; `change` is applied to all factors."""
    if weights.offsets is None:
        return np.zeros((len(x), weights.n))
    blocks = weights.offsets.shape[1]
    padded = np.zeros((len(x), blocks * weights.block))
    padded[:, : weights.k] = change(x)
    return padded.reshape(len(x), blocks, -1).sum(axis=-1) @ change(weights.offsets.astype(np.float64)).T


class Product:
    """The library's product with packed weights."""

    def __init__(self, weights, kernel):
        self._packed = PackedMatrix(weights.n, weights.k, weights.bits, weights.block, *weights.has)
        self._packed.fill(kernel, weights.codes, weights.scales, weights.zeros, offsets=weights.offsets)
        numbers = {"matrix": self._packed.address, "kernel": kernel}
        self._session = session_of(helper.make_node("Product", ["x"], ["out"], domain="kvq", **numbers))

    @property
    def nbytes(self):
        return self._packed.nbytes

    def __call__(self, x):
        return self._session.run(None, {"x": x})[0]


# bits, zero points, offsets, halves
# A form with halves has four parts.
FORMS: tuple[tuple, ...] = (
    (8, False, False), (4, False, False), (4, True, False), (4, False, True), (4, False, True, True),
    (5, True, False), (5, True, False, True), (6, True, False), (6, True, False, True),
)  # fmt: skip
shapes = st.tuples(
    st.integers(1, 100), st.integers(1, 600), st.sampled_from(FORMS), st.sampled_from([32, 64, 128, 256])
)


@given(shapes, st.integers(1, 70), KERNELS, st.integers(0, 2**32 - 1))
@examples(60)
def test_products_are_those_of_onnxruntime(shape, rows, kernel, seed):
    (n, k, (bits, *parts), block), random = shape, np.random.default_rng(seed)
    weights = Weights(random, n, k, bits, block, *parts)
    x = (random.standard_normal((rows, k)) * np.exp(2 * random.standard_normal((rows, 1)))).astype(np.float32)
    out, expected = Product(weights, kernel[1])(x), matmul_nbits(weights, x) + of_offsets(weights, x)
    size = np.abs(x).astype(np.float64) @ weights.floats(less=-1).T  # of what onnxruntime adds: codes and zero points
    size += of_offsets(weights, x, np.abs)
    assert out.shape == (rows, n)
    assert (np.abs(out - expected) <= TOLERANCE * size + 1e-30).all()


@given(shapes, st.integers(2, 230), KERNELS, st.integers(0, 2**32 - 1))
@examples(40)
def test_a_row_does_not_depend_on_the_rows_beside_it(shape, rows, kernel, seed):
    (n, k, (bits, *parts), block), random = shape, np.random.default_rng(seed)
    product = Product(Weights(random, n, k, bits, block, *parts), kernel[1])
    x = random.standard_normal((rows, k)).astype(np.float32)
    whole = product(x)
    first = int(random.integers(rows))
    last = int(random.integers(first, rows)) + 1
    np.testing.assert_array_equal(product(x[first:last]), whole[first:last])
    np.testing.assert_array_equal(product(x[first : first + 1]), whole[first : first + 1])


@given(st.sampled_from(FORMS), KERNELS, st.sampled_from([32, 64]), st.integers(0, 2**32 - 1))
@examples(20)
def test_whole_numbers_are_multiplied_exactly(form, kernel, block, seed):
    (bits, *parts), random = form, np.random.default_rng(seed)
    weights = Weights(random, 37, 200, bits, block, *parts)
    weights.scales[...] = 1
    if weights.offsets is not None:
        np.rint(weights.offsets, out=weights.offsets)
    x = random.integers(-127, 128, (9, 200)).astype(np.float32)
    x[:, ::block] = 127  # so that a step is 1
    expected = x.astype(np.float64) @ weights.floats().T + of_offsets(weights, x)
    np.testing.assert_array_equal(Product(weights, kernel[1])(x), expected)


@pytest.mark.parametrize("kernel", library.kernels().values(), ids=library.kernels())
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_in_its_row_alone(kernel, value):
    random = np.random.default_rng(0)
    weights, x = Weights(random, 40, 128, 8, 64, False), random.standard_normal((20, 128)).astype(np.float32)
    x[7, 100] = value
    finite = np.isfinite(Product(weights, kernel)(x))
    assert not finite[7].any()
    assert np.delete(finite, 7, axis=0).all()


@pytest.mark.parametrize("kernel", library.kernels().values(), ids=library.kernels())
def test_rows_of_zeros_and_of_next_to_nothing_yield_zeros(kernel):
    weights, x = Weights(np.random.default_rng(0), 40, 128, 8, 64, False), np.zeros((3, 128), np.float32)
    x[1], x[2] = 1e-42, 1e-37
    out = Product(weights, kernel)(x)
    np.testing.assert_array_equal(out[:2], 0)
    assert np.abs(out[2]).max() < 1e-30


@given(st.integers(1, 90), st.integers(1, 4), KERNELS, st.integers(0, 2**32 - 1), st.sampled_from(FORMS))
@examples(20)
def test_a_matrix_may_be_packed_some_rows_at_a_time(n, panels, kernel, seed, form):
    random, (bits, *parts) = np.random.default_rng(seed), form
    weights = Weights(random, n, 96, bits, 32, *parts)
    x = random.standard_normal((2, 96)).astype(np.float32)
    expected, product = Product(weights, kernel[1])(x), Product(weights, kernel[1])
    packed = product._packed
    for array in (packed._codes, packed._scales, packed._zeros, packed._offsets):
        if array is not None:
            array[...] = 255 if array.dtype == np.uint8 else np.nan
    for first in range(0, n, step := panels * PANEL):
        arrays = (weights.codes, weights.scales, weights.zeros, weights.offsets)
        parts = (None if array is None else array[first : first + step] for array in arrays)
        codes, scales, points, offsets = parts
        packed.fill(kernel[1], codes, scales, points, first, offsets)
    np.testing.assert_array_equal(product(x), expected)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("block", [16, 32, 48, 64, 128, 256, 512])
def test_what_is_said_to_be_packed_is_packed_and_nothing_else(bits, block, zeros):
    packed = PackedMatrix(3, block, bits, block, zeros)
    codes, scales = np.zeros(packed.shapes[0], np.uint8), np.zeros(packed.shapes[1], np.float32)
    points = np.zeros(packed.shapes[2], np.uint8) if zeros else None
    if packs(bits, block, zeros):
        packed.fill(0, codes, scales, points)
    else:
        with pytest.raises(BackendError):
            packed.fill(0, codes, scales, points)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("has", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_what_blocks_have_beside_scales_is_packed_or_refused(bits, has, halves):
    packed = PackedMatrix(3, 64, bits, 32, *has, halves)
    codes, scales = np.zeros(packed.shapes[0], np.uint8), np.zeros(packed.shapes[1], np.float32)
    given = {"zeros": np.zeros(packed.shapes[2], np.uint8) if has[0] else None, "offsets": scales if has[1] else None}
    if packs(bits, 32, *has) and (has[1] or bits in BETWEEN or not halves):
        packed.fill(0, codes, scales, **given)
    else:
        with pytest.raises(BackendError):
            packed.fill(0, codes, scales, **given)


@given(KERNELS, st.integers(1, 70), st.sampled_from([form for form in FORMS if form[3:]]), st.integers(0, 2**32 - 1))
@examples(20)
def test_halves_give_the_very_products_of_the_floats_that_they_are(kernel, rows, form, seed):
    random, (bits, *parts) = np.random.default_rng(seed), form
    weights = Weights(random, 50, 200, bits, 32, *parts)
    x = random.standard_normal((rows, 200)).astype(np.float32)
    halves, weights.halves = Product(weights, kernel[1]), False
    floats = Product(weights, kernel[1])
    numbers = 64 * 7 * (1 if weights.offsets is None else 2)  # scales and offsets of whole panels
    assert floats.nbytes - halves.nbytes == 2 * numbers
    np.testing.assert_array_equal(halves(x), floats(x))


@pytest.mark.parametrize("has", [False, True])
def test_offsets_are_given_where_a_matrix_has_them_and_nowhere_else(has):
    packed = PackedMatrix(3, 64, 4, 32, offsets=has)
    codes, scales = np.zeros(packed.shapes[0], np.uint8), np.zeros(packed.shapes[1], np.float32)
    with pytest.raises(BackendError):
        packed.fill(0, codes, scales, offsets=None if has else scales)


def test_plain_c_leaves_products_to_onnxruntime():
    kernels = library.kernels()
    assert not multiplies(kernels["plain"])
    assert {name for name, kernel in kernels.items() if multiplies(kernel)} == kernels.keys() - {"plain", "neon"}
