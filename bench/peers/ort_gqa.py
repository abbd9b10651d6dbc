"""onnxruntime's own attention: one graph, GroupQueryAttention, caches written in place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvq.bench.arm import Arm

CHUNK = 512  # tokens per prefill run
SHARED = f"cache, shared past and present, bound once, own spinning pool, weights on huge pages, chunks of {CHUNK}"
CACHES: dict[int, tuple[Any, int]] = {32: (np.float32, 1), 8: (np.int8, 1), 4: (np.uint8, 2)}  # values per element


@dataclass
class OrtGqaArm(Arm):
    """One session, every input and output bound once; past and present of a layer are one buffer.

    Session options are onnxruntime's defaults: a pool of the session's own whose threads spin, and no other session in
    the process. Without arena, without memory pattern, with dynamic blocks or denormals flushed it measured alike; only
    where other programs use the cores is a pool that does not spin faster.

    Attributes:
        cache_bits: 32, or 8 or 4 with one constant step per channel.
    """

    cache_bits: int

    runtime = "onnxruntime GroupQueryAttention"
    settings = "int{cache_bits}, one constant step per channel " + SHARED
    files = "onegraph-{cache_bits}"
    packages = ("onnx",)
    distributions = ("onnxruntime",)
    exact = True
    value_bytes_each = 4.2

    def make(self, folder: Path) -> None:
        from kvq.bench.onegraph import OneGraph, cache_scales

        scales = None if self.cache_bits == 32 else cache_scales(self.assets, self.cache_bits)
        OneGraph(self.assets, self.cache_bits, scales).build(folder)

    def load(self) -> None:
        import onnxruntime

        from kvq.runtime.machine.hugepages import new_memory

        bundle = str(self.assets.bundle)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", bundle)
        graph = (self.folder / f"gqa-{self.cache_bits}.onnx").read_bytes()
        with new_memory():  # as kvq does for its own graphs
            self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def open(self) -> None:
        for name in ("_one", "caches"):  # never two caches at a time
            vars(self).pop(name, None)
        shape = self.assets.manifest.architecture
        kind, values = CACHES[self.cache_bits]
        self.caches = np.zeros((shape.layers, 2, 1, shape.kv_heads, self.capacity, shape.head_dim // values), kind)
        self._seqlens, self._total = np.zeros((1, 1), np.int32), np.zeros(1, np.int32)
        self._logits = np.zeros((1, 1, shape.vocab), np.float32)
        self._id = np.zeros((1, 1), np.int64)
        self._one = self._bind(self._id)

    def _bind(self, ids: np.ndarray) -> Any:
        """A binding for runs over ids int64 [1, tokens]; the arrays must outlive it."""
        binding = self.session.io_binding()

        def bind(way: Any, name: str, array: np.ndarray) -> None:
            way(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

        for name, array in (("ids", ids), ("seqlens_k", self._seqlens), ("total", self._total)):
            bind(binding.bind_input, name, array)
        bind(binding.bind_output, "logits", self._logits)
        for layer, pair in enumerate(self.caches):
            for x, cache in zip("kv", pair, strict=True):
                bind(binding.bind_input, f"past_{x}_{layer}", cache)
                bind(binding.bind_output, f"present_{x}_{layer}", cache)
        return binding

    def _run(self, binding: Any, end: int) -> None:
        """Tokens up to position `end`."""
        self._seqlens[:], self._total[:] = end - 1, end
        self.session.run_with_iobinding(binding)

    def feed(self, ids: np.ndarray) -> None:
        for at in range(0, len(ids), CHUNK):
            chunk = np.ascontiguousarray(ids[None, at : at + CHUNK])
            self._run(self._bind(chunk), self.length + at + chunk.shape[1])

    def step(self, token: int) -> None:
        self._id[0, 0] = token
        self._run(self._one, self.length + 1)

    def logits(self) -> np.ndarray:
        return self._logits[0, 0]

    def kv_bytes(self) -> int:
        return self.caches.nbytes


class OrtGqaFloatArm(OrtGqaArm):
    """The float32 cache, which has to agree with kvq's 16-bit one up to its rounding."""

    settings = "float32 " + SHARED
    tolerance = 0.01


ARMS = {"ort-gqa-fp32": OrtGqaFloatArm(32), "ort-gqa-int8": OrtGqaArm(8), "ort-gqa-int4": OrtGqaArm(4)}
