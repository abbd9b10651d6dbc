"""Policies learned for one model: the controllers a bundle carries, run by onnxruntime."""

from __future__ import annotations

import shlex
from functools import partial

import numpy as np
import onnxruntime

from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.compute.failures import refusal
from kvq.runtime.errors import NonFiniteError, PolicyError
from kvq.runtime.machine.threads import session_options
from kvq.runtime.policy.base import FEATURE_NAMES, ScoredPolicy, TokenFeatures
from kvq.runtime.precision.codecs import CODECS

INPUTS = TokenFeatures._fields
# Tokens are scored in multiples of this, rows of zeros among them if need be: onnxruntime's products of one row sum in
# another order than those of many, and scores must not depend on how many tokens are asked about at once.
ROWS = 16


class LearnedPolicy(ScoredPolicy):
    """A controller of the bundle: the class of the highest score, shifted by a budget if there is one.

    Args:
        name: of the controller in the bundle: "adaptive" or "paper".
        bundle: the model's.

    Raises:
        PolicyError: the bundle has no such controller, or one of another model or feature set.
    """

    def __init__(self, name: str, bundle: Bundle) -> None:
        self.name = name
        manifest = bundle.manifest
        remedy = f"train one with kvq train-controller {shlex.quote(str(bundle.path))} --text FILE"
        if name not in manifest.controllers:
            raise PolicyError(f"the bundle {bundle.path.name} has no {name!r} controller; {remedy}")
        entry = manifest.controllers[name]
        try:
            if entry["model"] != manifest.model_digest:
                raise PolicyError(f"controller {name!r} was trained for another model than this bundle; {remedy}")
            self.classes = np.asarray(entry["classes"], np.uint8)
            self._curve = tuple(np.asarray(entry["curve"][part], float) for part in ("bytes", "mu"))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise PolicyError(f"controller {name!r} is damaged in the manifest ({error!r:.60}); {remedy}") from None
        pairs = self.classes.ndim == 2 and self.classes.shape[1] == 2 and np.isin(self.classes, list(CODECS)).all()
        pairs = pairs and len(np.unique(self.classes, axis=0)) == len(self.classes)
        bytes_, mu = self._curve
        curve = bytes_.ndim == 1 and bytes_.shape == mu.shape and len(mu) and np.isfinite([bytes_, mu]).all()
        if not pairs or not curve or (np.diff(bytes_) <= 0).any():
            raise PolicyError(f"controller {name!r} is damaged in the manifest; {remedy}")
        graph, options = bundle.controller_graph(entry["file"], len(self.classes)), session_options()
        options.add_session_config_entry("session.load_model_format", "ONNX")
        try:
            self._session = onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no base class
            raise refusal(error, f"controller {name!r} cannot be loaded", remedy, PolicyError) from None
        self._inputs = [value.name for value in self._session.get_inputs()]
        outputs = [(value.name, value.shape[1:]) for value in self._session.get_outputs()]
        if not set(self._inputs) <= set(INPUTS) or outputs != [("scores", [len(self.classes)])]:
            raise PolicyError(
                f"controller {name!r} is of a feature set this kvq does not know: {self._inputs}; {remedy}"
            )
        self.needs = frozenset(self._inputs) & frozenset(FEATURE_NAMES)
        self.reads = frozenset(self._inputs)
        shape = manifest.architecture
        self._check(np.zeros(1, np.int64), shape.hidden, (shape.layers, shape.kv_heads, 1, shape.head_dim))

    def _check(self, one: np.ndarray, hidden: int, kv: tuple[int, ...]) -> None:
        """Run it once on zeros: a graph of other sizes is refused here rather than in the middle of a text."""
        scalar = np.zeros(1, np.float32)
        zeros = TokenFeatures(
            one, scalar, scalar, scalar, scalar, one, np.zeros((1, hidden), np.float32), *np.zeros((2, *kv), np.float32)
        )
        self.score(zeros)

    def score(self, features: TokenFeatures) -> np.ndarray:
        inputs = {name: features.get(name) for name in self._inputs}
        tokens = len(features.positions)
        if missing := -tokens % ROWS:
            inputs = {name: _padded(array, missing) for name, array in inputs.items()}
        remedy = "train one with kvq train-controller"
        try:
            scores = self._session.run(None, inputs)[0][:tokens]
        except Exception as error:  # onnxruntime's errors share no base class
            raise refusal(error, f"controller {self.name!r} does not fit this model", remedy, PolicyError) from None
        if np.isnan(scores).any():
            known = all(np.isfinite(array).all() for array in inputs.values())
            kind = PolicyError if known else NonFiniteError  # whose fault it is: its own, or the model's
            raise kind(f"controller {self.name!r} gives scores that are no numbers; {remedy}")
        return scores

    def curve(self, nbytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._curve[0], self._curve[1]


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    """A feature, [tokens, ...] or [layers, kv_heads, tokens, head_dim], with so many zeros behind the last token."""
    widths = [(0, 0)] * array.ndim
    widths[2 if array.ndim == 4 else 0] = (0, rows)
    return np.pad(array, widths)


POLICIES = {name: partial(LearnedPolicy, name) for name in ("adaptive", "paper")}
