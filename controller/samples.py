"""Training samples: what is known of a token when it is stored, and draws of the damage of each class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from kvq.controller.damage import WIDTHS, probe
from kvq.controller.features import RarityCounter
from kvq.controller.parallel import ParallelModel
from kvq.runtime.errors import CalibrationError

# Texts of two lengths: a token of a long text is read by more queries.
LENGTHS = (512, 1536)
Progress = Callable[[int, int, str], None]


@dataclass
class Samples:
    """Tokens of calibration texts; arrays over tokens.

    Attributes:
        text: int32, which text a token is of.
        ids, positions: int64.
        paper: float32 [tokens, 4]: entropy, rarity, attention variance, confidence.
        norms: float32 [tokens, 2 * layers * kv_heads], log of the mean square of keys, then of values.
        residual: float16 [tokens, hidden].
        signed: float32 [probes, tokens, 2, widths] of `probe_damage`.
        read: bool, whether the token leaves the window inside its text, so that its damage was seen.
    """

    text: np.ndarray
    ids: np.ndarray
    positions: np.ndarray
    paper: np.ndarray
    norms: np.ndarray
    residual: np.ndarray
    signed: np.ndarray
    read: np.ndarray

    def damage(self, classes: list[tuple[int, int]]) -> np.ndarray:
        """Mean drawn damage in nats of each token at each class, float32 [tokens, classes]."""
        columns = []
        for pair in classes:
            parts = [self.signed[:, :, side, WIDTHS.index(b)] for side, b in enumerate(pair) if b < 16]
            total = np.sum(parts, axis=0) if parts else np.zeros(self.signed.shape[:2], np.float32)
            columns.append(np.square(total).mean(0) / 2)
        return np.stack(columns, 1).astype(np.float32)


def collect(
    model: ParallelModel,
    ids: np.ndarray,
    tokens: int,
    seed: int,
    probes: int = 1,
    progress: Progress | None = None,
) -> Samples:
    """Samples from evenly spread windows of a text.

    Args:
        model: the bundle's weights.
        ids: int64 [text tokens].
        tokens: about how many samples to take.
        seed: of the drawn predictions.
        probes: draws of the damage per token.
        progress: called as work goes on.

    Raises:
        CalibrationError: the text is shorter than one window.
    """
    context = model.model.config.max_position_embeddings
    lengths = [min(n, context) for n in LENGTHS]
    lengths = [n for n in lengths if len(ids) >= 4 * n] or lengths[:1]
    if len(ids) < lengths[0]:
        raise CalibrationError(
            f"the calibration text has {len(ids)} tokens, at least {lengths[0]} are needed; give a longer text"
        )
    plan: list[int] = []
    while sum(plan) < min(tokens, len(ids)):
        # As many tokens of either length.
        plan.append(min(lengths, key=lambda n: sum(p for p in plan if p == n)))
    starts = np.linspace(0, len(ids) - max(plan), len(plan)).astype(int)
    generator = torch.Generator().manual_seed(seed)
    parts: list[Samples] = []
    for number, (start, length) in enumerate(zip(starts.tolist(), plan, strict=True)):
        if progress:
            progress(number, len(plan), "measuring damage")
        parts.append(_window(model, ids[start : start + length], number, generator, probes))
    stacked = {
        name: np.concatenate([getattr(part, name) for part in parts], axis=1 if name == "signed" else 0)
        for name in Samples.__dataclass_fields__
    }
    return Samples(**stacked)


def _window(model: ParallelModel, ids: np.ndarray, number: int, generator: torch.Generator, probes: int) -> Samples:
    batch = torch.from_numpy(ids)[None].to(model.device)
    signed, found = probe(model, batch, generator)
    draws = [signed[0], *(probe(model, batch, generator)[0][0] for _ in range(probes - 1))]
    with torch.inference_mode():
        logp = found.logits[0].log_softmax(-1)
        p = logp.exp()
        entropy, confidence = -(p * logp).sum(-1), p.amax(-1)
        # [layers, kv_heads, tokens, head_dim] -> [tokens, layers * kv_heads]
        norms = [
            x[0].square().mean(-1).clamp_min(1e-12).log().flatten(0, 1).T.cpu() for x in (found.keys, found.values)
        ]
    count = len(ids)
    vocab = model.model.config.vocab_size
    paper = [
        entropy.cpu().numpy(),
        RarityCounter(vocab).rarity(ids),
        found.attention_variance[0].cpu().numpy(),
        confidence.cpu().numpy(),
    ]
    return Samples(
        text=np.full(count, number, np.int32),
        ids=ids,
        positions=np.arange(count),
        paper=np.stack(paper, 1).astype(np.float32),
        norms=torch.cat(norms, 1).float().numpy(),
        residual=found.residual[0].half().cpu().numpy(),
        signed=np.stack(draws),
        read=np.arange(count) < count - model.recent - 1,
    )
