"""Writing an ONNX graph: a small builder."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kvq.exporter.weights.file import WeightFile

OPSET, CONTRIB_OPSET, IR_VERSION = 21, 1, 10
CONTRIB = "com.microsoft"
# Operators of the runtime's native library.
KVQ = "kvq"


@dataclass
class Graph:
    """One graph in the making. Methods add a node and return the name of its output."""

    name: str
    weights: WeightFile
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def input(self, name: str, *shape: int | str, dtype: int = TensorProto.FLOAT) -> str:
        """Declare an input; a string in the shape is a free dimension."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, value: str, name: str, *shape: int | str) -> None:
        """Declare `value` as the float32 output `name`."""
        self.op("Identity", value, output=name)
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def weight(self, name: str, array: np.ndarray) -> str:
        """A constant whose data is in the weights file."""
        self.initializers[name] = self.weights.add(name, array)
        return name

    def stored(self, name: str) -> str:
        """A constant that is in the weights file already."""
        self.initializers[name] = self.weights.tensor(name)
        return name

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        """A small constant inside the graph."""
        array = np.asarray(values, dtype)
        name = f"const_{array.dtype.name}_{'x'.join(map(str, array.shape))}_{'_'.join(map(str, array.ravel()))}"
        self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def op(self, kind: str, *inputs: str, output: str | None = None, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output."""
        name = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, domain=domain, **attributes))
        return name

    def ops(self, kind: str, count: int, *inputs: str, domain: str = "", **attributes: Any) -> list[str]:
        """Add a node with `count` outputs."""
        name = f"{kind.lower()}_{len(self.nodes)}"
        names = [f"{name}_{i}" for i in range(count)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, domain=domain, **attributes))
        return names

    def extend(self, value: str, domain: str, **attributes: Any) -> bool:
        """Give the last node more attributes, if it is of `domain` and `value` its last output; whether it is."""
        last = self.nodes[-1]
        if last.domain != domain or value != last.output[-1]:
            return False
        last.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        return True

    def split(self, value: str, sizes: list[int]) -> list[str]:
        """Cut the last axis into parts."""
        return self.ops("Split", len(sizes), value, self.constant(sizes), axis=-1)

    def save(self, folder: Path) -> str:
        """Check and write `<name>.onnx`; returns the file name."""
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, CONTRIB_OPSET)]
        if any(node.domain == KVQ for node in self.nodes):
            opsets.append(helper.make_opsetid(KVQ, 1))
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="kvq")
        file = folder / f"{self.name}.onnx"
        with open(file, "wb") as out:
            out.write(model.SerializeToString())
            out.flush()
            os.fsync(out.fileno())
        return file.name
