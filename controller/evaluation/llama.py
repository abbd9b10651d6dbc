"""llama.cpp through llama-cpp-python's binding of its C interface: a GGUF file, and contexts with caches of its types.

Imports nothing of the runtime but its errors: whoever measures llama.cpp has nothing else in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kvq.runtime.errors import BackendError, CheckpointError

# Bits per value of its cache types: blocks of 32 codes with a half-precision scale, those of *_1 with a minimum too.
CACHE_BITS = {"f16": 16.0, "q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5}


class LlamaModel:
    """A GGUF file in memory.

    Args:
        file: the path.
        repack: keep weights in this machine's own layouts, which is faster, rounds otherwise, and with AMX crashes on
            some machines.

    Attributes:
        api: the binding, `llama_cpp`.
        model: its pointer to the model.

    Raises:
        CheckpointError: llama.cpp cannot load the file.
    """

    def __init__(self, file: Path, repack: bool = False) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        llama_cpp.llama_backend_init()
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: C holds a bare pointer
        llama_cpp.llama_log_set(self._silence, None)
        parameters = llama_cpp.llama_model_default_params()
        parameters.use_extra_bufts = repack
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
        if not self.model:
            raise CheckpointError(f"llama.cpp cannot load {file}; give a GGUF file that it knows the architecture of")

    @property
    def vocab(self) -> int:
        """Tokens of the vocabulary."""
        return int(self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model)))

    def context(self, kind: str, tokens: int, threads: int) -> Any:
        """A new, empty context with flash attention, which a quantized cache of values needs; to be freed.

        Args:
            kind: type of keys and values, of `CACHE_BITS`.
            tokens: it has room for.
            threads: to compute with.

        Raises:
            BackendError: llama.cpp makes none.
        """
        parameters = self.api.llama_context_default_params()
        parameters.n_ctx = tokens
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = getattr(self.api, f"GGML_TYPE_{kind.upper()}")
        parameters.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        made = self.api.llama_init_from_model(self.model, parameters)
        if not made:
            raise BackendError(f"llama.cpp makes no context with a {kind} cache for this model; leave this type out")
        return made

    def score(self, ids: np.ndarray, kind: str, threads: int) -> np.ndarray:
        """Logits after every token of a text int64 [tokens], float32 [tokens, vocab].

        Tokens are given in batches; llama.cpp stores the keys and values of a batch before it reads them, so that each
        token sees of the others what the cache holds, as in decoding.
        """
        api, context = self.api, self.context(kind, len(ids), threads)
        most = api.llama_n_ubatch(context)
        batch = api.llama_batch_init(most, 0, 1)
        logits = np.empty((len(ids), self.vocab), np.float32)
        try:
            for start in range(0, len(ids), most):
                part = ids[start : start + most].tolist()
                for at, token in enumerate(part):
                    batch.token[at], batch.pos[at], batch.logits[at] = token, start + at, True
                    batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
                batch.n_tokens = len(part)
                if status := api.llama_decode(context, batch):
                    raise BackendError(f"llama.cpp answers {status} to {len(part)} tokens; leave out {kind}")
                pointer = api.llama_get_logits(context)
                logits[start : start + len(part)] = np.ctypeslib.as_array(pointer, (len(part), logits.shape[1]))
        finally:
            api.llama_batch_free(batch)
            api.llama_free(context)
        return logits
