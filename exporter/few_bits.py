"""What an export finds out about matrices before it quantizes them to few bits, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvq.exporter.checkpoint import Checkpoint
from kvq.exporter.damage import damages, plan_of_bits
from kvq.exporter.draft import Moments, draft_of
from kvq.exporter.graphs.options import GraphOptions
from kvq.exporter.weights.matrices import Knowledge
from kvq.runtime.errors import CalibrationError, CheckpointError

# Weights that make up for their errors unless told otherwise.
COMPENSATED = ("int6", "int5", "int4", "mixed")


@dataclass(frozen=True)
class FewBits:
    """What is asked of an export's weights.

    Attributes:
        asked: a name of `LAYER_BITS` of `kvq.exporter.weights.matrices`, or bits a weight.
        compensate: whether errors are made up for; None: where that is usual.

    Raises:
        CheckpointError: bits that no plan reaches, or no errors to make up for.
    """

    asked: str | float
    compensate: bool | None

    def __post_init__(self) -> None:
        if self.bits is not None and not 4 <= self.bits <= 8:
            raise CheckpointError(f"weights of {self.bits:g} bits are not possible; give a number from 4 to 8")
        if self.compensate and self.asked == "fp32":
            raise CheckpointError("fp32 weights have no errors to make up for; leave compensate out")

    @property
    def weights(self) -> str:
        """The name of these weights."""
        return self.asked if isinstance(self.asked, str) else "mixed"

    @property
    def bits(self) -> float | None:
        """Bits a weight; None where the name says all."""
        return None if isinstance(self.asked, str) else float(self.asked)

    def notes(self, ids: np.ndarray | None) -> list[str]:
        """What a person should know of a model with a calibration text, int64 [tokens], or without.

        Raises:
            CheckpointError: something has to be measured on a text, and there is none.
        """
        if ids is not None:
            return []
        if self.compensate or self.bits is not None:
            raise CheckpointError("errors of weights are measured on a text, and there is no tokenizer; use int8")
        usual = self.compensate is None and self.weights in COMPENSATED
        return ["errors of weights not made up for: there is no tokenizer to read a text with"] if usual else []

    @contextmanager
    def knowledge(
        self,
        checkpoint: Checkpoint,
        options: GraphOptions,
        folder: Path,
        ids: np.ndarray | None,
        progress: Callable[[int, int, str], None],
    ) -> Iterator[Knowledge]:
        """What is to be known; it may be asked as long as the block runs.

        Args:
            checkpoint: the model.
            options: of the bundle.
            folder: of the bundle; a draft is written beside it.
            ids: int64 [tokens] of a calibration text; None where there is none.
            progress: called with what is done, all there is, and what is being done.
        """
        compensates = self.weights in COMPENSATED if self.compensate is None else self.compensate
        if ids is None or not (compensates or self.bits is not None):
            yield Knowledge()
            return
        progress(0, 1, "writing a draft")
        with draft_of(checkpoint, options, folder, ids) as draft:
            known = Knowledge(moments=Moments(draft)) if compensates else Knowledge()
            if self.bits is not None:
                with np.errstate(over="ignore", invalid="ignore"):
                    found = damages(draft, options.block, lambda done, count: progress(done, count, "measuring damage"))
                if not np.isfinite([damage.divergence for damage in found.values()]).all():
                    raise CalibrationError(
                        "predictions are no finite numbers on the text; give a checkpoint of a trained model"
                    )
                known = known._replace(plan=plan_of_bits(found, self.bits))
            yield known
