"""The native library's operators beside the nodes of ONNX Runtime that they stand for."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.exporter.rotation import hadamard
from kvq.runtime.machine.threads import session_options
from kvq.runtime.native import library
from tests.tools.kvdata import examples

helper, FLOAT = onnx.helper, onnx.TensorProto.FLOAT
IMPORTS = [helper.make_opsetid(name, version) for name, version in (("", 17), ("kvq", 1), ("com.microsoft", 1))]
EPSILON = 1e-5


def session_of(nodes, inputs, outputs=("out",)):
    """A session over nodes whose inputs and outputs are floats of any shape."""
    names = [[helper.make_tensor_value_info(name, FLOAT, None) for name in some] for some in (inputs, outputs)]
    model = helper.make_model(helper.make_graph(nodes, "operators", *names), opset_imports=IMPORTS, ir_version=8)
    options = session_options()
    options.register_custom_ops_library(str(library.FILE))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@functools.cache
def add_norm(**block):
    names = ["x", "y", "gain"]
    node = helper.make_node("AddNorm", names, ["sum", "normed"], domain="kvq", epsilon=EPSILON, **block)
    return session_of([node], names, ["sum", "normed"])


@functools.cache
def add_and_norm():
    nodes = [
        helper.make_node("Add", ["x", "y"], ["sum"]),
        helper.make_node(
            "SimplifiedLayerNormalization", ["sum", "gain"], ["normed"], axis=-1, epsilon=EPSILON, stash_type=1
        ),
    ]
    return session_of(nodes, ["x", "y", "gain"], ["sum", "normed"])


@functools.cache
def swiglu(**block):
    return session_of([helper.make_node("SwiGLU", ["both"], ["out"], domain="kvq", **block)], ["both"])


@functools.cache
def split_silu_multiply():
    nodes = [
        helper.make_node("Split", ["both"], ["gate", "up"], axis=-1),
        helper.make_node("QuickGelu", ["gate"], ["silu"], domain="com.microsoft", alpha=1.0),
        helper.make_node("Mul", ["silu", "up"], ["out"]),
    ]
    return session_of(nodes, ["both"])


shapes = st.tuples(st.sampled_from([0, 1, 2, 3, 17, 130]), st.sampled_from([1, 2, 15, 16, 17, 64, 576, 1000]))


@given(shape=shapes, seed=st.integers(0, 2**32 - 1), size=st.sampled_from([0.0, 1e-3, 1.0, 1e3]))
@examples(60)
def test_add_norm_is_a_sum_and_its_rms_norm(shape, seed, size):
    rng = np.random.default_rng(seed)
    feed = {name: size * rng.standard_normal(shape, np.float32) for name in ("x", "y")}
    feed = {name: value.astype(np.float32) for name, value in feed.items()}
    feed["gain"] = rng.standard_normal(shape[1], np.float32)
    total, normed = add_norm().run(None, feed)
    expected = add_and_norm().run(None, feed)
    np.testing.assert_array_equal(total, expected[0])
    np.testing.assert_allclose(normed, expected[1], rtol=2e-6, atol=1e-30)


@given(shape=shapes, seed=st.integers(0, 2**32 - 1), size=st.sampled_from([0.0, 1.0, 30.0]))
@examples(40)
def test_swiglu_is_silu_of_one_half_times_the_other(shape, seed, size):
    both = np.random.default_rng(seed).standard_normal((shape[0], 2 * shape[1]), np.float32) * np.float32(size)
    (out,) = swiglu().run(None, {"both": both})
    # ONNX Runtime's logistic function is right to 1e-7 of one; ours also far below that.
    expected = split_silu_multiply().run(None, {"both": both})[0]
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=1e-6 * max(1, size) ** 2)


@given(
    tokens=st.sampled_from([1, 2, 65]),
    blocks=st.integers(1, 5),
    block=st.sampled_from([1, 2, 16, 32, 64, 256]),
    seed=st.integers(0, 2**32 - 1),
)
@examples(40)
def test_what_follows_a_norm_or_an_activation_is_rotated_block_by_block(tokens, blocks, block, seed):
    rng, columns = np.random.default_rng(seed), blocks * block
    x, y, both = (rng.standard_normal((tokens, n), np.float32) for n in (columns, columns, 2 * columns))
    feed = {"x": x, "y": y, "gain": rng.standard_normal(columns, np.float32)}
    rotation = hadamard(block)
    total, normed = add_norm().run(None, feed)
    same, turned = add_norm(block=block).run(None, feed)
    np.testing.assert_array_equal(same, total)
    expected = (normed.reshape(tokens, blocks, block) @ rotation).reshape(normed.shape)
    np.testing.assert_allclose(turned, expected, atol=1e-5 * np.abs(normed).max())
    (gated,), (turned,) = (operator.run(None, {"both": both}) for operator in (swiglu(), swiglu(block=block)))
    expected = (gated.reshape(tokens, blocks, block) @ rotation).reshape(gated.shape)
    np.testing.assert_allclose(turned, expected, atol=1e-5 * np.abs(gated).max())


@pytest.mark.parametrize("block", [-64, -1, 3, 32, 48, 2048, 2**40])
def test_blocks_that_do_not_divide_a_row_are_refused(block):
    feed = {name: np.ones(size, np.float32) for name, size in {"x": (2, 48), "y": (2, 48), "gain": (48,)}.items()}
    if block == 48:
        feed = {name: np.ones(size, np.float32) for name, size in {"x": (2, 96), "y": (2, 96), "gain": (96,)}.items()}
    with pytest.raises(Exception, match="kvq: block"):
        add_norm(block=block).run(None, feed)
    with pytest.raises(Exception, match="kvq: block"):
        swiglu(block=block).run(None, {"both": np.ones((2, 2 * feed["gain"].size), np.float32)})


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": ()},
        {"x": (3, 16)},
        {"x": (0, 16)},
        {"y": (2, 15)},
        {"y": (1, 16)},
        {"y": (16,)},
        {"gain": (15,)},
        {"gain": (17,)},
        {"gain": (0,)},
    ],
    ids=str,
)
def test_add_norm_of_wrong_sizes_reads_nothing(wrong):
    fitting = {"x": (2, 16), "y": (2, 16), "gain": (16,)}
    feed = {name: np.ones(size, np.float32) for name, size in (fitting | wrong).items()}
    with pytest.raises(Exception, match="kvq"):
        add_norm().run(None, feed)


@pytest.mark.parametrize("shape", [(2, 15), (2,), (), (1, 2, 2)], ids=str)
def test_swiglu_of_wrong_shapes_reads_nothing(shape):
    with pytest.raises(Exception, match="kvq"):
        swiglu().run(None, {"both": np.ones(shape, np.float32)})
