"""The file of weights that all graphs of a bundle share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from kvq.runtime.bundle.manifest import WEIGHTS

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
