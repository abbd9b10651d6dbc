"""A graph as onnx's own protobuf reads it, in the words of the guard."""

from __future__ import annotations

from typing import Any

import onnx

from kvq.runtime.bundle.onnx_file import Graph


def set_fields(message: Any) -> set[str]:
    return {field.name for field, _ in message.ListFields()}


def read_by_onnx(data: bytes) -> Graph:
    """The same in the words of the guard; a field that it has none for fails."""
    model = onnx.ModelProto.FromString(data)
    assert model.SerializeToString(deterministic=True) is not None
    assert set_fields(model) <= {"ir_version", "producer_name", "graph", "opset_import"}
    assert set_fields(model.graph) <= {"node", "name", "initializer", "input", "output"}
    nodes, constants, sides = [], [], []
    for node in model.graph.node:
        assert set_fields(node) <= {"input", "output", "name", "op_type", "domain", "attribute"}
        attributes = {}
        for attribute in node.attribute:
            assert len(set_fields(attribute)) == 3
            value = onnx.helper.get_attribute_value(attribute)
            attributes[attribute.name] = tuple(value) if isinstance(value, list) else value
        operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        nodes.append((node.name, operator, list(node.input), list(node.output), attributes))
    for tensor in model.graph.initializer:
        assert set_fields(tensor) <= {"dims", "data_type", "name", "raw_data", "external_data", "data_location"}
        where = {entry.key: entry.value for entry in tensor.external_data}
        region = (int(where["offset"]), int(where["length"])) if where else None
        assert (tensor.data_location == onnx.TensorProto.EXTERNAL) == bool(where)
        constants.append((tensor.name, tensor.data_type, tuple(tensor.dims), tensor.raw_data, region))
    for side in (model.graph.input, model.graph.output):
        for value in side:
            assert value.type.WhichOneof("value") == "tensor_type"
        dims = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in side]
        sides.append([(v.name, v.type.tensor_type.elem_type, tuple(d)) for v, d in zip(side, dims, strict=True)])
    return Graph(nodes, constants, *sides, {entry.domain: entry.version for entry in model.opset_import})  # type: ignore[arg-type]
