"""Products of a checked graph handed to the native library: what is rewritten, what stays, and who may not say it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.bundle.guard import check_graph
from kvq.runtime.bundle.manifest import WEIGHTS
from kvq.runtime.bundle.onnx_file import Region
from kvq.runtime.bundle.renaming import Matrix, with_products
from kvq.runtime.bundle.wire import field, fields, varint
from kvq.runtime.errors import BundleError

FLOAT, UINT8 = TensorProto.FLOAT, TensorProto.UINT8


def stored(name: str, dtype: int, dims: tuple[int, ...], offset: int, nbytes: int) -> TensorProto:
    """A constant in the file of weights."""
    tensor = TensorProto(name=name, data_type=dtype, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", WEIGHTS), ("offset", offset), ("length", nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def product(x: str, prefix: str, output: str, level: int = 4, zeros: bool = False, **numbers: int) -> onnx.NodeProto:
    names = [x, f"{prefix}.codes", f"{prefix}.scales"] + ([f"{prefix}.zeros"] if zeros else [])
    numbers = {"K": 64, "N": 32, "bits": 4, "block_size": 32, "accuracy_level": level} | numbers
    return helper.make_node("MatMulNBits", names, [output], name=output, domain="com.microsoft", **numbers)


def weights(prefix: str, offset: int, zeros: bool = False) -> list[TensorProto]:
    """Of 4 bits, [32, 64] in blocks of 32."""
    found = [
        stored(f"{prefix}.codes", UINT8, (32, 2, 16), offset, 1024),
        stored(f"{prefix}.scales", FLOAT, (32, 2), offset + 1024, 256),
    ]
    return found + ([stored(f"{prefix}.zeros", UINT8, (32, 1), offset + 1280, 32)] if zeros else [])


def model_of(nodes: list[onnx.NodeProto], constants: list[TensorProto], domains: tuple[str, ...] = ()) -> bytes:
    values = [
        helper.make_tensor_value_info(name, FLOAT, ["tokens", size])
        for name, size in (("x", 64), (nodes[-1].output[0], 32))
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    opsets = [helper.make_opsetid(name, version) for name, version in (("", 21), ("com.microsoft", 1))]
    opsets += [helper.make_opsetid(name, 1) for name in domains]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def take_all(matrix: Matrix) -> dict[str, int]:
    return {"matrix": (1 << 47) + matrix.codes.offset, "kernel": 3}


def test_a_product_keeps_its_input_its_output_and_its_name():
    model = onnx.load_from_string(with_products(model_of([product("x", "w", "y")], weights("w", 4096)), take_all))
    (node,) = model.graph.node
    assert (node.op_type, node.domain, list(node.input), list(node.output), node.name) == (
        "Product",
        "kvq",
        ["x"],
        ["y"],
        "y",
    )
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert attributes == {"matrix": (1 << 47) + 4096, "kernel": 3}
    assert not model.graph.initializer
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 21, "com.microsoft": 1, "kvq": 1}


@pytest.mark.parametrize("zeros", [False, True])
def test_a_matrix_is_told_by_its_numbers_and_regions(zeros):
    seen = []
    with_products(model_of([product("x", "w", "y", zeros=zeros)], weights("w", 4096, zeros)), seen.append)
    parts = (Region(4096, 1024), Region(5120, 256), Region(5376, 32) if zeros else None)
    assert seen == [Matrix(32, 64, 4, 32, *parts)]


def test_what_nobody_takes_stays_to_the_byte():
    data = model_of([product("x", "w", "y")], weights("w", 4096))
    assert with_products(data, lambda matrix: None) is data


def test_float_activations_and_weights_inside_the_graph_are_not_offered():
    inline = [
        onnx.numpy_helper.from_array(np.zeros((32, 2, 16), np.uint8), "w.codes"),
        onnx.numpy_helper.from_array(np.ones((32, 2), np.float32), "w.scales"),
    ]
    for data in (
        model_of([product("x", "w", "y", level=0)], weights("w", 0)),
        model_of([product("x", "w", "y")], inline),
    ):
        assert with_products(data, pytest.fail) is data


def test_weights_that_another_operator_uses_stay():
    nodes = [product("x", "v", "z", N=64), product("z", "w", "y"), product("x", "w", "y2", level=0)]
    nodes += [helper.make_node("Add", ["y", "y2"], ["sum"])]
    left = with_products(model_of(nodes, weights("v", 0) + weights("w", 4096), ("kvq",)), take_all)
    model = onnx.load_from_string(left)
    assert [node.op_type for node in model.graph.node] == ["Product", "Product", "MatMulNBits", "Add"]
    assert {tensor.name for tensor in model.graph.initializer} == {"w.codes", "w.scales"}
    assert [entry.domain for entry in model.opset_import].count("kvq") == 1


def offset_nodes(x: str, prefix: str, output: str, of: str | None = None) -> list[onnx.NodeProto]:
    """A product of blocks that have offsets; `of`: the value whose blocks are summed up, x if none is given."""
    return [
        helper.make_node("Reshape", [of or x, "cut"], [f"{output}.blocks"]),
        helper.make_node("ReduceSum", [f"{output}.blocks", "last"], [f"{output}.totals"], keepdims=0),
        product(x, prefix, f"{output}.product"),
        helper.make_node("Gemm", [f"{output}.totals", f"{prefix}.offsets", f"{output}.product"], [output], transB=1),
    ]


def offset_weights(prefix: str, offset: int) -> list[TensorProto]:
    inline = [("cut", [-1, 2, 32]), ("last", [-1])]
    constants = [onnx.numpy_helper.from_array(np.array(numbers, np.int64), name) for name, numbers in inline]
    return [*weights(prefix, offset), stored(f"{prefix}.offsets", FLOAT, (32, 2), offset + 2048, 256), *constants]


def test_what_offsets_add_is_part_of_a_product():
    seen: list[Matrix] = []
    data = model_of(offset_nodes("x", "w", "y"), offset_weights("w", 4096))
    model = onnx.load_from_string(with_products(data, lambda matrix: seen.append(matrix) or take_all(matrix)))
    (node,) = model.graph.node
    assert (node.op_type, list(node.input), list(node.output)) == ("Product", ["x"], ["y"])
    assert not model.graph.initializer
    assert seen == [Matrix(32, 64, 4, 32, Region(4096, 1024), Region(5120, 256), None, Region(6144, 256))]
    assert with_products(data, lambda matrix: None) is data


@pytest.mark.parametrize(
    "case",
    ["sums of another value", "a product that is read twice", "offsets inside the graph", "8 bits", "zero points"],
)
def test_other_sums_stay(case):
    """The product alone is taken then; the Gemm adds to it as before."""
    nodes, constants = offset_nodes("x", "w", "y"), offset_weights("w", 4096)
    if case == "sums of another value":
        nodes = [helper.make_node("Abs", ["x"], ["other"]), *offset_nodes("x", "w", "y", of="other")]
    elif case == "a product that is read twice":
        nodes += [helper.make_node("Add", ["y", "y.product"], ["sum"])]
    elif case == "8 bits":  # of which the library has no products with offsets
        nodes[2] = product("x", "w", "y.product", bits=8)
        constants[0] = stored("w.codes", UINT8, (32, 2, 32), 8192, 2048)
    elif case == "zero points":
        nodes[2] = product("x", "w", "y.product", zeros=True)
        constants.append(stored("w.zeros", UINT8, (32, 1), 8192, 32))
    else:
        constants[2] = onnx.numpy_helper.from_array(np.ones((32, 2), np.float32), "w.offsets")
    model = onnx.load_from_string(with_products(model_of(nodes, constants), take_all))
    kinds = [node.op_type for node in model.graph.node]
    assert kinds == [node.op_type.replace("MatMulNBits", "Product") for node in nodes]
    assert {"w.offsets", "cut", "last"} <= {tensor.name for tensor in model.graph.initializer}


def test_sums_that_somebody_else_reads_stay():
    nodes = [*offset_nodes("x", "w", "y"), helper.make_node("Gemm", ["y.totals", "w.offsets"], ["z"], transB=1)]
    nodes += [helper.make_node("Add", ["y", "z"], ["sum"])]
    model = onnx.load_from_string(with_products(model_of(nodes, offset_weights("w", 4096)), take_all))
    assert [node.op_type for node in model.graph.node] == ["Reshape", "ReduceSum", "Product", "Gemm", "Add"]
    assert {tensor.name for tensor in model.graph.initializer} == {"w.offsets", "cut", "last"}


def test_no_file_may_have_a_product():
    data = with_products(model_of([product("x", "w", "y")], weights("w", 4096)), take_all)
    with pytest.raises(BundleError, match="Product"):
        check_graph(data, "decoder.onnx", {WEIGHTS})


@given(st.integers(0, 2**64 - 1))
def test_numbers_are_written_as_they_are_read(value):
    entry = helper.make_attribute("n", 0)
    data = field(1, 2, b"n") + field(3, 0, varint(value)) + field(20, 0, varint(2))
    entry.ParseFromString(data)
    assert entry.i == value - (value >> 63 << 64)
    assert b"".join(field(*part) for part in fields(data)) == data


def test_a_graph_is_written_as_it_is_read(tiny_bundle: Path):
    bundle = Bundle(tiny_bundle)
    for name in (bundle.manifest.decoder, bundle.manifest.head, *bundle.manifest.segments):
        data = bundle.graph(name)
        assert b"".join(field(*part) for part in fields(data)) == data
