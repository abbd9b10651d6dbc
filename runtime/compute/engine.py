"""The model's graphs on onnxruntime, with every buffer bound once.

Attention over the KV store is not onnxruntime's. With attention in Python, a forward pass goes
through layers + 1 segments: segment i takes the residual stream and the attention output of
layer i - 1 and yields the residual stream and layer i's queries, keys and values. With native
attention the same segments are one graph, see `kvq.runtime.compute.backends.native_pass`.
"""

from __future__ import annotations

import threading
from pathlib import Path

import onnxruntime

from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.compute.binding import NamedSession
from kvq.runtime.compute.failures import refusal
from kvq.runtime.compute.products import own_products
from kvq.runtime.machine import hugepages
from kvq.runtime.machine.threads import configure, session_options


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
        # The first graph that is asked for has all of them checked, those too that no backend asks for later.
        self.uncertainty = self._session(bundle.manifest.uncertainty)
        self._segments: list[NamedSession] = []
        self._others: dict[tuple[str, int | None], NamedSession] = {}
        self._alike: dict[tuple[str, int], bool] = {}  # graphs with products of the library: see `OwnProducts`
        self._spared: dict[str, int] = {}  # bytes of weights that these hold less of than the file

    @property
    def segments(self) -> list[NamedSession]:
        """The layers + 1 segments."""
        with self._lock:
            if not self._segments:
                self._segments = [self._session(name) for name in self._bundle.manifest.segments]
            return self._segments

    def decoder(self, library: Path, kernel: int) -> NamedSession:
        """The segments as one graph, whose attention is an operator of the native library, as its products are.

        Args:
            library: its file.
            kernel: index of its instruction set.
        """
        return self._other(self._bundle.manifest.decoder, library, kernel)

    def head(self, library: Path | None = None, kernel: int | None = None) -> NamedSession:
        """The head; its product is the native library's, if one is given."""
        return self._other(self._bundle.manifest.head, library, kernel)

    def rows_alike(self, kernel: int) -> bool:
        """Whether decoder and head give a row the same bits among several as alone, as they are loaded for a kernel."""
        manifest = self._bundle.manifest
        return all(self._alike.get((name, kernel), False) for name in (manifest.decoder, manifest.head))

    @property
    def decode_weight_nbytes(self) -> int:
        """Bytes of weights that a decode step reads, as decoder and head are loaded."""
        return self._bundle.manifest.decode_weight_nbytes - sum(self._spared.values())

    def _other(self, name: str, library: Path | None, kernel: int | None) -> NamedSession:
        with self._lock:
            if (name, kernel) not in self._others:
                self._others[name, kernel] = self._session(name, library, kernel)
            return self._others[name, kernel]

    def _session(self, name: str, library: Path | None = None, kernel: int | None = None) -> NamedSession:
        options = session_options()
        # An arena saves a tenth of a step where one graph holds all layers; one per segment would keep every segment's
        # largest buffers, 190 MB on the 135M shape.
        options.enable_cpu_mem_arena = library is not None
        # Graphs are handed over as checked bytes, so the folder of their weights is stated here.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._bundle.path))
        # What was checked as ONNX is not to be guessed at again.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        graph, kept = self._bundle.graph(name), None
        try:
            if library is not None:
                options.register_custom_ops_library(str(library))
            with hugepages.new_memory() as done:
                if kernel is not None:
                    graph, kept = own_products(graph, self._bundle.path, kernel, self.threads)
                    self._alike[name, kernel] = kept.rows_alike
                    self._spared[name] = kept.spared
                session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            self.huge_nbytes += done[0]
            return NamedSession(name, session, kept)
        except Exception as error:  # onnxruntime's errors share no base class
            raise refusal(error, f"{name} cannot be loaded", "export the bundle again") from None
