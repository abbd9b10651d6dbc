"""Training samples: what is known of a token when it is stored, and draws of the damage of each class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvq.controller.training.asked import Encode as Conversation
from kvq.controller.training.asked import asked
from kvq.controller.training.damage import CLASSES, probe
from kvq.controller.training.parallel import ParallelModel
from kvq.controller.training.texts import Encode, count_tokens, windows
from kvq.runtime.errors import CalibrationError
from kvq.runtime.policy.features import RarityCounter
from kvq.runtime.precision.table import EXACT, Pair

# Texts of two lengths: a token of a long text is read by more queries.
LENGTHS = (512, 1536)
# First tokens of a text that a session protects by default.
SINK = 4
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
        signed: float32 [probes, tokens, len(CLASSES)] of `probe_damage`.
        read: bool, whether the token leaves the window inside its text, so that its damage was seen, and is none of
            the first, which are never stored at few bits: attention sinks are outliers in every respect.
    """

    text: np.ndarray
    ids: np.ndarray
    positions: np.ndarray
    paper: np.ndarray
    norms: np.ndarray
    residual: np.ndarray
    signed: np.ndarray
    read: np.ndarray

    def damage(self, classes: Sequence[tuple[int, int]]) -> np.ndarray:
        """Mean drawn damage in nats of each token at each class, by ids, float32 [tokens, classes].

        Raises:
            ValueError: a class was not measured.
        """
        drawn = {pair: np.square(self.signed[:, :, i]).mean(0) / 2 for i, pair in enumerate(CLASSES)}
        drawn[EXACT] = np.zeros(self.signed.shape[1], np.float32)
        if unknown := [pair for pair in classes if pair not in drawn]:
            raise ValueError(f"classes whose damage was not measured: {unknown}")
        return np.stack([drawn[Pair(*pair)] for pair in classes], 1).astype(np.float32)


@dataclass(frozen=True)
class Asking:
    """How many of the windows end in questions, see `kvq.controller.training.asked`.

    Attributes:
        share: of the windows, from 0 to 1.
        encode: a conversation -> token ids.
    """

    share: float
    encode: Conversation


def collect(
    model: ParallelModel,
    encode: Encode,
    text: str,
    tokens: int,
    seed: int,
    probes: int = 1,
    progress: Progress | None = None,
    asking: Asking | None = None,
) -> Samples:
    """Samples from evenly spread windows of a text.

    Args:
        model: the bundle's weights.
        encode: text -> token ids.
        text: the calibration text.
        tokens: about how many samples to take.
        seed: of the drawn predictions.
        probes: draws of the damage per token.
        progress: called as work goes on.
        asking: None: every window is a piece of the text and nothing else.

    Raises:
        CalibrationError: the text is shorter than one window, or gives fewer than two.
    """
    context = model.shape.context
    lengths = sorted({min(n, context) for n in LENGTHS})
    available = count_tokens(encode, text)
    lengths = [n for n in lengths if available >= 4 * n] or lengths[:1]
    if available < lengths[0]:
        raise CalibrationError(
            f"the calibration text has {available} tokens, at least {lengths[0]} are needed; give a longer text"
        )
    if lengths[0] <= model.recent + 1:
        raise CalibrationError(
            f"the model's context of {context} tokens is no longer than the recent window of {model.recent}:"
            " no token is ever stored at few bits, and there is nothing to train"
        )
    plan: list[int] = []
    while sum(plan) < min(tokens, available) or len(plan) < 2:
        # As many tokens of either length.
        plan.append(min(lengths, key=lambda n: sum(p for p in plan if p == n)))
    generator = torch.Generator().manual_seed(seed)
    parts: list[Samples] = []
    found = windows(encode, text, plan, "the calibration text")
    if asking:
        found = _with_questions(found, text, asking, seed)
    for number, ids in enumerate(found):
        if progress:
            progress(number, len(plan), "measuring damage")
        parts.append(_window(model, ids, number, generator, probes))
    stacked = {
        name: np.concatenate([getattr(part, name) for part in parts], axis=1 if name == "signed" else 0)
        for name in Samples.__dataclass_fields__
    }
    return Samples(**stacked)


def _with_questions(found: list[np.ndarray], text: str, asking: Asking, seed: int) -> list[np.ndarray]:
    """The windows, a share of them replaced by others of at most their length that are asked about."""
    rng = np.random.default_rng([seed, len(found)])
    chosen = rng.permutation(len(found))[: round(asking.share * len(found))]
    for number in sorted(chosen.tolist()):
        window = asked(text, len(found[number]), asking.encode, rng)
        if window is not None:
            found[number] = window
    return found


def _window(model: ParallelModel, ids: np.ndarray, number: int, generator: torch.Generator, probes: int) -> Samples:
    batch = torch.from_numpy(ids)[None].to(model.device)
    signed, found = probe(model, batch, generator, draws=probes)
    with torch.inference_mode():
        logp = found.logits[0].log_softmax(-1)
        p = logp.exp()
        entropy, confidence = -(p * logp).sum(-1), p.amax(-1)
        # [layers, kv_heads, tokens, head_dim] -> [tokens, layers * kv_heads]
        norms = [
            x[0].square().mean(-1).clamp_min(1e-12).log().flatten(0, 1).T.cpu() for x in (found.keys, found.values)
        ]
    count = len(ids)
    vocab = model.shape.vocab
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
        signed=signed[:, 0],
        read=(np.arange(count) >= SINK) & (np.arange(count) < count - model.recent - 1),
    )
