"""KL divergence from the 16-bit model, and what goes with it, of one text through one arm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvq.controller.evaluation.scoring import REFERENCE, Scorer, log_softmax
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
class Divergence:
    """One text through one arm, float32 [tokens] each.

    Attributes:
        kld: KL(exact || arm) in nats at each position.
        same_top1: bool, whether both put the same token first.
        loss: of the text's next token in nats; one shorter.
    """

    kld: np.ndarray
    same_top1: np.ndarray
    loss: np.ndarray


@dataclass
class Outcome(Divergence):
    """One text through one arm of ours; exact is the 16-bit arm.

    Attributes:
        bits: uint8 [tokens, 2], what each token was given.
        used_nbytes, nbytes: of the store that holds the text, without and with the free room of pages.
    """

    bits: np.ndarray
    used_nbytes: int
    nbytes: int


def reference(scorer: Scorer, ids: np.ndarray) -> np.ndarray:
    """Log-probabilities of the 16-bit arm, float32 [tokens, vocab]."""
    return log_probabilities(scorer.score(ids, make_policy(REFERENCE)).logits)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Of logits float32 [tokens, vocab], in their place."""
    for at in range(0, len(logits), ROWS):
        logits[at : at + ROWS] = log_softmax(logits[at : at + ROWS])
    return logits


def diverged(logits: np.ndarray, expected: np.ndarray, ids: np.ndarray) -> Divergence:
    """Divergence of logits from the exact log-probabilities, float32 [tokens, vocab] both, of a text int64 [tokens]."""
    kld, same, loss = np.empty(len(ids), np.float32), np.empty(len(ids), bool), np.empty(len(ids), np.float32)
    following = np.append(ids[1:], 0)
    for at in range(0, len(ids), ROWS):
        part = slice(at, at + ROWS)
        logp, truth = log_softmax(logits[part]), expected[part]
        kld[part] = (np.exp(truth) * (truth - logp)).sum(-1)
        same[part] = logp.argmax(-1) == truth.argmax(-1)
        loss[part] = -logp[np.arange(len(logp)), following[part]]
    return Divergence(kld, same, loss[:-1])


def outcome(
    scorer: Scorer, ids: np.ndarray, expected: np.ndarray, policy: Policy, kv_bits: float | None = None
) -> Outcome:
    """Score a text int64 [tokens] through an arm, against the reference's log-probabilities."""
    scored = scorer.score(ids, policy, kv_bits)
    found = diverged(scored.logits, expected, ids)
    return Outcome(**vars(found), bits=scored.bits, used_nbytes=scored.used_nbytes, nbytes=scored.nbytes)
