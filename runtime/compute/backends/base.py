"""The interface of an attention backend."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from kvq.runtime.compute.engine import Engine
from kvq.runtime.compute.head import Head
from kvq.runtime.compute.joint import JointPass, SegmentedJointPass
from kvq.runtime.compute.passes import ForwardPass, SegmentedPass
from kvq.runtime.kv.store import KVStore
from kvq.runtime.precision.codecs import NUMPY, CodecSet


class AttentionBackend(ABC):
    """Causal attention of new tokens over the store and over themselves.

    One instance belongs to one session and may keep scratch memory between calls.
    `priority` orders the backends under ``auto``: the highest that is available wins.
    `detail` says more about what runs, for statistics. `codecs` encode for the session's store.
    `rows_alike`: a stepwise pass over many tokens stores to the bit what passes over one each would; where it does not,
    a session gives it one at a time, since a text must not depend on how it is fed.
    """

    name: str
    priority: int
    detail: str = ""
    codecs: CodecSet = NUMPY
    rows_alike: bool = False

    @classmethod
    def unavailable(cls) -> str:
        """Why this backend cannot run here; empty where it can."""
        return ""

    def forward_pass(self, engine: Engine, tokens: int, stepwise: bool = False) -> ForwardPass:
        """Buffers and bindings for passes of that many tokens; here segment by segment around `attend`.

        stepwise: around `attend_stepwise`.
        """
        return SegmentedPass(engine, tokens, self.attend_stepwise if stepwise else self.attend)

    @property
    def joins(self) -> tuple[str, int]:
        """Sessions whose backends say the same can share a pass: name, and which form of it, the library's kernel."""
        return self.name, 0

    def joint_pass(self, engine: Engine) -> JointPass:
        """Passes over the tokens of several sessions, of this one and of others that `joins` says can join."""
        return SegmentedJointPass(engine)

    def head(self, engine: Engine, rows: int) -> Head:
        """Buffers and bindings of the head for that many rows."""
        return Head(engine, rows)

    @abstractmethod
    def attend(
        self,
        query: np.ndarray,
        key: np.ndarray,
        value: np.ndarray,
        store: KVStore,
        layer: int,
        out: np.ndarray,
        row_squares: np.ndarray | None = None,
    ) -> None:
        """Attend from `tokens` new tokens that are not in the store yet.

        New token i sees everything in the store and the new tokens 0..i, those in full
        precision. Scores are scaled by 1 / sqrt(head_dim); heads are grouped: query head h
        reads KV head h // (heads // kv_heads).

        Args:
            query: float32 [tokens, heads, head_dim].
            key, value: float32 [tokens, kv_heads, head_dim].
            store: the tokens before them.
            layer: which layer of the store.
            out: float32 [tokens, heads, head_dim], written.
            row_squares: float32 [tokens, heads], written when given: the sum of squares of
                each attention row (the variance of a row needs no more than that).
        """

    @abstractmethod
    def attend_stepwise(
        self,
        query: np.ndarray,
        key: np.ndarray,
        value: np.ndarray,
        store: KVStore,
        layer: int,
        out: np.ndarray,
        row_squares: np.ndarray | None = None,
    ) -> None:
        """`attend`, but each new token sees what it would see if it came alone.

        Those before it have gone into the recent window then, and pushed older ones out of it, which are read at
        the precision they will be stored at. So there can be at most one more of them than the window is long, and
        the precisions of the tokens in the window are chosen then. Arguments as in `attend`.
        """
