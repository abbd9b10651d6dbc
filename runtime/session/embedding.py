"""A vector of a text: what the last layer leaves behind, averaged over the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvq.runtime.errors import PromptError
from kvq.runtime.policy.base import Policy, TokenFeatures
from kvq.runtime.precision.table import EXACT

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model


class _Summed(Policy):
    """Adds up the residuals that it is shown; everything is cached at 16 bits."""

    name = "summed"
    classes = np.array([EXACT], np.uint8)

    def __init__(self, hidden: int) -> None:
        self.total = np.zeros(hidden)

    def choose(self, features: TokenFeatures) -> np.ndarray:
        self.total += features.get("residual").sum(axis=0, dtype=np.float64)
        return np.repeat(self.classes, len(features.positions), axis=0)


def embed(
    model: Model,
    text: str | Sequence[int],
    progress: Callable[[int, int], None] | None = None,
    backend: str | None = None,
) -> np.ndarray:
    """The mean of the last layer's residual stream over all tokens, scaled to length 1.

    The residual is what the final norm and the head take; the mean over tokens is the usual pooling of decoders that
    were not trained for it (Sentence-BERT, arXiv 1908.10084, section 3). Texts of like words lie near each other, which
    is less than a model trained for retrieval does. The cache has 16 bits.

    Args:
        model: the loaded model.
        text: text, or token ids.
        progress, backend: as in `Session.append` and `Model.session`.

    Returns:
        float32 [hidden], of length 1.

    Raises:
        PromptError, ContextError: it is empty, not of this model's ids, or longer than the context.
    """
    summed = _Summed(model.architecture.hidden)
    session = model.session(summed, recent=0, sink=0, prefill="chunked", backend=backend)
    if not isinstance(text, str | Sequence | np.ndarray):
        raise PromptError(f"give a text or token ids, got {text!r:.60}")
    ids = model.encode(text) if isinstance(text, str) else text
    if not len(ids):
        raise PromptError("the text is empty: give at least one character")
    session.append(ids, progress=progress)
    mean = summed.total / len(ids)
    return (mean / max(float(np.linalg.norm(mean)), 1e-30)).astype(np.float32)
