"""Which graph uses which bytes of weights.bin: all of them, each as one tensor and no other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kvq.runtime.bundle import limits
from kvq.runtime.bundle.manifest import WEIGHTS, Architecture
from kvq.runtime.bundle.onnx_file import FLOAT32, Region, Tensor
from kvq.runtime.errors import BundleError

AT_ONCE = 1 << 20  # bytes of a tensor


class Regions:
    """The bytes of the file of weights that the graphs seen so far use.

    Args:
        nbytes: of the file.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._by_name: dict[str, Tensor] = {}
        self._names: dict[Region, str] = {}

    def add(self, graph: str, tensors: Iterable[Tensor]) -> None:
        """See the constants of a graph, whose file name is given.

        Raises:
            BundleError: bytes that are not in the file, or that another name, type or shape has already.
        """
        for tensor in tensors:
            region = tensor.region
            if region is None:
                if tensor.dtype == FLOAT32:
                    _check_numbers(tensor.raw, graph, tensor.name)
                continue
            known = self._by_name.setdefault(tensor.name, tensor)
            if region.offset + region.nbytes > self._nbytes:
                raise _refused(graph, f"{tensor.name!r:.60} lies beyond the {self._nbytes} bytes of {WEIGHTS}")
            if known is not tensor and known != tensor:
                raise _refused(graph, f"{tensor.name!r:.60} is another tensor than in other graphs")
            if self._names.setdefault(region, tensor.name) != tensor.name:
                raise _refused(graph, f"{tensor.name!r:.60} has the bytes of {self._names[region]!r:.60}")

    def check_content(self, file: Path, shape: Architecture) -> None:
        """See that no bytes belong to two tensors, that those which belong to none are few zeros between them, and that
        floats are numbers: products with int8 activations take a NaN of the one before for nothing.

        Raises:
            BundleError: it is otherwise.
            OSError: the file cannot be read.
        """
        # Means of keys that were not known yet when they were first written, one for each layer.
        forgotten = shape.layers * (4 * shape.kv_heads * shape.head_dim + limits.ALIGNMENT)
        at = 0
        with open(file, "rb") as weights:
            for region in sorted(self._names):
                if region.offset < at:
                    raise _refused(WEIGHTS, f"{self._names[region]!r:.60} overlaps the tensor before it")
                _check_hole(weights, at, region.offset, forgotten)
                at = region.offset + region.nbytes
                if self._by_name[name := self._names[region]].dtype == FLOAT32:
                    for start in range(region.offset, at, AT_ONCE):
                        weights.seek(start)
                        _check_numbers(weights.read(min(AT_ONCE, at - start)), WEIGHTS, name)
            _check_hole(weights, at, self._nbytes, forgotten)


def _check_hole(weights: BinaryIO, start: int, stop: int, forgotten: int) -> None:
    if start == stop:
        return
    if stop - start >= limits.PAGE + forgotten:
        raise _refused(WEIGHTS, f"{stop - start} bytes at {start} belong to no tensor")
    weights.seek(start)
    if weights.read(stop - start).strip(b"\0"):
        raise _refused(WEIGHTS, f"bytes at {start} that belong to no tensor are not zero")


def _check_numbers(data: bytes, file: str, name: str) -> None:
    if not np.isfinite(np.frombuffer(data, "<f4")).all():
        raise _refused(file, f"{name!r:.60} holds NaN or infinity")


def _refused(name: str, why: str) -> BundleError:
    return BundleError(f"{name} is refused: {why}; export the bundle again with kvq export")
