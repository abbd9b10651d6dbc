"""The model's graphs on onnxruntime, with every buffer bound once.

Attention over the KV store is not onnxruntime's. With attention in Python, a forward pass goes
through layers + 1 segments: segment i takes the residual stream and the attention output of
layer i - 1 and yields the residual stream and layer i's queries, keys and values. With native
attention the same segments are one graph, see `kvq.runtime.compute.backends.native_pass`.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime

from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.errors import BundleError
from kvq.runtime.kv.store import KVStore
from kvq.runtime.machine import hugepages
from kvq.runtime.machine.blas import one_thread
from kvq.runtime.machine.threads import configure, session_options

# Rows of logits computed at a time: a long prompt must not materialise [tokens, vocab] floats.
HEAD_ROWS = 32


class NamedSession(NamedTuple):
    """An onnxruntime session and the file its graph came from."""

    name: str
    session: onnxruntime.InferenceSession


class Engine:
    """onnxruntime sessions of one bundle. Stateless and shared: safe to use from many threads.

    The layers are there twice, as segments for attention in Python and as one graph for the native
    operator; each form is loaded when it is first asked for, since it keeps its own packed weights.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self.threads = configure(threads)
        self.architecture = bundle.manifest.architecture
        self._bundle = bundle
        self._lock = threading.Lock()
        self.huge_nbytes = 0  # of the loaded graphs' memory, on huge pages
        hugepages.wanted()  # refuses an unknown setting
        for name in (*bundle.manifest.segments, bundle.manifest.decoder):
            bundle.graph(name)  # refuses a foreign graph now, even one that no backend asks for later
        self.head = self._session(bundle.manifest.head)
        self.uncertainty = self._session(bundle.manifest.uncertainty)
        Head(self, 1)  # the graphs fit the manifest, or this raises BundleError
        self._segments: list[NamedSession] = []
        self._decoder: NamedSession | None = None

    @property
    def segments(self) -> list[NamedSession]:
        """The layers + 1 segments."""
        with self._lock:
            if not self._segments:
                self._segments = [self._session(name) for name in self._bundle.manifest.segments]
            return self._segments

    def decoder(self, library: Path) -> NamedSession:
        """The segments as one graph, whose attention is an operator of the native library."""
        with self._lock:
            if self._decoder is None:
                self._decoder = self._session(self._bundle.manifest.decoder, library)
            return self._decoder

    def _session(self, name: str, library: Path | None = None) -> NamedSession:
        options = session_options()
        # An arena saves a tenth of a step where one graph holds all layers; one per segment would keep every segment's
        # largest buffers, 190 MB on the 135M shape.
        options.enable_cpu_mem_arena = library is not None
        # Graphs are handed over as checked bytes, so the folder of their weights is stated here.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._bundle.path))
        graph = self._bundle.graph(name)
        try:
            if library is not None:
                options.register_custom_ops_library(str(library))
            with hugepages.new_memory() as done:
                session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            self.huge_nbytes += done[0]
            return NamedSession(name, session)
        except Exception as error:  # onnxruntime's errors share no base class
            why = str(error).strip().splitlines()[0]
            raise BundleError(f"{name} cannot be loaded ({why}); export the bundle again") from None


class ForwardPass(ABC):
    """All layers over a fixed number of tokens, with buffers bound once.

    One forward pass serves one thread at a time. A new one binds to the engine's graphs and
    raises BundleError where they do not fit the manifest.

    Attributes:
        tokens: new tokens of a pass.
        keys, values: float32 [layers, kv_heads, tokens, head_dim], those of the new tokens after `forward`.
        residual: float32 [tokens, hidden] after `forward`, what `Head` takes.
    """

    def __init__(self, engine: Engine, tokens: int) -> None:
        shape = engine.architecture
        self.engine = engine
        self.tokens = tokens
        self.ids = np.zeros(tokens, np.int64)
        self.positions = np.zeros(tokens, np.int64)
        self._places = np.arange(tokens)
        self.keys = np.zeros((shape.layers, shape.kv_heads, tokens, shape.head_dim), np.float32)
        self.values = np.zeros((shape.layers, shape.kv_heads, tokens, shape.head_dim), np.float32)
        self.residual = np.zeros((tokens, shape.hidden), np.float32)

    def forward(self, ids: np.ndarray, store: KVStore, row_squares: np.ndarray | None = None) -> None:
        """Run all layers over ids int64 [tokens] that follow on the store; the store is not changed.

        row_squares: float32 [tokens, heads], written when given: sums of squares of the last layer's attention rows.
        """
        self.ids[:] = ids
        self.positions.fill(store.length)
        if self.tokens > 1:
            self.positions += self._places
        self._run(store, row_squares)

    @abstractmethod
    def _run(self, store: KVStore, row_squares: np.ndarray | None) -> None:
        """Run over `ids` at `positions`; fill keys, values and residual."""


# attend(query, key, value, store, layer, out, row_squares), see `AttentionBackend.attend`.
Attend = Callable[[np.ndarray, np.ndarray, np.ndarray, KVStore, int, np.ndarray, np.ndarray | None], None]


class SegmentedPass(ForwardPass):
    """Segment by segment, with attention between them in Python."""

    def __init__(self, engine: Engine, tokens: int, attend: Attend) -> None:
        super().__init__(engine, tokens)
        self._attend = attend
        shape = engine.architecture
        heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self._query_key = np.zeros((tokens, heads + kv_heads, head_dim), np.float32)
        self._value = np.zeros((tokens, kv_heads, head_dim), np.float32)
        self._attention = np.zeros((tokens, heads, head_dim), np.float32)
        cosine, sine = (np.zeros((tokens, head_dim // 2), np.float32) for _ in range(2))
        flat_attention = self._attention.reshape(tokens, -1)
        # The last segment, number `layers`, writes into `residual`.
        residual = [self.residual, np.zeros((tokens, shape.hidden), np.float32)]

        self._segments = []
        for i, session in enumerate(engine.segments):
            inputs: dict[str, np.ndarray] = {"ids": self.ids, "positions": self.positions}
            outputs: dict[str, np.ndarray] = {"residual_out": residual[(shape.layers - i) % 2]}
            if i > 0:
                inputs = {"residual": residual[(shape.layers - i + 1) % 2], "attention": flat_attention}
            if i == 0:
                outputs |= {"cosine": cosine, "sine": sine}
            elif i < shape.layers:
                inputs |= {"cosine": cosine, "sine": sine}
            if i < shape.layers:
                outputs |= {"query_key": self._query_key, "value": self._value}
            self._segments.append(Bound(session, inputs, outputs))

    def _run(self, store: KVStore, row_squares: np.ndarray | None) -> None:
        shape = self.engine.architecture
        query, key = self._query_key[:, : shape.heads], self._query_key[:, shape.heads :]
        # A single token's products are too small for BLAS to start threads.
        with one_thread() if self.tokens > 1 else nullcontext():
            for layer, segment in enumerate(self._segments):
                segment.run()
                if layer < shape.layers:
                    self.keys[layer] = key.transpose(1, 0, 2)
                    self.values[layer] = self._value.transpose(1, 0, 2)
                    squares = row_squares if layer == shape.layers - 1 else None
                    self._attend(query, key, self._value, store, layer, self._attention, squares)


class Head:
    """Buffers and bindings of the language-model head, `rows` tokens at a time."""

    def __init__(self, engine: Engine, rows: int) -> None:
        shape = engine.architecture
        self._residual = np.zeros((rows, shape.hidden), np.float32)
        self._logits = np.zeros((rows, shape.vocab), np.float32)
        self._entropy = np.zeros(rows, np.float32)
        self._confidence = np.zeros(rows, np.float32)
        self._head = Bound(engine.head, {"residual": self._residual}, {"logits": self._logits})
        self._uncertainty = Bound(
            engine.uncertainty, {"logits": self._logits}, {"entropy": self._entropy, "confidence": self._confidence}
        )

    def logits(self, residual: np.ndarray) -> np.ndarray:
        """Logits of residual [n <= rows, hidden], float32 [n, vocab]: a view, overwritten by the next call."""
        self._residual[: len(residual)] = residual
        self._head.run()
        return self._logits[: len(residual)]

    def finite(self, rows: int) -> bool:
        """Whether the first rows of the last `logits` are finite numbers."""
        return bool(np.isfinite(self._logits[:rows]).all())

    def uncertainty(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Entropy (nats) and max probability of the first rows of the last `logits`, float32 [rows] views."""
        self._uncertainty.run()
        return self._entropy[:rows], self._confidence[:rows]


class Bound:
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
