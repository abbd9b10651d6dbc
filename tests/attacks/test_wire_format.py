"""Files that one reader of protobuf understands otherwise than another, or that are no ONNX at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.attacks.conftest import Attack, refused
from tests.attacks.graphs import (
    DECODER,
    GRAPH,
    HEAD,
    INITIALIZER,
    NODE,
    SEGMENT,
    constant,
    content,
    inner,
    model,
    wire,
)
from tests.tools.mutants import DELIMITED, FIXED32, FIXED64, GROUP, GROUP_END, VARINT, Fields, serialized, varint

ELU = helper.make_node("Elu", ["residual"], ["evil"]).SerializeToString()
LOOP = helper.make_node("Loop", ["n"], ["evil"]).SerializeToString()


def wide(number: int, kind: int = DELIMITED) -> bytes:
    """A tag of more than 32 bits, of which a reader of 32 sees the field."""
    return varint((number << 3 | kind) + (1 << 32))


def first(*path: int) -> Any:
    """The first field below that has the last number of a path."""
    *above, last = path
    return lambda tree: next(field for field in inner(tree, *above) if field[0] == last)


def again(*path: int) -> Any:
    """Write a field twice."""
    return lambda tree: inner(tree, *path[:-1]).append(list(first(*path)(tree)))


def more(field: list[Any], *path: int) -> Any:
    return lambda tree: inner(tree, *path).append(list(field))


def as_is(data: bytes, *path: int) -> Any:
    """Bytes at the end of a message, as they are."""
    return lambda tree: inner(tree, *path).append([b"", FIXED64, data])


def changed(position: int, value: Any, *path: int) -> Any:
    def change(tree: Fields) -> None:
        first(*path)(tree)[position] = value

    return change


def bloated(tree: Fields) -> None:
    """A name that fills the file."""
    first(GRAPH, NODE, 2)(tree)[2] = b"n" * (1 << 18)


ORTM = b"\x08\x0a\x12\x06ORTM!!"  # IR version and a producer's name, and onnxruntime's own format at a glance
ATTRIBUTE_OF_NODE = 5
ATTACKS: dict[str, tuple[Attack, str]] = {
    # Fields that one reader sees and another does not
    "a node under a tag of 33 bits": (
        wire(SEGMENT, more([wide(NODE), DELIMITED, ELU], GRAPH)),
        "not a readable ONNX file .a number that is too long",
    ),
    "that node as it was found": (
        wire(SEGMENT, as_is(b"\x8a\x80\x80\x80\x10" + varint(len(ELU)) + ELU, GRAPH)),
        "a number that is too long",
    ),
    "a loop under a tag of 33 bits": (
        wire(HEAD, more([wide(NODE), DELIMITED, LOOP], GRAPH)),
        "a number that is too long",
    ),
    "a graph under a tag of 33 bits": (
        wire(HEAD, lambda tree: tree.append([wide(GRAPH), DELIMITED, [[NODE, DELIMITED, ELU]]])),
        "number that is too long",
    ),
    "functions under a tag of 33 bits": (wire(HEAD, more([wide(25), DELIMITED, b""])), "a number that is too long"),
    "external data under a tag of 33 bits": (
        wire(HEAD, more([wide(13), DELIMITED, b"\n\x08location\x12\x0b/etc/passwd"], GRAPH)),
        "number that is too long",
    ),
    "a tag with an empty byte": (
        wire(HEAD, more([varint(GRAPH << 3 | 2, 2), DELIMITED, b""])),
        "empty bytes at its end",
    ),
    "a tag of ten bytes": (wire(HEAD, more([varint(NODE << 3 | 2, 10), DELIMITED, ELU], GRAPH)), "too long or cut"),
    "field number 0": (wire(HEAD, more([b"\x02", DELIMITED, b""])), "field 0 of wire type 2 in a model"),
    "field number 2^28": (wire(HEAD, more([1 << 28, VARINT, 0])), "field 268435456 of wire type 0 in a model"),
    # Fields that come twice
    "two graphs": (wire(HEAD, again(GRAPH)), "graph twice in a model"),
    "a graph in two parts": (wire(HEAD, more([GRAPH, DELIMITED, [[NODE, DELIMITED, ELU]]])), "graph twice in a model"),
    "two operators in a node": (wire(HEAD, more([4, DELIMITED, b"Elu"], GRAPH, NODE)), "op_type twice in a node"),
    "two domains in a node": (
        wire(SEGMENT, lambda tree: inner(tree, GRAPH, NODE).extend([[7, DELIMITED, b"a"], [7, DELIMITED, b""]])),
        "domain twice in a node",
    ),
    "two names of a graph": (wire(HEAD, more([2, DELIMITED, b"b"], GRAPH)), "name twice in a graph"),
    "two types of a constant": (wire(HEAD, again(GRAPH, INITIALIZER, 2)), "data_type twice in a tensor"),
    "two places of a constant": (
        wire(HEAD, lambda tree: inner(tree, GRAPH, INITIALIZER).extend([[14, VARINT, 0], [14, VARINT, 1]])),
        "data_location twice in a tensor",
    ),
    "two operators of one name": (
        model(SEGMENT, lambda m: setattr(m.graph.node[0], "name", m.graph.node[1].name)),
        "two operators have the same name",
    ),
    "two shapes of an input": (wire(HEAD, again(GRAPH, 11, 2, 1, 2)), "shape twice in a tensor type"),
    "two sizes of a dimension": (
        wire(HEAD, lambda tree: inner(tree, GRAPH, 11, 2, 1, 2, 1).append([1, VARINT, 7])),
        "nothing, or two things",
    ),
    "two types of an input": (wire(HEAD, again(GRAPH, 11, 2)), "type twice in a declaration"),
    "two versions of a set": (wire(HEAD, again(8, 2)), "version twice in a operator set"),
    "two IR versions": (wire(HEAD, again(1)), "ir_version twice in a model"),
    # Numbers and lengths
    "a number of eleven bytes": (wire(HEAD, changed(2, b"\x80" * 10 + b"\x01", 1)), "too long or cut"),
    "a number of 70 bits": (wire(HEAD, changed(2, b"\xff" * 9 + b"\x7f", 1)), "too long or cut"),
    "a number with an empty byte": (wire(HEAD, changed(2, b"\x8a\x00", 1)), "empty bytes at its end"),
    "an operator that is a number": (
        wire(HEAD, lambda tree: first(GRAPH, NODE, 4)(tree).__setitem__(slice(1, 3), [VARINT, 7])),
        "field 4 of wire type 0 in a node",
    ),
    "a graph longer than the file": (
        content(HEAD, lambda data: data + b"\x3a\xff\xff\xff\xff\x0f"),
        "a model that is cut",
    ),
    "a graph of 2^40 bytes": (content(HEAD, lambda data: data + b"\x3a\x80\x80\x80\x80\x80\x20"), "too long or cut"),
    "a node longer than its graph": (wire(HEAD, as_is(b"\x0a\x7f", GRAPH)), "a graph that is cut"),
    "a float that is cut": (wire(HEAD, as_is(b"\x15\x00", GRAPH, NODE, ATTRIBUTE_OF_NODE)), "attribute that is cut"),
    "the last byte gone": (content(SEGMENT, lambda data: data[:-1]), "that is cut|too long or cut"),
    "half of the file": (content(SEGMENT, lambda data: data[: len(data) // 2]), "that is cut"),
    # Wire types
    "a group": (wire(HEAD, more([b"\x0b\x0c", FIXED64, b""], GRAPH)), "field 1 of wire type 3 in a graph"),
    "the end of a group": (wire(HEAD, more([1, GROUP_END, b""])), "field 1 of wire type 4 in a model"),
    "a group around a node": (
        wire(HEAD, more([5, GROUP, ELU + varint(5 << 3 | GROUP_END)], GRAPH)),
        "field 5 of wire type 3 in a graph",
    ),
    "wire type 6": (content(HEAD, lambda data: data + b"\x0e\x00"), "field 1 of wire type 6 in a model"),
    "wire type 7": (content(HEAD, lambda data: data + b"\x0f\x00"), "field 1 of wire type 7 in a model"),
    "a version as a float": (
        wire(HEAD, lambda tree: first(8, 2)(tree).__setitem__(slice(1, 3), [FIXED32, bytes(4)])),
        "field 2 of wire type 5 in a operator set",
    ),
    # Fields that mean something to others
    "an unknown field in the model": (wire(HEAD, more([99, VARINT, 1])), "field 99 of wire type 0 in a model"),
    "an unknown field in the graph": (wire(HEAD, more([99, VARINT, 1], GRAPH)), "field 99 of wire type 0 in a graph"),
    "an unknown field in a node": (wire(HEAD, more([99, VARINT, 1], GRAPH, NODE)), "field 99 of wire type 0 in a node"),
    "an unknown field in a constant": (
        wire(HEAD, more([99, VARINT, 1], GRAPH, INITIALIZER)),
        "field 99 of wire type 0 in a tensor",
    ),
    "an unknown field in an attribute": (
        wire(HEAD, lambda tree: inner(tree, GRAPH, NODE, ATTRIBUTE_OF_NODE).append([99, VARINT, 1])),
        "field 99 of wire type 0 in a attribute",
    ),
    "a part of a constant": (
        wire(HEAD, more([3, DELIMITED, b""], GRAPH, INITIALIZER)),
        "field 3 of wire type 2 in a tensor",
    ),
    "text in the model": (model(HEAD, lambda m: setattr(m, "doc_string", "x")), "field 6 of wire type 2 in a model"),
    "metadata": (model(HEAD, lambda m: m.metadata_props.add(key="a", value="b")), "it holds metadata"),
    "metadata of the graph": (
        model(HEAD, lambda m: m.graph.metadata_props.add(key="a", value="b")),
        "it holds metadata",
    ),
    "training information": (model(HEAD, lambda m: m.training_info.add()), "it holds training information"),
    "a function": (
        model(
            HEAD,
            lambda m: m.functions.append(
                helper.make_function("kvq", "Add", ["x"], ["y"], [], [helper.make_opsetid("", 21)])
            ),
        ),
        "it defines functions",
    ),
    "an overload": (model(HEAD, lambda m: setattr(m.graph.node[0], "overload", "x")), "names an overload"),
    "values that are declared": (
        model(HEAD, lambda m: m.graph.value_info.append(helper.make_tensor_value_info("x", 1, [1]))),
        "field 13 of wire type 2 in a graph",
    ),
    "quantization annotations": (
        model(HEAD, lambda m: m.graph.quantization_annotation.add()),
        "quantization annotations",
    ),
    "sparse constants": (model(HEAD, lambda m: m.graph.sparse_initializer.add()), "it holds sparse initializers"),
    "a subgraph": (
        model(
            HEAD,
            lambda m: m.graph.node[0].attribute.append(
                helper.make_attribute("body", helper.make_graph([], "b", [], []))
            ),
        ),
        "holds a subgraph",
    ),
    "a tensor in a node": (
        model(
            HEAD,
            lambda m: m.graph.node[0].attribute.append(
                helper.make_attribute("value", helper.make_tensor("t", 1, [1], np.zeros(1, "f4").tobytes(), raw=True))
            ),
        ),
        "holds a tensor",
    ),
    "a text in a node": (
        model(HEAD, lambda m: m.graph.node[0].attribute.append(helper.make_attribute("mode", "edge"))),
        "holds a text",
    ),
    "floats in a node": (
        model(HEAD, lambda m: m.graph.node[0].attribute.append(helper.make_attribute("values", [1.0]))),
        "in a attribute",
    ),
    "an attribute of a function": (
        model(HEAD, lambda m: setattr(m.graph.node[0].attribute[0], "ref_attr_name", "x")),
        "attribute of a function",
    ),
    "an attribute of two types": (
        model(HEAD, lambda m: setattr(m.graph.node[0].attribute[0], "f", 1.0)),
        "no value of its type",
    ),
    "an attribute without a type": (
        model(HEAD, lambda m: m.graph.node[0].attribute[0].ClearField("type")),
        "no value of its type",
    ),
    "an attribute of another type": (
        model(HEAD, lambda m: setattr(m.graph.node[0].attribute[0], "type", onnx.AttributeProto.FLOATS)),
        "no value of its",
    ),
    "an attribute twice": (
        model(HEAD, lambda m: m.graph.node[0].attribute.append(m.graph.node[0].attribute[0])),
        "says axis twice",
    ),
    # Constants
    "floats outside of raw_data": (
        model(SEGMENT, constant(lambda t: t.float_data.append(1.0))),
        "field 4 of wire type 2 in a tensor",
    ),
    "whole numbers outside of raw_data": (
        model(SEGMENT, constant(lambda t: t.int64_data.append(1))),
        "field 7 of wire type 2 in a tensor",
    ),
    "a constant of texts": (
        model(SEGMENT, constant(lambda t: t.string_data.append(b"x"))),
        "field 6 of wire type 2 in a tensor",
    ),
    "a constant of doubles": (
        model(SEGMENT, constant(lambda t: setattr(t, "data_type", TensorProto.DOUBLE))),
        "is of type 11",
    ),
    "a constant of no type": (model(SEGMENT, constant(lambda t: t.ClearField("data_type"))), "is of type 0"),
    "a constant of type 2^32 + 7": (
        wire(SEGMENT, changed(2, (1 << 32) + 7, GRAPH, INITIALIZER, 2)),
        "is of type 4294967",
    ),
    "a constant without a name": (model(SEGMENT, constant(lambda t: t.ClearField("name"))), "has no name"),
    "a constant of too many bytes": (
        model(SEGMENT, constant(lambda t: setattr(t, "raw_data", t.raw_data + b"x"))),
        "of shape .* has",
    ),
    "a constant without bytes": (
        model(SEGMENT, constant(lambda t: t.ClearField("raw_data"))),
        "of shape .* has 0 bytes",
    ),
    "a constant of -1 numbers": (model(SEGMENT, constant(lambda t: t.dims.insert(0, -1))), "has the shape"),
    "a constant of no numbers": (model(SEGMENT, constant(lambda t: t.dims.insert(0, 0))), "has the shape"),
    "a constant of five dimensions": (
        model(SEGMENT, constant(lambda t: t.dims.extend([1] * 5))),
        "more than 4 of dims in a tensor",
    ),
    "a size that overflows": (model(SEGMENT, constant(lambda t: t.dims.extend([1 << 32, 1 << 32]))), "bytes"),
    "a size of 2^63": (model(SEGMENT, constant(lambda t: t.dims.insert(0, (1 << 63) - 1))), "has the shape"),
    # Texts
    "an operator that is no text": (
        wire(HEAD, changed(2, b"\xff\xfe", GRAPH, NODE, 4)),
        "text that is not UTF-8 in a node",
    ),
    "an operator with a zero": (wire(HEAD, changed(2, b"Add\0", GRAPH, NODE, 4)), "control characters in a node"),
    "a value with a line break": (wire(HEAD, changed(2, b"a\nb", GRAPH, NODE, 2)), "control characters in a node"),
    "a value whose name fills the file": (wire(HEAD, bloated), "a name that is too long"),
    # Bloat
    "a hundred thousand empty nodes": (
        wire(HEAD, as_is(b"\x0a\x00" * 140_000, GRAPH)),
        "more than 131072 of node in a graph",
    ),
    "sixty thousand empty inputs of a node": (
        wire(HEAD, as_is(b"\x0a\x00" * 60_000, GRAPH, NODE)),
        "more than 64 of input",
    ),
    "sixty thousand packed sizes": (
        wire(HEAD, as_is(b"\x0a\xe0\xd4\x03" + b"\x01" * 60_000, GRAPH, INITIALIZER)),
        "more than 4 of dims|wire type 2 in a tensor",
    ),
    "sixty thousand sets": (wire(HEAD, as_is(b"\x42\x00" * 60_000)), "more than 8 of opset_import"),
    "a megabyte of graph": (content(HEAD, lambda data: data + bytes(1 << 20)), "head.onnx is larger than 327680 bytes"),
    # Other formats
    "onnxruntime's own format": (
        content(HEAD, lambda data: b"\x18\0\0\0ORTM" + bytes(256)),
        "onnxruntime's own format, not in ONNX",
    ),
    "ONNX that looks like it": (content(DECODER, lambda data: ORTM + data), "onnxruntime's own format, not in ONNX"),
    "a pickle": (content(HEAD, lambda data: b"\x80\x04cos\nsystem\n(S'true'\ntR."), "not a readable ONNX file"),
    "a zip": (content(HEAD, lambda data: b"PK\x03\x04" + bytes(64)), "not a readable ONNX file"),
    "a library": (content(HEAD, lambda data: b"\x7fELF\x02\x01\x01" + bytes(64)), "not a readable ONNX file"),
    "an empty file": (content(HEAD, lambda data: b""), "its IR version is None"),
    "a model without a graph": (content(HEAD, lambda data: b"\x08\x0a"), "it holds no graph"),
    "an empty graph": (content(HEAD, lambda data: b"\x08\x0a\x3a\x00"), "feature set this kvq does not know"),
    # Versions
    "IR version 3": (model(HEAD, lambda m: setattr(m, "ir_version", 3)), "its IR version is 3"),
    "operators of version 1": (model(HEAD, lambda m: setattr(m.opset_import[0], "version", 1)), "of version 1 of"),
    "operators of version 2^40": (
        model(HEAD, lambda m: setattr(m.opset_import[0], "version", 1 << 40)),
        "of version 10995",
    ),
    "a foreign set": (model(HEAD, lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))), "ai.onnx.ml"),
    "a set twice": (model(HEAD, lambda m: m.opset_import.append(helper.make_opsetid("", 21))), "of version 21 of"),
    "no sets": (model(HEAD, lambda m: m.ClearField("opset_import")), "of a set that it does not import"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_file_is_refused(name: str, fp32: Path) -> None:
    attack, words = ATTACKS[name]
    attack(fp32)
    refused(fp32, words)


def test_what_the_rewriting_does_by_itself_is_no_harm(fp32: Path) -> None:
    data = (fp32 / HEAD).read_bytes()
    wire(HEAD, lambda tree: None)(fp32)
    assert (fp32 / HEAD).read_bytes() == data
    assert serialized([[1, VARINT, 10]]) == b"\x08\x0a"
