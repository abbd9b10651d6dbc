"""What a session holds of every token: precision and bytes as stored, and the features of the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvq.runtime.errors import PromptError
from kvq.runtime.inspect.records import Features, InspectedToken, Inspection, Total
from kvq.runtime.kv.records import stored_tokens
from kvq.runtime.kv.store import KVStore
from kvq.runtime.policy.base import FEATURE_NAMES, Policy, TokenFeatures
from kvq.runtime.precision.table import Pair
from kvq.runtime.text.cells import cells

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model
    from kvq.runtime.session.session import Session


def inspect_text(
    model: Model,
    text: str | Sequence[int],
    policy: str | Policy | None = None,
    *,
    features: bool = True,
    **options: Any,
) -> Inspection:
    """Run a text through a new session and say what it holds of every token.

    Args:
        model: the loaded model.
        text: text, or token ids.
        policy: as in `Model.session`, with its `options`.
        features: compute entropy, rarity, attention variance and confidence too, whether the policy
            looks at them or not; what is stored is the same to the byte.
        **options: further arguments of `Model.session`.

    Raises:
        PromptError: the text is empty, or holds ids outside the vocabulary.
        ContextError: it does not fit into the context.
        PolicyError, BudgetError, BackendError: as `Model.session`.
    """
    session = model.session(policy, **options)
    ids = model.encode(text) if isinstance(text, str) else text
    if not len(ids):
        raise PromptError("the text is empty: give at least one character")
    if features:
        return _inspection(session, _run(session, ids))
    session.append(ids)
    return _inspection(session, None)


def inspect_session(session: Session, *, features: bool = True) -> Inspection:
    """Say what a session holds of every token, one that has been loaded from a file too.

    Features are not kept by sessions. They are computed by running the tokens through a second
    session that stores each at the precision it has in this one, which takes as long as a prefill;
    this session is not changed. Where its prefill is chunked, tokens that were decoded one by one then
    run in chunks and read their neighbours unrounded, so that entropy, attention variance and confidence
    may differ a little from those at decoding.

    Args:
        session: with at least one cached token.
        features: compute the features.

    Raises:
        PromptError: the session is empty.
    """
    if not session.tokens:
        raise PromptError("the session is empty: append a text first")
    found = None
    if features:
        stats, same = session.stats(), _Replay(stored_tokens(session.store).chosen)
        second = session.model.session(
            same, recent=stats.recent, sink=stats.sink, prefill_chunk=session.prefill_chunk, prefill=stats.prefill,
            backend=stats.backend, protect_bits=stats.protect_bits,
        )  # fmt: skip
        found = _run(second, session.tokens)
    return _inspection(session, found)


def _inspection(session: Session, features: list[Features] | None) -> Inspection:
    stored = stored_tokens(session.store)
    pieces = cells(session.model.optional_tokenizer, session.tokens)
    tokens = [
        InspectedToken(
            position=i,
            id=session.tokens[i],
            text=cell.text if i == cell.first else "",
            cell=index,
            bits=Pair(*stored.bits[i].tolist()),
            chosen=Pair(*stored.chosen[i].tolist()),
            in_window=bool(stored.in_window[i]),
            nbytes=int(stored.nbytes[i]),
            features=features[i] if features else None,
        )
        for index, cell in enumerate(pieces)
        for i in range(cell.first, cell.first + cell.length)
    ]
    return Inspection(session.model.path.name, tokens, _totals(session.store, tokens), session.stats())


def _totals(store: KVStore, tokens: list[InspectedToken]) -> list[Total]:
    account = store.account()
    due = Counter(token.chosen for token in tokens if token.in_window)
    pairs: list[Pair | None] = [*sorted({*store.pairs, *due}, reverse=True), None]
    totals = []
    for bits in pairs:
        row = account.get("recent" if bits is None else str(bits), {"tokens": 0, "nbytes": 0, "slack_nbytes": 0})
        held, used = row["tokens"], row["nbytes"] - row["slack_nbytes"]
        values = store.geometry.values * held
        if bits is not None and bits in store.buckets:
            values = store.buckets[bits].values
        bits_per_value = 8 * used / values if values else None
        totals.append(Total(bits, held, due[bits] if bits else 0, used, row["slack_nbytes"], bits_per_value))
    return totals


def _run(session: Session, ids: Sequence[int]) -> list[Features]:
    """Append ids to the empty session and return their features."""
    rows: dict[str, list[np.ndarray]] = {name: [] for name in FEATURE_NAMES}

    def keep(features: TokenFeatures) -> None:
        for name, kept in rows.items():
            kept.append(features.get(name).copy())

    session.chooser.observer = keep
    try:
        session.append(ids)
    finally:
        session.chooser.observer = None
    columns = [np.concatenate(kept).tolist() for kept in rows.values()]
    return [Features(*row) for row in zip(*columns, strict=True)]


class _Replay(Policy):
    """Chooses what another session has stored: uint8 [tokens, 2] by position."""

    name = "replay"

    def __init__(self, bits: np.ndarray) -> None:
        self.bits = bits

    def choose(self, features: TokenFeatures) -> np.ndarray:
        return self.bits[features.positions]
