"""Scoring texts through the quantized cache as a session decodes them, which a stepwise prefill does faster."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvq.controller.policies import Policy
from kvq.runtime.kv.records import stored_tokens
from kvq.runtime.policy.base import protect_bits_for
from kvq.runtime.policy.budget import Budget
from kvq.runtime.session.model import Model
from kvq.runtime.session.session import Session

REFERENCE = "fp16"  # the arm that all others are held against: exact, in its window too


@dataclass(frozen=True)
class Scored:
    """One text, scored.

    Attributes:
        logits: float32 [tokens, vocab], after each token.
        bits: uint8 [tokens, 2], what each token was given.
        used_nbytes, nbytes: of the store that holds the text, without and with the free room of pages.
    """

    logits: np.ndarray
    bits: np.ndarray
    used_nbytes: int
    nbytes: int


@dataclass(frozen=True)
class Scorer:
    """Scores texts with one model.

    Attributes:
        model: the loaded model.
        recent, sink: newest and first tokens, which are protected.
        protect_bits: 8 or 16, of these, in all arms but the reference; None as `protection` says.
    """

    model: Model
    recent: int = 16
    sink: int = 4
    protect_bits: int | None = None

    def protection(self, policy: Policy, kv_bits: float | None = None) -> int:
        """Bits of the protected tokens in an arm: 16 in the reference, else what was asked for.

        If nothing was, 8 where arms are compared at equal bytes, under a budget or with precisions given token by
        token, and what a session would take elsewhere.
        """
        if policy.name == REFERENCE:
            return 16
        if self.protect_bits is not None:
            return self.protect_bits
        return 8 if policy.classes is None or kv_bits is not None else protect_bits_for(policy)

    def score(self, ids: np.ndarray, policy: Policy, kv_bits: float | None = None) -> Scored:
        """Score a text int64 [tokens].

        Args:
            policy: chooses every token's precision.
            kv_bits: budget of a scored policy, to be kept at the end of the text, however short: arms are compared at
                equal bytes.
        """
        session = self.model.session(
            policy, recent=self.recent, sink=self.sink, prefill="stepwise", kv_bits=kv_bits,
            protect_bits=self.protection(policy, kv_bits),
        )  # fmt: skip
        if kv_bits is not None:
            held, context = session.store, self.model.architecture.context
            session.chooser.budget = Budget(
                session.policy,
                held.geometry,
                context,
                held.recent,
                held.sink,
                kv_bits=kv_bits,
                short_text=0,
                protect_bits=held.protect_bits,
            )
        logits = session.append(ids, all_logits=True)
        store = session.store
        return Scored(logits, stored_tokens(store).chosen, store.used_nbytes, store.nbytes)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32 [rows, vocab]."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def score_answer(session: Session, answer: list[int]) -> tuple[float, bool]:
    """Log-probability in nats of an answer after what a session holds, and whether greedy decoding gives it.

    The session holds all but the last token of the answer afterwards.
    """
    rows = np.asarray(session.last_logits)[None]  # of the last token before the answer
    if len(answer) > 1:
        rows = np.concatenate([rows, session.append(answer[:-1], all_logits=True)])
    logp = log_softmax(rows)
    return float(logp[np.arange(len(answer)), answer].sum()), logp.argmax(1).tolist() == list(answer)
