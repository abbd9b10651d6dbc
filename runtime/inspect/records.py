"""What an inspection says: of every token, of every precision, of the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from kvq.runtime.precision.table import Pair
from kvq.runtime.session.statistics import Stats


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
        fields |= dict(zip(("key_bits", "value_bits"), self.bits.bits, strict=True))
        fields |= dict(zip(("chosen_key_bits", "chosen_value_bits"), self.chosen.bits, strict=True))
        fields |= {"in_window": self.in_window, "nbytes": self.nbytes}
        return fields if self.features is None else fields | self.features._asdict()


@dataclass(frozen=True)
class Total:
    """All tokens of one precision.

    Attributes:
        bits: of keys and values; None for the recent window, which holds `protect_bits` in a form of its own.
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
