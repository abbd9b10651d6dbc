"""What transformers computes, for tests that compare with it; without it they are skipped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvq.runtime.bundle.bundle import Bundle
from tests.tools.packages import needs

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM


def reference_model(folder: Path) -> LlamaForCausalLM:
    """transformers' model of a checkpoint folder, float32."""
    torch, transformers = needs("torch"), needs("transformers")
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def effective_model(bundle: Bundle) -> LlamaForCausalLM:
    """transformers' model with the weights that a bundle really has, float32."""
    needs("torch"), needs("transformers")
    from kvq.exporter import reference

    return reference.effective_model(bundle)


def logits_of(model: LlamaForCausalLM, ids: list[int] | np.ndarray) -> torch.Tensor:
    """A model's logits for ids, float32 [tokens, vocab]."""
    torch = needs("torch")
    with torch.inference_mode():
        return model(torch.as_tensor(ids)[None]).logits[0]


def reference_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """transformers' logits for ids, float32 [tokens, vocab]."""
    return logits_of(reference_model(folder), ids)
