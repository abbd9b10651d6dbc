"""Binding: onnxruntime reads and writes arrays of ours, which have to fit what a graph declares."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnxruntime

from kvq.runtime.compute.failures import refusal
from kvq.runtime.errors import BundleError


class NamedSession(NamedTuple):
    """An onnxruntime session and the file its graph came from; `kept` is memory of ours that it reads."""

    name: str
    session: onnxruntime.InferenceSession
    kept: object = None

    @property
    def inputs(self) -> set[str]:
        """Names of what it takes."""
        return {value.name for value in self.session.get_inputs()}

    @property
    def outputs(self) -> set[str]:
        """Names of what it yields."""
        return {value.name for value in self.session.get_outputs()}


class Bound:
    """An onnxruntime session bound to arrays by address: it reads and writes their memory directly.

    The binding knows addresses only, so the arrays are kept alive here.
    """

    def __init__(self, named: NamedSession, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
        self._name, session, self._kept = named
        self._session = session
        self._arrays = (inputs, outputs)
        self._binding = session.io_binding()
        for bind, arrays, declared in (
            (self._binding.bind_input, inputs, session.get_inputs()),
            (self._binding.bind_output, outputs, session.get_outputs()),
        ):
            _check_fit(named.name, arrays, {value.name: value.shape for value in declared})
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def run(self) -> None:
        """Run the graph once, on what the inputs hold now; the outputs are overwritten.

        Raises:
            BundleError: it does not run.
            MemoryShortageError: there is no memory for it.
        """
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's errors share no base class
            raise refusal(error, f"{self._name} does not fit the session", "export the bundle again") from None


def _check_fit(graph: str, arrays: dict[str, np.ndarray], declared: dict[str, list[int | str]]) -> None:
    """Compare buffers made after the manifest with what a graph declares; a string is a free dimension.

    Raises:
        BundleError: they do not fit, so the graph would read or write beyond a buffer.
    """
    fits = arrays.keys() == declared.keys() and all(
        len(declared[name]) == array.ndim
        and all(isinstance(d, str) or d == size for d, size in zip(declared[name], array.shape, strict=True))
        for name, array in arrays.items()
    )
    if not fits:
        expected = {name: array.shape for name, array in arrays.items()}
        raise BundleError(f"{graph} has {declared}, the manifest says {expected}; export the bundle again")
