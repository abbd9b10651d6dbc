"""Controllers for the benchmark's bundles, whose random weights there is nothing to learn of.

What a controller costs does not depend on its numbers. These are of the real architecture and untrained; the last layer
is scaled so that predicted damages are spread like a trained one's, for a budget to mix several classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import kvq
from kvq.controller.policies import FEATURE_NAMES, TokenFeatures

if TYPE_CHECKING:
    from kvq.controller.training.samples import Samples

TOKENS = 512  # random ones, whose features say what normal is
SPREAD = 1.5  # nats, standard deviation of a class's log damage over tokens
OWN_SHARE = 0.3  # of a class in that: most of it is the token's


def add_controllers(bundle: Path, threads: int | None = None) -> None:
    """Store an `adaptive` and a `paper` controller in a bundle that does not have them.

    Args:
        bundle: folder; replaced atomically.
        threads: of the model that computes the features.
    """
    import torch

    from kvq.controller.training.network import Controller, features_of
    from kvq.controller.training.train import CLASSES, Recipe, store
    from kvq.runtime.bundle.bundle import Bundle

    opened = Bundle(bundle)
    manifest = opened.manifest
    recipes = [Recipe(), Recipe("paper", "paper")]
    entries = [manifest.controllers.get(recipe.objective, {}) for recipe in recipes]
    if all(entry.get("model") == manifest.model_digest for entry in entries):
        return
    samples = _samples(bundle, threads)
    torch.manual_seed(0)
    for recipe in recipes:
        classes = np.array(CLASSES[recipe.objective])
        features = features_of(samples, recipe.feature_set)
        adaptive = recipe.objective == "adaptive"
        hidden = recipe.hidden if adaptive else recipe.paper.hidden
        net = Controller(features.shape[1], hidden, len(classes))
        net.normalise(features)
        x, ids = torch.from_numpy(features), torch.from_numpy(samples.ids)
        with torch.no_grad():
            last = net.last
            last.weight.copy_(last.weight[:1] + OWN_SHARE * last.weight)
            last.weight.mul_(SPREAD / net(x, ids).std(0)[:, None])
            # Damage falls with the square of a step; the outputs of `paper` are no damages but logits.
            middle = np.log(np.exp2(-2.0 * classes).sum(1)) if adaptive else np.zeros(len(classes))
            last.bias.add_(torch.from_numpy(middle.astype(np.float32)) - net(x, ids).mean(0))
        store(opened, samples, recipe, net, [{"valid": 0.0}], 0.0)


def _samples(bundle: Path, threads: int | None) -> Samples:
    """Features of random tokens; no damages, which nothing here looks at."""
    from kvq.controller.training.network import NORM_FLOOR
    from kvq.controller.training.samples import Samples

    model = kvq.load(bundle, threads=threads)
    ids = np.random.default_rng(2).integers(0, model.architecture.vocab, TOKENS)
    session = model.session("fp16", prefill_chunk=TOKENS, prefill="chunked")
    passes: list[TokenFeatures] = []
    session.chooser.observer = passes.append
    session.append(ids)
    (seen,) = passes
    squares = [np.square(seen.get(side)).mean(-1) for side in ("keys", "values")]
    nothing = np.zeros(TOKENS, np.int32)
    return Samples(
        text=nothing,
        ids=ids,
        positions=seen.positions,
        paper=np.stack([seen.get(name) for name in FEATURE_NAMES], axis=1),
        norms=np.concatenate([np.log(side + NORM_FLOOR).reshape(-1, TOKENS).T for side in squares], axis=1),
        residual=seen.get("residual").astype(np.float16),
        signed=np.zeros((1, TOKENS, 0), np.float32),
        read=nothing.astype(bool),
    )
