"""transformers on torch, with its float32 cache and with its quantized one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from kvq.bench.arm import Arm


class TransformersArm(Arm):
    """LlamaForCausalLM in float32 with the dequantized weights, called directly, not through generate.

    Attention is torch's own (sdpa); the head runs on the last token only.
    """

    runtime = "torch"
    settings = "float32 weights and cache, sdpa attention"
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    distributions: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    exact = True  # it has no quantized activations to begin with
    tolerance: ClassVar[float | None] = 0.01
    grows = True
    weight_bytes_each = 5.0
    value_bytes_each = 12.0  # appending to the cache copies a layer of it, and prefill holds activations

    def load(self) -> None:
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(self.threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.model = LlamaForCausalLM.from_pretrained(self.assets.checkpoint, dtype=torch.float32).eval()

    def open(self) -> None:
        from transformers import DynamicCache

        self.cache: Any = DynamicCache(config=self.model.config)

    def feed(self, ids: np.ndarray) -> None:
        tensor = self.torch.from_numpy(np.ascontiguousarray(ids, np.int64))[None]
        out = self.model(tensor, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self._logits = out.logits[0, -1].numpy()

    def logits(self) -> np.ndarray:
        return self._logits

    def kv_bytes(self) -> int:
        return sum(tensor_bytes(x) for layer in self.cache.layers for x in (layer.keys, layer.values))

    def weight_bytes(self) -> int:
        # The embedding is read as the tied head; its rows for the token are nothing beside it.
        return sum(p.nbytes for p in self.model.parameters())


@dataclass
class TransformersQuantizedArm(TransformersArm):
    """The same with transformers' QuantizedCache: 4 bits, the newest 128 tokens unquantized (its default).

    Its kv bytes are those it stores; each step decodes all of them to float32 besides. The check shows no quantization:
    its prompt and steps fit into one first call and the unquantized newest tokens, except for the prompt, which later
    steps read at 4 bits.
    """

    bits: int

    settings = "float32 weights, QuantizedCache (quanto, {bits} bits, group 64, newest 128 in float32)"
    packages = ("torch", "transformers", "optimum.quanto")
    distributions = ("torch", "transformers", "optimum-quanto")
    tolerance = None

    def open(self) -> None:
        from transformers import QuantizedCache

        self.cache = QuantizedCache("quanto", self.model.config, nbits=self.bits)

    def kv_bytes(self) -> int:
        quantized = [x for layer in self.cache.layers for x in (layer._quantized_keys, layer._quantized_values)]
        return super().kv_bytes() + sum(map(tensor_bytes, quantized))


def tensor_bytes(x: Any) -> int:
    """Bytes of a tensor, or of the tensors a quantized one is made of."""
    inner = [getattr(x, name, None) for name in ("_data", "_scale", "_shift")]
    if inner[0] is None:
        return x.nbytes
    return sum(tensor_bytes(part) for part in inner if part is not None)


ARMS = {"transformers-fp32": TransformersArm(), "transformers-quantized": TransformersQuantizedArm(4)}
