"""Which nodes of a graph become a Chain: those that nobody else looks into."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kvq.exporter.export import export
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.bundle.chaining import with_chains
from kvq.runtime.bundle.guard import check_graph
from kvq.runtime.bundle.manifest import WEIGHTS
from kvq.runtime.compute.products import own_products
from kvq.runtime.errors import BundleError
from kvq.runtime.native import library
from kvq.runtime.native.matrices import multiplies
from tests.tools.checkpoints import TINY, save_checkpoint

FLOAT = TensorProto.FLOAT


def node(operator, inputs, outputs, **attributes):
    return helper.make_node(operator, inputs.split(), outputs.split(), domain="kvq", **attributes)


def layer(x="x", stream="s", number=""):
    """Product, AddNorm, Product, SwiGLU, Product, AddNorm, Product."""
    product, norm = {"matrix": 7, "kernel": 1}, {"epsilon": 1e-5, "block": 64}
    n = number
    return [
        node("Product", x, f"o{n}", **product),
        node("AddNorm", f"{stream} o{n} g1", f"s1{n} n1{n}", **norm),
        node("Product", f"n1{n}", f"u{n}", **product),
        node("SwiGLU", f"u{n}", f"a{n}", block=64),
        node("Product", f"a{n}", f"d{n}", **product),
        node("AddNorm", f"s1{n} d{n} g2", f"s2{n} n2{n}", **norm),
        node("Product", f"n2{n}", f"y{n}", **product),
    ]


def model_of(nodes, outputs, constants):
    declared = [
        [helper.make_tensor_value_info(name, FLOAT, ["n", 4]) for name in some.split()] for some in ("x s", outputs)
    ]
    held = [numpy_helper.from_array(np.ones(4, np.float32), name) for name in constants.split()]
    opsets = [helper.make_opsetid("kvq", 1), helper.make_opsetid("", 21)]
    return helper.make_model(helper.make_graph(nodes, "g", *declared, held), opset_imports=opsets, ir_version=10)


def rewritten(nodes, outputs="s2 y", constants="g1 g2"):
    """Operators, inputs and outputs of what is left, and the operators of each chain."""
    chains = []

    def take(steps):
        chains.append([step.operator.removeprefix("kvq::") for step in steps])
        return {"chain": 1 << 47}

    graph = onnx.load_from_string(with_chains(model_of(nodes, outputs, constants).SerializeToString(), take)).graph
    return [(each.op_type, " ".join(each.input), " ".join(each.output)) for each in graph.node], chains


WHOLE = ["Product", "AddNorm", "Product", "SwiGLU", "Product", "AddNorm", "Product"]


def test_what_stands_between_attention_becomes_one_node():
    nodes, chains = rewritten(layer())
    assert nodes == [("Chain", "x s g1 g2", "s2 y")]
    assert chains == [WHOLE]


def two_layers(attention, between=()):
    """Two layers, the second behind these nodes."""
    return rewritten([*layer(), *between, node("Attention", attention, "x_"), *layer("x_", "s2", "_")], "s2_ y_")


def test_layers_become_one_node_with_the_attention_between_them():
    nodes, chains = two_layers("y g1 g1 g2")
    assert nodes == [("Chain", "x s g1 g2 g1 g1 g2 g1 g2", "s2_ y_")]
    assert chains == [[*WHOLE, "Attention", *WHOLE]]


@pytest.mark.parametrize(
    ("attention", "between"),
    [
        ("g1 y y g2", ()),  # the product is no projection
        (
            "y angles angles g2",
            [helper.make_node("Cos", ["s"], ["angles"])],
        ),  # angles that come to be behind the product
        ("turned g1 g1 g2", [helper.make_node("Cos", ["y"], ["turned"])]),
    ],
)
def test_attention_of_another_kind_stays_a_node(attention, between):
    nodes, chains = two_layers(attention, between)
    assert [name for name, _, _ in nodes if name != "Cos"] == ["Chain", "Attention", "Chain"]
    assert nodes[-1] == ("Chain", "x_ s2 g1 g2", "s2_ y_")
    assert chains == [WHOLE, WHOLE]


@pytest.mark.parametrize("behind", [[], [node("SwiGLU", "x_", "a_")], [node("AddNorm", "s2 x_ g1", "s3 n3")]])
def test_a_chain_ends_before_attention_that_no_product_follows(behind):
    outputs = "s3 n3" if behind and behind[0].op_type == "AddNorm" else "s2 a_" if behind else "s2 x_"
    nodes, chains = rewritten([*layer(), node("Attention", "y g1 g1 g2", "x_"), *behind], outputs)
    assert nodes[0] == ("Chain", "x s g1 g2", "s2 y")
    assert chains == [WHOLE]


@pytest.mark.parametrize(
    ("read", "chained"),
    [
        ("o", WHOLE[2:]),
        ("s1", WHOLE[:5]),
        ("n1", WHOLE[:2]),
        ("a", WHOLE[:4]),
        ("d", WHOLE[:5]),
        ("n2", WHOLE[:6]),
        ("s2", WHOLE),
    ],
)
def test_a_value_that_somebody_else_reads_ends_it(read, chained):
    nodes, chains = rewritten([*layer(), helper.make_node("Identity", [read], ["copy"])], "s2 y copy")
    assert chains[0] == chained
    made = {name for _, _, outputs in nodes for name in outputs.split()}
    assert {"s2", "y", "copy", read} <= made


def test_what_the_graph_yields_is_there():
    nodes, chains = rewritten(layer(), "s2 y u")
    assert chains == [WHOLE[:3], WHOLE[4:]]
    assert ("Chain", "x s g1", "s1 u") in nodes


@pytest.mark.parametrize(
    ("place", "changed"),
    [
        (1, node("AddNorm", "o o g1", "s1 n1", epsilon=1e-5)),  # the stream is the product itself
        (1, node("AddNorm", "s o gain", "s1 n1", epsilon=1e-5)),  # a gain that is no constant
        (1, node("AddNorm", "later o g1", "s1 n1", epsilon=1e-5)),  # a stream that comes to be behind the product
    ],
)
def test_norms_of_another_kind_begin_no_chain(place, changed):
    nodes = layer()
    between = [helper.make_node("Identity", ["o"], ["gain"])] if "gain" in changed.input else []
    between += [helper.make_node("Identity", ["s"], ["later"])] if "later" in changed.input else []
    nodes[place : place + 1] = [*between, changed]
    _, chains = rewritten(nodes)
    assert chains == [WHOLE[2:]]


def test_no_file_may_have_a_chain():
    bare = [node("Chain", "x s g1", "s2 y", chain=1 << 47)]
    data = model_of(bare, "s2 y", "g1").SerializeToString()
    with pytest.raises(BundleError, match="Chain"):
        check_graph(data, "decoder.onnx", {WEIGHTS})


def test_the_layers_of_a_quantized_model_are_one_chain(tmp_path):
    wide = TINY | {"hidden_size": 256, "intermediate_size": 512}  # smaller matrices are in the graph itself
    checkpoint = save_checkpoint(tmp_path / "wide", wide)
    bundle = Bundle(export(str(checkpoint), tmp_path / "bundle", weights="int8").path)
    kernel = max(library.kernels().values())
    graph, kept = own_products(bundle.graph(bundle.manifest.decoder), bundle.path, kernel, 1)
    operators = [each.op_type for each in onnx.load_from_string(graph).graph.node]
    own, layers = multiplies(kernel), bundle.manifest.architecture.layers
    assert operators.count("Chain") == len(kept.chains) == own
    assert operators.count("AddNorm") == (not own) * (2 * layers - 1)
    assert operators.count("Attention") == (not own) * layers
