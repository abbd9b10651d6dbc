"""What a session holds of every token: precision and bytes as stored, and the features of the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvq.runtime.errors import PromptError
from kvq.runtime.kv.store import KVStore
from kvq.runtime.policy.base import FEATURE_NAMES, Policy, TokenFeatures
from kvq.runtime.precision.table import EXACT, Pair
from kvq.runtime.session.statistics import Stats
from kvq.runtime.text.cells import cells

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model
    from kvq.runtime.session.session import Session


class Features(NamedTuple):
    """The four features of arXiv 2604.04722 of one token, see `kvq.runtime.policy.features`."""

    entropy: float  # nats
    rarity: float  # nats
    attention_variance: float
    confidence: float  # probability


@dataclass(frozen=True)
class InspectedToken:
    """One token as the store holds it.

    Attributes:
        position: place in the text, from 0.
        id: token id.
        text: what its cell says, on the cell's first token; empty on the others of a cell.
        cell: index of its cell. Tokens that share a character share a cell.
        bits: bits per value of keys and values as they lie in the store now; (16, 16) in the recent window.
        chosen: bits the token has, or will be quantized to when it leaves the window.
        in_window: it stands in the recent window.
        nbytes: its codes, scales and tag now.
        features: None where they were not asked for.
    """

    position: int
    id: int
    text: str
    cell: int
    bits: Pair
    chosen: Pair
    in_window: bool
    nbytes: int
    features: Features | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the features by name."""
        fields = {name: getattr(self, name) for name in ("position", "id", "text", "cell")}
        fields |= {"key_bits": self.bits.k, "value_bits": self.bits.v}
        fields |= {"chosen_key_bits": self.chosen.k, "chosen_value_bits": self.chosen.v}
        fields |= {"in_window": self.in_window, "nbytes": self.nbytes}
        return fields if self.features is None else fields | self.features._asdict()


@dataclass(frozen=True)
class Total:
    """All tokens of one precision.

    Attributes:
        bits: of keys and values; None for the recent window, which holds 16 bits in a form of its own.
        tokens: stored at it now.
        due: further ones in the window that will be stored at it.
        nbytes: codes, scales and tags of the tokens stored at it now.
        slack_nbytes: free room of its pages, or of the window.
        bits_per_value: 8 * nbytes over the values of these tokens; None without tokens.
    """

    bits: Pair | None
    tokens: int
    due: int
    nbytes: int
    slack_nbytes: int
    bits_per_value: float | None

    @property
    def precision(self) -> str:
        """Its name, as in `Stats.precisions`: "k4v2", or "recent" for the window."""
        return "recent" if self.bits is None else str(self.bits)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        names = ("precision", "tokens", "due", "nbytes", "slack_nbytes", "bits_per_value")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Inspection:
    """A text as a session holds it.

    Attributes:
        model: name of the bundle's folder.
        tokens: one record per cached token, by position.
        totals: by precision, most bits first, the window last. Bytes and slack add up to `stats.kv_nbytes`.
        stats: of the inspected session.
    """

    model: str
    tokens: list[InspectedToken]
    totals: list[Total]
    stats: Stats

    def cells(self) -> list[list[InspectedToken]]:
        """The tokens by cell; the first of each has the cell's text."""
        found: list[list[InspectedToken]] = []
        for token in self.tokens:
            if token.cell == len(found):
                found.append([])
            found[-1].append(token)
        return found

    @property
    def text(self) -> str:
        """All of the text, special tokens included."""
        return "".join(token.text for token in self.tokens)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "model": self.model,
            "text": self.text,
            "tokens": [token.as_dict() for token in self.tokens],
            "totals": [total.as_dict() for total in self.totals],
            "stats": self.stats.as_dict(),
        }


class StoredTokens(NamedTuple):
    """Where every token of a store stands, by position.

    bits: uint8 [tokens, 2], of keys and values as stored now; 16 in the window.
    chosen: uint8 [tokens, 2], what they are once out of the window.
    in_window: bool [tokens].
    nbytes: int64 [tokens], codes, scales and tag.
    """

    bits: np.ndarray
    chosen: np.ndarray
    in_window: np.ndarray
    nbytes: np.ndarray


def stored_tokens(store: KVStore) -> StoredTokens:
    """Read precision and bytes of every token off the store's pages and window."""
    bits, nbytes = np.zeros((store.length, 2), np.uint8), np.zeros(store.length, np.int64)
    for pair, bucket in store.buckets.items():
        for page in bucket.pages:
            at = page.positions[: page.count]
            bits[at], nbytes[at] = pair, bucket.token_bytes
    chosen = bits.copy()
    window = store.window
    start = store.length - window.count
    if window.count:
        bits[start:], nbytes[start:] = EXACT, window.token_bytes
        chosen[start:] = store.due()
    return StoredTokens(bits, chosen, np.arange(store.length) >= start, nbytes)


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
        store = session.store
        same = _Replay(stored_tokens(store).chosen)
        second = session.model.session(
            same, recent=store.window.capacity, sink=store.sink, prefill_chunk=session.prefill_chunk,
            prefill=session.stats().prefill, backend=session.backend.name,
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
    pairs: list[Pair | None] = [*sorted({*store.buckets, *due}, reverse=True), None]
    values = 2 * store.geometry.layers * store.geometry.kv_heads * store.geometry.head_dim
    totals = []
    for bits in pairs:
        row = account.get("recent" if bits is None else str(bits), {"tokens": 0, "nbytes": 0, "slack_nbytes": 0})
        held, used = row["tokens"], row["nbytes"] - row["slack_nbytes"]
        bits_per_value = 8 * used / (values * held) if held else None
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
