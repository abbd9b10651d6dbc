"""Writing ONNX graphs: a small builder, and the one file their weights share."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kvq.runtime.bundle.manifest import WEIGHTS

OPSET, CONTRIB_OPSET, IR_VERSION = 21, 1, 10
CONTRIB = "com.microsoft"
# Operators of the runtime's native library.
KVQ = "kvq"
# Smaller tensors stay inside the graph file.
EXTERNAL_FROM_BYTES = 1024
# Large tensors start on a page, so that they can be mapped into memory.
PAGE_FROM_BYTES, PAGE, LINE = 1 << 16, 4096, 64


class WeightFile:
    """Appends tensors to the weights file; a tensor added under a known name is stored once."""

    def __init__(self, folder: Path) -> None:
        self._file = open(folder / WEIGHTS, "wb")  # noqa: SIM115 # closed by close() or __exit__
        self._tensors: dict[str, TensorProto] = {}

    def add(self, name: str, array: np.ndarray) -> TensorProto:
        """Store a tensor (or find it by name) and return its reference for a graph."""
        if name in self._tensors:
            return self._tensors[name]
        array = np.ascontiguousarray(array)
        if array.nbytes < EXTERNAL_FROM_BYTES:
            tensor = numpy_helper.from_array(array, name)
        else:
            alignment = PAGE if array.nbytes >= PAGE_FROM_BYTES else LINE
            self._file.write(b"\0" * (-self._file.tell() % alignment))
            tensor = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
            tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
            for key, value in (("location", WEIGHTS), ("offset", self._file.tell()), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            self._file.write(array.data)
        self._tensors[name] = tensor
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> TensorProto:
        """The reference of a tensor added before."""
        return self._tensors[name]

    def flush(self) -> None:
        """Make what was added readable for others."""
        self._file.flush()

    def close(self) -> None:
        """Flush to disk; nothing is added afterwards."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


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
