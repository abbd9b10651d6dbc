"""The model's graph segments on onnxruntime, with every buffer bound once.

A forward pass goes through layers + 1 segments. Segment i takes the residual stream and the
attention output of layer i - 1 and yields the residual stream and layer i's queries, keys and
values; what happens between two segments - attention over the KV store - is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnxruntime

from kvq.runtime.bundle import Bundle
from kvq.runtime.errors import BundleError
from kvq.runtime.threads import configure, session_options

# Rows of logits computed at a time: a long prompt must not materialise [tokens, vocab] floats.
HEAD_ROWS = 32

# attend(layer, query, key, value, out); arrays as in `AttentionBackend.attend`.
Attend = Callable[[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


class NamedSession(NamedTuple):
    """An onnxruntime session and the file its graph came from."""

    name: str
    session: onnxruntime.InferenceSession


class Engine:
    """onnxruntime sessions of one bundle. Stateless and shared: safe to use from many threads."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self.threads = configure(threads)
        self.architecture = bundle.manifest.architecture
        options = session_options()
        # An arena per session would keep every segment's largest buffers: 190 MB more on the 135M shape.
        options.enable_cpu_mem_arena = False
        # Graphs are handed over as checked bytes, so the folder of their weights is stated here.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))

        def session(name: str) -> NamedSession:
            graph = bundle.graph(name)
            try:
                return NamedSession(
                    name, onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
                )
            except Exception as error:  # onnxruntime's errors share no base class
                why = str(error).strip().splitlines()[0]
                raise BundleError(f"{name} cannot be loaded ({why}); export the bundle again") from None

        self.segments = [session(name) for name in bundle.manifest.segments]
        self.head = session(bundle.manifest.head)
        self.uncertainty = session(bundle.manifest.uncertainty)
        Workspace(self, 1), Head(self, 1)  # the graphs fit the manifest, or this raises BundleError


class Workspace:
    """Buffers and bindings for forward passes over a fixed number of tokens.

    One workspace serves one thread at a time; a run allocates nothing.

    Args:
        engine: the sessions.
        tokens: tokens per forward pass.
    """

    def __init__(self, engine: Engine, tokens: int) -> None:
        shape = engine.architecture
        self.engine = engine
        self.tokens = tokens
        self.ids = np.zeros(tokens, np.int64)
        self.positions = np.zeros(tokens, np.int64)
        heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.keys = np.zeros((shape.layers, kv_heads, tokens, head_dim), np.float32)
        self.values = np.zeros((shape.layers, kv_heads, tokens, head_dim), np.float32)
        self._query_key = np.zeros((tokens, heads + kv_heads, head_dim), np.float32)
        self._value = np.zeros((tokens, kv_heads, head_dim), np.float32)
        self._attention = np.zeros((tokens, heads, head_dim), np.float32)
        residual = [np.zeros((tokens, shape.hidden), np.float32) for _ in range(2)]
        cosine, sine = (np.zeros((tokens, head_dim // 2), np.float32) for _ in range(2))
        flat_attention = self._attention.reshape(tokens, -1)

        self._segments = []
        for i, session in enumerate(engine.segments):
            inputs: dict[str, np.ndarray] = {"ids": self.ids, "positions": self.positions}
            outputs: dict[str, np.ndarray] = {"residual_out": residual[(i + 1) % 2]}
            if i > 0:
                inputs = {"residual": residual[i % 2], "attention": flat_attention}
            if i == 0:
                outputs |= {"cosine": cosine, "sine": sine}
            elif i < shape.layers:
                inputs |= {"cosine": cosine, "sine": sine}
            if i < shape.layers:
                outputs |= {"query_key": self._query_key, "value": self._value}
            self._segments.append(_Bound(session, inputs, outputs))
        self.residual = residual[len(engine.segments) % 2]

    def forward(self, ids: np.ndarray, start: int, attend: Attend) -> None:
        """Run all layers over ids int64 [tokens] at the positions start, start + 1, ...

        Afterwards `keys`, `values` float32 [layers, kv_heads, tokens, head_dim] are those of the
        new tokens and `residual` float32 [tokens, hidden] is what `Head` takes.
        """
        self.ids[:] = ids
        self.positions[:] = np.arange(start, start + self.tokens)
        shape = self.engine.architecture
        for layer, segment in enumerate(self._segments):
            segment.run()
            if layer < shape.layers:
                key = self._query_key[:, shape.heads :]
                self.keys[layer] = key.transpose(1, 0, 2)
                self.values[layer] = self._value.transpose(1, 0, 2)
                attend(layer, self._query_key[:, : shape.heads], key, self._value, self._attention)


class Head:
    """Buffers and bindings of the language-model head, `rows` tokens at a time."""

    def __init__(self, engine: Engine, rows: int) -> None:
        shape = engine.architecture
        self._residual = np.zeros((rows, shape.hidden), np.float32)
        self._logits = np.zeros((rows, shape.vocab), np.float32)
        self._entropy = np.zeros(rows, np.float32)
        self._confidence = np.zeros(rows, np.float32)
        self._head = _Bound(engine.head, {"residual": self._residual}, {"logits": self._logits})
        self._uncertainty = _Bound(
            engine.uncertainty, {"logits": self._logits}, {"entropy": self._entropy, "confidence": self._confidence}
        )

    def logits(self, residual: np.ndarray) -> np.ndarray:
        """Logits of residual [n <= rows, hidden], float32 [n, vocab]: a view, overwritten by the next call."""
        self._residual[: len(residual)] = residual
        self._head.run()
        return self._logits[: len(residual)]

    def uncertainty(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Entropy (nats) and max probability of the first rows of the last `logits`, float32 [rows] views."""
        self._uncertainty.run()
        return self._entropy[:rows], self._confidence[:rows]


class _Bound:
    """An onnxruntime session bound to arrays by address: it reads and writes their memory directly.

    The binding knows addresses only, so the arrays are kept alive here.
    """

    def __init__(self, named: NamedSession, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
        session = self._session = named.session
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
        self._session.run_with_iobinding(self._binding)


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
