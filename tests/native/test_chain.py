"""Chains of the native library beside the nodes that they stand for: the same to the bit, whoever helps."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.runtime.machine.threads import session_options
from kvq.runtime.native import library
from kvq.runtime.native.chains import ADD_NORM, PRODUCT, SWIGLU, ChainStep, StepChain
from kvq.runtime.native.matrices import PackedMatrix
from tests.tools.kvdata import examples

helper, FLOAT = onnx.helper, onnx.TensorProto.FLOAT
IMPORTS = [helper.make_opsetid(name, version) for name, version in (("", 21), ("kvq", 1))]
KERNELS = st.sampled_from(sorted(library.kernels().items()))


def session_of(nodes, constants, outputs):
    names = (("x", "stream"), outputs)
    values = [[helper.make_tensor_value_info(name, FLOAT, None) for name in some] for some in names]
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "chain", *values, initializers)
    options = session_options()
    options.register_custom_ops_library(str(library.FILE))
    model = helper.make_model(graph, opset_imports=IMPORTS, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def node(operator, inputs, outputs, **attributes):
    return helper.make_node(operator, inputs, outputs, domain="kvq", **attributes)


def packed(random, kernel, n, k, bits):
    matrix = PackedMatrix(n, k, bits, 32)
    codes, scales, _ = matrix.shapes
    matrix.fill(kernel, random.integers(0, 256, codes, dtype=np.uint8), random.uniform(0.5, 2, scales) / k)
    return matrix


class Layer:
    """What stands between two layers' attention, of a narrow model: its steps, and the same as nodes.

    Its `steps` first ones, of: product, norm, product, SwiGLU, product, norm, product.
    """

    def __init__(self, random, kernel, bits, width, inner, block, steps):
        sizes = [(width, 32), (2 * inner, width), (width, inner), (48, width)]
        self.matrices = [packed(random, kernel, n, k, bits) for n, k in sizes]
        self.gains = {f"gain{i}": random.standard_normal(width, np.float32) for i in range(2)}
        o, up, down, following = (ChainStep(PRODUCT, matrix.address) for matrix in self.matrices)
        norm, swiglu = ChainStep(ADD_NORM, block=block, epsilon=1e-5), ChainStep(SWIGLU, block=block)
        self.steps = [o, norm, up, swiglu, down, norm, following][:steps]
        self.kernel = kernel

    @property
    def used_gains(self):
        return list(self.gains)[: max(1, sum(step.kind == ADD_NORM for step in self.steps))]

    def chained(self, threads):
        self.chain = StepChain(self.steps, self.kernel, threads)
        inputs = ["x", "stream", *self.used_gains]
        nodes = [node("Chain", inputs, ["left", "out"], chain=self.chain.address)]
        return session_of(nodes, {name: self.gains[name] for name in self.used_gains}, ["left", "out"])

    def one_by_one(self):
        nodes, x, stream, gains = [], "x", "stream", iter(self.gains)
        for i, step in enumerate(self.steps):
            out = f"out{i}"
            if step.kind == PRODUCT:
                nodes.append(node("Product", [x], [out], matrix=step.matrix, kernel=self.kernel))
            elif step.kind == SWIGLU:
                nodes.append(node("SwiGLU", [x], [out], block=step.block))
            else:
                names = [stream, x, next(gains)]
                stream = f"stream{i}"
                nodes.append(node("AddNorm", names, [stream, out], block=step.block, epsilon=step.epsilon))
            x = out
        return session_of(nodes, {name: self.gains[name] for name in self.used_gains}, [stream, x])


@given(
    kernel=KERNELS,
    bits=st.sampled_from([4, 8]),
    rows=st.sampled_from([0, 1, 2, 7, 16, 40]),
    sizes=st.sampled_from([(64, 32), (96, 64), (576, 160)]),
    block=st.sampled_from([0, 32]),
    steps=st.integers(2, 7),  # the first of them
    threads=st.sampled_from([1, 2, 3, 8]),
    seed=st.integers(0, 2**32 - 1),
)
@examples(60)
def test_a_chain_is_its_nodes_to_the_bit(kernel, bits, rows, sizes, block, steps, threads, seed):
    random = np.random.default_rng(seed)
    layer = Layer(random, kernel[1], bits, *sizes, block, steps)
    feed = {"x": random.standard_normal((rows, 32), np.float32)}
    feed["stream"] = random.standard_normal((rows, sizes[0]), np.float32)
    for found, wanted in zip(layer.chained(threads).run(None, feed), layer.one_by_one().run(None, feed), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_many_runs_give_the_same():
    """Threads come, help and go at any time: thousands of pieces of work, none lost and none done twice."""
    random = np.random.default_rng(0)
    layer = Layer(random, max(library.kernels().values()), 8, 576, 160, 32, 7)
    session = layer.chained(8)
    feed = {"x": random.standard_normal((3, 32), np.float32), "stream": random.standard_normal((3, 576), np.float32)}
    first = session.run(None, feed)
    for _ in range(2000):
        for found, wanted in zip(session.run(None, feed), first, strict=True):
            assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda steps: steps[1:],  # begins with a norm
        lambda steps: steps[:1],  # adds nothing to the stream
        lambda steps: [*steps[:2], steps[0]],  # a product of other columns
        lambda steps: [*steps, *steps[1:2] * 2],  # more gains than there are inputs
        lambda steps: [steps[0], steps[1]._replace(block=48)],
        lambda steps: [steps[0], steps[1]._replace(block=-32)],
        lambda steps: [*steps[:2], steps[2]._replace(kind=7)],
        lambda steps: [*steps[:2], ChainStep(PRODUCT)],  # no matrix
        lambda steps: [],
    ],
)
def test_steps_that_do_not_fit_together_are_refused(change):
    layer = Layer(np.random.default_rng(0), 0, 8, 64, 32, 0, 7)
    layer.steps = change(layer.steps)
    with pytest.raises(Exception, match="steps that do not fit together"):
        layer.chained(1)


def test_a_gain_that_is_left_out_is_missed():
    layer = Layer(np.random.default_rng(0), 0, 8, 64, 32, 0, 7)
    del layer.gains["gain1"]
    x, stream = (np.zeros(shape, np.float32) for shape in ((2, 32), (2, 64)))
    with pytest.raises(Exception, match="left out"):
        layer.chained(2).run(None, {"x": x, "stream": stream})


@pytest.mark.parametrize("shapes", [((2, 33), (2, 64)), ((2, 32), (1, 64)), ((2, 32), (2, 63))])
def test_rows_of_other_sizes_are_refused(shapes):
    layer = Layer(np.random.default_rng(0), 0, 8, 64, 32, 0, 7)
    x, stream = (np.zeros(shape, np.float32) for shape in shapes)
    with pytest.raises(Exception, match="does not have the shape"):
        layer.chained(2).run(None, {"x": x, "stream": stream})
