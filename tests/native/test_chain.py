"""Chains of the native library beside the nodes that they stand for: the same to the bit, whoever helps."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.composition import open_bundle
from kvq.exporter.export import export
from kvq.runtime.bundle import chaining
from kvq.runtime.compute import products
from kvq.runtime.machine.threads import session_options
from kvq.runtime.native import library
from kvq.runtime.native.chains import ADD_NORM, ATTENTION, PRODUCT, SWIGLU, ChainStep, StepChain
from kvq.runtime.native.matrices import PackedMatrix, multiplies
from tests.native.test_native import IDS
from tests.tools.checkpoints import TINY, save_checkpoint
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
        lambda steps: [*steps, steps[1]],  # a norm of other columns than the stream's
        lambda steps: [steps[0], steps[1]._replace(block=48)],
        lambda steps: [steps[0], steps[1]._replace(block=-32)],
        lambda steps: [*steps[:2], steps[2]._replace(kind=7)],
        lambda steps: [*steps[:2], ChainStep(PRODUCT)],  # no matrix
        lambda steps: [*steps, ChainStep(ATTENTION, inputs=3)],  # nobody says how many columns it yields
        lambda steps: [*steps, ChainStep(ATTENTION, inputs=3), steps[1]],
        lambda steps: [*steps, ChainStep(ATTENTION, inputs=4), *steps],
        lambda steps: [*steps, ChainStep(ATTENTION, inputs=3, layer=-1), *steps],
        lambda steps: [ChainStep(ATTENTION, inputs=3), *steps],
        lambda steps: [],
    ],
)
def test_steps_that_do_not_fit_together_are_refused(change):
    layer = Layer(np.random.default_rng(0), 0, 8, 64, 32, 0, 7)
    layer.steps = change(layer.steps)
    with pytest.raises(Exception, match="steps that do not fit together"):
        layer.chained(1)


@pytest.mark.parametrize("gains", [["gain0"], ["gain0", "gain1", "gain1"]])
def test_gains_have_to_be_as_many_as_norms(gains, monkeypatch):
    layer = Layer(np.random.default_rng(0), 0, 8, 64, 32, 0, 7)
    monkeypatch.setattr(Layer, "used_gains", gains)
    x, stream = (np.zeros(shape, np.float32) for shape in ((2, 32), (2, 64)))
    with pytest.raises(Exception, match="left out, or one too many"):
        layer.chained(2).run(None, {"x": x, "stream": stream})


def test_a_gain_has_the_columns_of_the_stream():
    layer = Layer(np.random.default_rng(0), 0, 8, 64, 32, 0, 7)
    layer.gains["gain1"] = np.ones(63, np.float32)
    x, stream = (np.zeros(shape, np.float32) for shape in ((2, 32), (2, 64)))
    with pytest.raises(Exception, match="does not have the shape"):
        layer.chained(2).run(None, {"x": x, "stream": stream})


@pytest.mark.parametrize("shapes", [((2, 33), (2, 64)), ((2, 32), (1, 64)), ((2, 32), (2, 63))])
def test_rows_of_other_sizes_are_refused(shapes):
    layer = Layer(np.random.default_rng(0), 0, 8, 64, 32, 0, 7)
    x, stream = (np.zeros(shape, np.float32) for shape in shapes)
    with pytest.raises(Exception, match="does not have the shape"):
        layer.chained(2).run(None, {"x": x, "stream": stream})


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A bundle of a small model with 8-bit weights, whose matrices are the library's."""
    folder = tmp_path_factory.mktemp("quantized")
    wide = TINY | {"hidden_size": 256, "intermediate_size": 512}  # smaller matrices are in the graph itself
    return export(str(save_checkpoint(folder / "wide", wide)), folder / "bundle", weights="int8").path


def said_by(bundle):
    """Logits of a prompt, steps, drafts' rows and several sessions in a pass, by sessions of some policies."""
    model, found = open_bundle(bundle, threads=2), []
    for policy, options in (("int8", {}), ("mixed", {"prefill": "stepwise"}), ("rule", {"kv_bits": 7})):
        session = model.session(policy, recent=8, **options)
        found.append(session.append(IDS[:60]))
        found += [session.append([token]) for token in IDS[60:70]]
        fork = session.fork()
        found += model.step([(session, IDS[70:71]), (fork, IDS[71:74])])
        found.append(session.append(IDS[74:79]))
        assert session.backend.name == "native"
    return np.concatenate([np.ravel(logits) for logits in found])


def test_a_model_says_the_same_whether_its_layers_are_one_chain_or_its_nodes(quantized, monkeypatch):
    if not multiplies(max(library.kernels().values())):
        pytest.skip("products of this machine are onnxruntime's")
    whole = said_by(quantized)
    chained = []

    def without_attention(graph, take):
        """As if attention were an operator that no chain knows."""
        monkeypatch.setattr(chaining, "ATTENTION", "none")
        return chaining.with_chains(graph, lambda nodes: chained.append(len(nodes)) or take(nodes))

    monkeypatch.setattr(products, "with_chains", without_attention)
    np.testing.assert_array_equal(said_by(quantized), whole)
    assert len(chained) == TINY["num_hidden_layers"]
    monkeypatch.setattr(products, "with_chains", lambda graph, take: graph)
    np.testing.assert_array_equal(said_by(quantized), whole)


def test_a_chain_with_attention_needs_a_pass(quantized):
    session = open_bundle(quantized, threads=2).session("int8")
    session.append(IDS[:20])
    forward = session.backend.forward_pass(session.model.engine, 2)
    if not multiplies(max(library.kernels().values())):
        pytest.skip("products of this machine are onnxruntime's")
    with pytest.raises(Exception, match="no session has set a pass"):
        forward._graph.run()
    forward.forward(np.array(IDS[20:22]), session.store)
    assert np.isfinite(forward.residual).all()
