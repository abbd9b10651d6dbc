"""llama.cpp through llama-cpp-python's binding of its C interface."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from kvq.bench.arms.base import Arm, ArmSpec, Setup, package_version
from kvq.bench.shapes import made_folder

# Bytes of a block of 32 cached values.
CACHE_BLOCK_BYTES = {"f16": 64, "q8_0": 34, "q4_0": 18}


class LlamaArm(Arm):
    """`llama_decode` called directly, without the binding's Python layers; flash attention on.

    Weights are Q4_0, which llama.cpp repacks for this machine's instructions when it loads them, and
    Q8_0 for embedding and head, with the bundle's numbers.

    Args:
        cache: type of keys and values: f16, q8_0 or q4_0.
    """

    packages = ("llama_cpp", "gguf", "onnx")
    value_bytes_each = 2.2

    def __init__(self, setup: Setup, cache: str) -> None:
        super().__init__(setup)
        self.cache = cache
        self.folder = setup.assets.folder / "gguf"
        self.context: Any = None

    def prepare(self) -> None:
        from kvq.bench.gguf_file import write_gguf

        if not self.folder.is_dir():
            with made_folder(self.folder) as folder:
                write_gguf(self.setup.assets, folder / "model.gguf")

    def load(self) -> None:
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: C holds a bare pointer
        llama_cpp.llama_log_set(self._silence, None)
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(self.folder / "model.gguf").encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {self.folder / 'model.gguf'}")

    def open(self, capacity: int) -> None:
        api = self.api
        if self.context:
            api.llama_free(self.context)
        parameters = api.llama_context_default_params()
        parameters.n_ctx = capacity
        parameters.n_threads = parameters.n_threads_batch = self.setup.threads
        parameters.type_k = parameters.type_v = getattr(api, f"GGML_TYPE_{self.cache.upper()}")
        parameters.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = api.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context with a {self.cache} cache")
        self.length = 0
        self._token = (api.llama_token * 1)()

    def _decode(self, tokens: Any, count: int) -> None:
        status = self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, count))
        if status:
            raise RuntimeError(f"llama_decode answered {status}")
        self.length += count

    def prefill(self, ids: np.ndarray) -> float:
        api = self.api
        batch = api.llama_n_batch(self.context)
        begun = time.perf_counter()
        for at in range(0, len(ids), batch):
            part = ids[at : at + batch].tolist()
            self._decode((api.llama_token * len(part))(*part), len(part))
        api.llama_synchronize(self.context)
        return time.perf_counter() - begun

    def step(self, token: int) -> float:
        begun = time.perf_counter()
        self._token[0] = token
        self._decode(self._token, 1)
        self._pointer = self.api.llama_get_logits_ith(self.context, -1)  # waits for the computation
        return time.perf_counter() - begun

    def logits(self) -> np.ndarray:
        pointer = self.api.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(pointer, (self.setup.assets.fields["vocab_size"],)).copy()

    def kv_bytes(self) -> int:
        values = self.setup.assets.values_per_token * self.api.llama_n_ctx(self.context)
        return values // 32 * CACHE_BLOCK_BYTES[self.cache]

    def cache_read_bytes(self) -> int:
        return self.setup.assets.values_per_token * self.length // 32 * CACHE_BLOCK_BYTES[self.cache]

    def weight_bytes(self) -> int:
        return int(self.api.llama_model_size(self.model))

    def describe(self) -> dict[str, Any]:
        return {
            "backend": "llama.cpp",
            "versions": package_version("llama-cpp-python"),
            "settings": f"Q4_0 weights, Q8_0 embedding and head, {self.cache} cache, flash attention",
            "system": " ".join(self.api.llama_print_system_info().decode().split()),
        }


ARMS = {f"llama-{cache}": ArmSpec(LlamaArm, {"cache": cache}) for cache in CACHE_BLOCK_BYTES}
