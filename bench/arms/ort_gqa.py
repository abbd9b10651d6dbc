"""onnxruntime's own attention: one graph, GroupQueryAttention, caches written in place."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from kvq.bench.arms.base import Arm, ArmSpec, Setup, package_version
from kvq.bench.shapes import made_folder

CHUNK = 512  # tokens per prefill run


class OrtGqaArm(Arm):
    """One session, every input and output bound once; past and present of a layer are one buffer.

    Session options are onnxruntime's defaults: a pool of the session's own whose threads spin, and no
    other session in the process. Without arena, without memory pattern, with dynamic blocks or
    denormals flushed it measured alike; only where other programs use the cores is a pool that does
    not spin faster.

    Args:
        cache_bits: 32, or 8 or 4 with one constant step per channel.
    """

    packages = ("onnx",)
    exact = True
    value_bytes_each = 4.2

    def __init__(self, setup: Setup, cache_bits: int) -> None:
        super().__init__(setup)
        self.cache_bits = cache_bits
        self.folder = setup.assets.folder / f"onegraph-{cache_bits}{'-exact' if setup.assets.exact else ''}"

    def prepare(self) -> None:
        from kvq.bench.onegraph import OneGraph, cache_scales

        if self.folder.is_dir():
            return
        scales = None if self.cache_bits == 32 else cache_scales(self.setup.assets, self.cache_bits)
        with made_folder(self.folder) as folder:
            OneGraph(self.setup.assets, self.cache_bits, scales).build(folder)

    def load(self) -> None:
        import onnxruntime

        from kvq.runtime.bundle.manifest import MANIFEST, Manifest
        from kvq.runtime.machine.hugepages import new_memory

        bundle = self.setup.assets.bundle
        self.manifest = Manifest.from_json((bundle / MANIFEST).read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.setup.threads
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle))
        graph = (self.folder / f"gqa-{self.cache_bits}.onnx").read_bytes()
        with new_memory():  # as kvq does for its own graphs
            self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def open(self, capacity: int) -> None:
        for name in ("_one", "caches"):  # never two caches at a time
            vars(self).pop(name, None)
        shape = self.manifest.architecture
        kind, width = {
            32: (np.float32, shape.head_dim),
            8: (np.int8, shape.head_dim),
            4: (np.uint8, shape.head_dim // 2),
        }[self.cache_bits]
        self.caches = np.zeros((shape.layers, 2, 1, shape.kv_heads, capacity, width), kind)
        self.length = 0
        self._seqlens, self._total = np.zeros(1, np.int32), np.zeros((), np.int32)
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

    def _run(self, binding: Any, tokens: int) -> None:
        self.length += tokens
        self._seqlens[0] = self.length - 1
        self._total[...] = self.length
        self.session.run_with_iobinding(binding)

    def prefill(self, ids: np.ndarray) -> float:
        begun = time.perf_counter()
        for at in range(0, len(ids), CHUNK):
            chunk = np.ascontiguousarray(ids[None, at : at + CHUNK])
            self._run(self._bind(chunk), chunk.shape[1])
        return time.perf_counter() - begun

    def step(self, token: int) -> float:
        begun = time.perf_counter()
        self._id[0, 0] = token
        self._run(self._one, 1)
        return time.perf_counter() - begun

    def logits(self) -> np.ndarray:
        return self._logits[0, 0]

    def kv_bytes(self) -> int:
        return self.caches.nbytes

    def cache_read_bytes(self) -> int:
        return self.caches.nbytes // self.caches.shape[4] * self.length

    def weight_bytes(self) -> int:
        return self.manifest.decode_weight_nbytes

    def describe(self) -> dict[str, Any]:
        cache = "float32" if self.cache_bits == 32 else f"int{self.cache_bits}, one constant step per channel"
        return {
            "backend": "onnxruntime GroupQueryAttention",
            "versions": package_version("onnxruntime"),
            "settings": f"{cache} cache, shared past and present, bound once, own spinning pool, weights on huge pages,"
            f" chunks of {CHUNK}",
        }


class OrtGqaFloatArm(OrtGqaArm):
    """The float32 cache, which has to agree with kvq's 16-bit one up to its rounding."""

    tolerance = 0.01

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, 32)


ARMS = {
    "ort-gqa-fp32": ArmSpec(OrtGqaFloatArm),
    "ort-gqa-int8": ArmSpec(OrtGqaArm, {"cache_bits": 8}),
    "ort-gqa-int4": ArmSpec(OrtGqaArm, {"cache_bits": 4}),
}
