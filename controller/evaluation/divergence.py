"""KL divergence from the 16-bit model, and what goes with it, of one text through one arm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvq.controller.evaluation.scoring import Scorer
from kvq.controller.policies import Policy, TokenFeatures, make_policy

ROWS = 32  # logits turned into probabilities at a time


class Given(Policy):
    """Bits decided beforehand, by position: uint8 [tokens, 2]."""

    name = "given"

    def __init__(self, bits: np.ndarray) -> None:
        self.bits = np.asarray(bits, np.uint8)

    def choose(self, features: TokenFeatures) -> np.ndarray:
        return self.bits[features.positions]


@dataclass
class Outcome:
    """One text through one arm, float32 [tokens] each.

    Attributes:
        kld: KL(16 bits || arm) in nats at each position.
        same_top1: whether both put the same token first.
        loss: of the text's next token in nats; one shorter.
        bits: uint8 [tokens, 2], what each token was given.
        used_nbytes, nbytes: of the store that holds the text, without and with the free room of pages.
    """

    kld: np.ndarray
    same_top1: np.ndarray
    loss: np.ndarray
    bits: np.ndarray
    used_nbytes: int
    nbytes: int


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32 [rows, vocab]."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def reference(scorer: Scorer, ids: np.ndarray) -> np.ndarray:
    """Log-probabilities of the 16-bit arm, float32 [tokens, vocab]."""
    logits = scorer.score(ids, make_policy("fp16")).logits
    for at in range(0, len(ids), ROWS):
        logits[at : at + ROWS] = log_softmax(logits[at : at + ROWS])
    return logits


def outcome(
    scorer: Scorer, ids: np.ndarray, expected: np.ndarray, policy: Policy, kv_bits: float | None = None
) -> Outcome:
    """Score a text int64 [tokens] through an arm, against the reference's log-probabilities."""
    kld, same, loss = np.empty(len(ids), np.float32), np.empty(len(ids), bool), np.empty(len(ids), np.float32)
    scored = scorer.score(ids, policy, kv_bits)
    following = np.append(ids[1:], 0)
    for at in range(0, len(ids), ROWS):
        part = slice(at, at + ROWS)
        logp, truth = log_softmax(scored.logits[part]), expected[part]
        kld[part] = (np.exp(truth) * (truth - logp)).sum(-1)
        same[part] = logp.argmax(-1) == truth.argmax(-1)
        loss[part] = -logp[np.arange(len(logp)), following[part]]
    return Outcome(kld, same, loss[:-1], scored.bits, scored.used_nbytes, scored.nbytes)
