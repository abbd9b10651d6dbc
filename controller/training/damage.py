"""What storing a token at few bits costs: damage measured in nats of later predictions.

The damage of token t at a class is the KL divergence, summed over all later positions, between
the model with its exact cache and the model in which token t alone is stored at that class.

* `exact_damage` runs the model once per token and class.
* `probe_damage` needs one backward pass for all tokens and classes. The KL is quadratic near zero:
  KL = 1/2 sum_i |F_i^(1/2) J_i d|^2 for an error d = stored - exact of the token's keys and values,
  with J_i the Jacobian of the logits of position i and F_i their Fisher matrix. Draw y_i from the
  model's own predictions and let g be the gradient of sum_i log p_i(y_i) with respect to what is
  read of the token: then E[(g . d)^2] = 2 KL. One draw is a noisy, unbiased sample of it (a
  chi-square with one degree of freedom), which is all that training on many tokens needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from kvq.controller.training.parallel import ParallelModel, Pass
from kvq.runtime.precision.table import EXACT, named

# What controllers choose from; 16 bits, which they may choose too, are taken to do no damage: 1e-8 nats on the embedded
# model.
CLASSES = tuple(named(*pair) for pair in ("2", "32", "3", "4", "8"))
Progress = Callable[[int, int, str], None]


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || logits) in nats, float32 [...], of log-probabilities and logits [..., vocab]."""
    other = logits.log_softmax(-1)
    return (reference.exp() * (reference - other)).sum(-1)


def probe_damage(
    model: ParallelModel, ids: Tensor, generator: torch.Generator, classes: Sequence[tuple[int, int]] = CLASSES
) -> np.ndarray:
    """Signed samples g . d, float32 [batch, tokens, len(classes)]. See `probe`."""
    return probe(model, ids, generator, classes)[0][0]


def probe(
    model: ParallelModel,
    ids: Tensor,
    generator: torch.Generator,
    classes: Sequence[tuple[int, int]] = CLASSES,
    draws: int = 1,
) -> tuple[np.ndarray, Pass]:
    """Signed samples of every token's damage, and the pass through the exact cache they come from.

    A class has the sample s: what its keys and its values do, in each layer at the precisions that the bundle has for
    it there. s^2 / 2 is one draw of its damage in nats.

    Args:
        model: the weights.
        ids: int64 [batch, tokens].
        generator: of the drawn predictions.
        classes: precisions of a token, by id.
        draws: samples of each token; each costs a backward pass, the forward pass is shared.

    Returns:
        g . d, float32 [draws, batch, tokens, len(classes)]; and the pass, detached.
    """
    stored = [model.shape.geometry.by_layer(pair) for pair in classes]
    leaves: list[Tensor] = []  # of layer 0's keys, its values, layer 1's keys, ...
    errors: list[dict[int, Tensor]] = []  # of each precision that some class has there

    def read(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        leaf = [torch.zeros_like(x, requires_grad=True) for x in (keys, values)]
        leaves.extend(leaf)
        for side, x in enumerate((keys.detach(), values.detach())):
            wanted = {by_layer[layer][side] for by_layer in stored} - {EXACT.k}
            errors.append({id_: model.stored(layer, side, x, id_) - x for id_ in sorted(wanted)})
        return keys + leaf[0], values + leaf[1]

    found = model.run(ids, read)
    logits = found.logits.log_softmax(-1).flatten(0, 1)
    # By the distribution function: multinomial would take a random number for each entry of the vocabulary.
    below = logits.detach().exp().cumsum(-1)
    places = torch.rand((len(below), draws), generator=generator).to(below.device) * below[:, -1:]
    drawn = torch.searchsorted(below, places).clamp_max(below.shape[1] - 1)
    result = ids.new_zeros((draws, *ids.shape, len(classes)), dtype=torch.float32)
    for draw in range(draws):
        total = logits.gather(1, drawn[:, draw, None]).sum()
        gradients = torch.autograd.grad(total, leaves, retain_graph=draw + 1 < draws)
        for i, (gradient, error) in enumerate(zip(gradients, errors, strict=True)):
            layer, side = divmod(i, 2)
            done = {id_: (gradient * d).sum((1, 3)) for id_, d in error.items()}
            for c, by_layer in enumerate(stored):
                if (id_ := by_layer[layer][side]) in done:
                    result[draw, :, :, c] += done[id_]
    return result.cpu().numpy(), Pass(*(x.detach() for x in found))


def exact_damage(
    model: ParallelModel,
    ids: Tensor,
    tokens: np.ndarray,
    classes: Sequence[tuple[int, int]],
    batch: int = 8,
    progress: Progress | None = None,
) -> np.ndarray:
    """Damage in nats of storing single tokens at each class, float64 [len(tokens), len(classes)].

    Args:
        model: the weights.
        ids: int64 [text tokens], one text.
        tokens: int [n], which tokens to damage, one at a time.
        classes: precisions of each, by id.
        batch: cases run at a time.
        progress: called as work goes on.
    """
    jobs = [(i, c) for i in range(len(tokens)) for c in range(len(classes))]
    result = np.zeros((len(tokens), len(classes)))
    with torch.inference_mode():
        reference = model.run(ids[None], lambda layer, keys, values: (keys, values)).logits.log_softmax(-1)
        for start in range(0, len(jobs), batch):
            part = jobs[start : start + batch]
            places = torch.tensor([int(tokens[i]) for i, _ in part])
            pairs = [classes[c] for _, c in part]
            first = int(places.min()) + model.recent + 1  # before it nothing has changed
            if first >= len(ids):
                continue

            def read(
                layer: int,
                keys: Tensor,
                values: Tensor,
                places: Tensor = places,
                pairs: Sequence[tuple[int, int]] = pairs,
            ) -> tuple[Tensor, Tensor]:
                seen = (keys.clone(), values.clone())
                for row, (place, pair) in enumerate(zip(places.tolist(), pairs, strict=True)):
                    of_layer = model.shape.geometry.by_layer(pair)[layer]
                    for side, (x, precision) in enumerate(zip(seen, of_layer, strict=True)):
                        if precision != EXACT.k:
                            own = slice(place, place + 1)
                            x[row, :, own] = model.stored(layer, side, x[row, :, own], precision, place)
                return seen

            logits = model.run(ids.expand(len(part), -1), read).logits
            damage = divergence(reference[:, first:], logits[:, first:]).double().sum(1)
            for (i, c), value in zip(part, damage.tolist(), strict=True):
                result[i, c] = value
            if progress:
                progress(min(start + batch, len(jobs)), len(jobs), "exact damage")
    return result
