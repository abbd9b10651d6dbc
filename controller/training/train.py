"""Train a bundle's controllers: samples, fit, export into the bundle.

Two objectives:

* `adaptive`: the network predicts the damage of every class. Drawn damages d are noisy samples
  (chi-square) of the expected damage m, so the loss is the gamma quasi-likelihood log m + d / m,
  whose minimum is the conditional mean. The runtime then minimises damage + mu * bytes: with
  damages in nats this is the optimal use of bytes as far as single-token damages add up.
* `paper`: the objective of arXiv 2604.04722, L = a L_ce + b L_lat + g L_qual over 2, 4, 8 and 16
  bits, with what the paper does not disclose chosen here (`PaperSettings`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvq.controller.training.damage import CLASSES as MEASURED
from kvq.controller.training.members import Earlier, earlier
from kvq.controller.training.network import Controller, features_of, inputs_of, write_onnx
from kvq.controller.training.parallel import ParallelModel
from kvq.controller.training.samples import Asking, Progress, Samples, collect
from kvq.exporter.folder import replaced_folder, write_text
from kvq.runtime.bundle.bundle import Bundle, digest
from kvq.runtime.bundle.manifest import MANIFEST
from kvq.runtime.errors import CalibrationError
from kvq.runtime.policy.base import curve_of
from kvq.runtime.precision.table import EXACT, named
from kvq.runtime.session.wording import template_of, tokenizer_of

# loss(outputs [rows, classes], which rows int64 [rows])
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

CLASSES = {
    "adaptive": [*MEASURED, EXACT],
    "paper": [*(named(name) for name in ("2", "4", "8")), EXACT],
}


@dataclass(frozen=True)
class PaperSettings:
    """What the paper leaves open; chosen here.

    Attributes:
        ce, latency, quality: weights a, b, g of the three terms.
        label_bits: the label of a token is argmin_k damage_k + price * bytes_k, at the price where
            labels take this many bits a value on average. Costs c_k are bytes relative to 16 bits.
        hidden: width of both layers.
    """

    ce: float = 1.0
    latency: float = 0.1
    quality: float = 0.1
    label_bits: float = 4.27
    hidden: int = 128


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run.

    Attributes:
        feature_set: "paper" or "extended".
        objective: "adaptive" or "paper".
        tokens: samples taken from the calibration text, about.
        probes: damage draws a token.
        asked: share of the texts that end in questions about what they say, see `kvq.controller.training.asked`.
        default_bits: bits a value that `adaptive` spends on a stored token when no budget is given.
        hidden: width of both hidden layers.
        table: learned numbers per token id beside the extended features; 0 has none. On a real model they gain
            nothing, and are most of a controller's bytes.
        epochs, patience: most passes over the samples; stop after so many without a better validation loss.
        batch, rate, decay: tokens a step, AdamW's learning rate and weight decay.
        dropout: share of the inputs and hidden units of `adaptive` that a training step leaves out.
        seed: of everything drawn.
        add: keep the network that the bundle has: the controller becomes the mean of it and the new one. Those of other
            tokens err by something else, so give another text or seed.
    """

    feature_set: str = "extended"
    objective: str = "adaptive"
    tokens: int = 200_000
    probes: int = 1
    asked: float = 0.5
    default_bits: float = 3.27
    hidden: int = 64
    table: int = 0
    epochs: int = 6
    patience: int = 2
    batch: int = 1024
    rate: float = 2e-3
    decay: float = 1e-4
    dropout: float = 0.2
    seed: int = 0
    add: bool = False
    paper: PaperSettings = PaperSettings()


@dataclass
class Report:
    """What a training run did: settings, losses by epoch, what the controller spends."""

    recipe: dict[str, Any]
    samples: int
    seconds: float
    curve: list[dict[str, float]]
    shares: list[float]


def train_controllers(
    bundle: Path,
    text: str,
    recipes: list[Recipe],
    device: str | None = None,
    progress: Progress | None = None,
) -> list[Report]:
    """Train and store controllers, named after their objective, in a bundle.

    Args:
        bundle: folder; replaced atomically.
        text: calibration text, UTF-8; a few megabytes are good.
        recipes: one per controller; `tokens`, `probes`, `asked` and `seed` of the first decide the samples.
        device: of torch; None takes a GPU if there is one.
        progress: called as work goes on.

    Raises:
        BundleError: unreadable.
        CalibrationError: the text is too short, the bundle has no tokenizer to read it with, or no controller that a
            recipe can be added to.
        ChatTemplateError: its chat template fails at the conversations about the text.
    """
    opened = Bundle(bundle)
    tokenizer = tokenizer_of(opened)
    if tokenizer is None:
        raise CalibrationError(f"{bundle} has no tokenizer to read the calibration text with; export one with it")
    first, asking = recipes[0], None
    if first.asked:  # without questions no chat template is looked at
        asking = Asking(first.asked, partial(template_of(opened, tokenizer).encode, add_generation_prompt=False))
    before = [
        earlier(opened, recipe.objective, recipe.feature_set, CLASSES[recipe.objective]) if recipe.add else None
        for recipe in recipes
    ]
    model = ParallelModel.load(opened, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    begun = time.perf_counter()
    samples = collect(
        model,
        lambda part: tokenizer.encode(part).ids,
        text,
        first.tokens,
        first.seed,
        first.probes,
        progress,
        asking,
    )
    collected = time.perf_counter() - begun
    trained = []
    for recipe, one in zip(recipes, before, strict=True):
        begun = time.perf_counter()
        net, curve = fit(samples, recipe, opened.manifest.architecture.vocab, progress)
        trained.append((recipe, net, curve, collected + time.perf_counter() - begun, one))
    return [store(opened, samples, *parts) for parts in trained]


def fit(
    samples: Samples, recipe: Recipe, vocab: int, progress: Progress | None = None
) -> tuple[Controller, list[dict[str, float]]]:
    """Train one network: that of the best epoch, and losses by epoch."""
    torch.manual_seed(recipe.seed)
    paper = recipe.objective == "paper"
    classes = CLASSES[recipe.objective]
    features = features_of(samples, recipe.feature_set)
    damage = samples.damage(classes)
    hidden = recipe.paper.hidden if paper else recipe.hidden
    table = (vocab, recipe.table) if recipe.table and recipe.feature_set != "paper" else None
    net = Controller(features.shape[1], hidden, len(classes), table, 0.0 if paper else recipe.dropout)
    train, valid = _split(samples, recipe.seed)
    net.normalise(features[train])
    loss_of = _paper_loss(damage, train, recipe) if paper else _damage_loss(net, damage, train)
    x, ids = torch.from_numpy(features), torch.from_numpy(samples.ids)
    rows, held_out = torch.from_numpy(train), torch.from_numpy(valid)
    optimizer = torch.optim.AdamW(net.parameters(), recipe.rate, weight_decay=recipe.decay)
    steps = recipe.epochs * max(1, len(rows) // recipe.batch)
    step, best, curve = 0, (np.inf, net.state_dict()), []
    for epoch in range(recipe.epochs):
        order = rows[torch.randperm(len(rows))]
        total, batches = 0.0, order.split(recipe.batch)
        net.train()
        for part in batches:
            # A few steps of warm-up, then a straight line down to 2 %.
            share = min(1.0, (step + 1) / 50) * max(0.02, 1 - step / steps)
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * share
            loss = loss_of(net(x[part], ids[part]), part)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            total += float(loss.detach())
            step += 1
        net.eval()
        with torch.inference_mode():
            validation = float(loss_of(net(x[held_out], ids[held_out]), held_out))
        curve.append({"epoch": epoch + 1, "train": total / len(batches), "valid": validation})
        if progress:
            progress(epoch + 1, recipe.epochs, f"training {recipe.objective}")
        if validation < best[0]:
            best = (validation, {k: v.clone() for k, v in net.state_dict().items()})
        elif epoch + 1 - int(np.argmin([row["valid"] for row in curve])) > recipe.patience:
            break
    net.load_state_dict(best[1])
    return net, curve


def outputs_of(net: Controller, samples: Samples, feature_set: str) -> np.ndarray:
    """What a network gives for all samples, float32 [tokens, classes]."""
    x, ids = torch.from_numpy(features_of(samples, feature_set)), torch.from_numpy(samples.ids)
    with torch.inference_mode():
        return torch.cat([net(a, b) for a, b in zip(x.split(8192), ids.split(8192), strict=True)]).numpy()


def _split(samples: Samples, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and to validate on, 80 to 20 by text: neighbours share features and must not be torn apart."""
    texts = np.random.default_rng(seed).permutation(int(samples.text.max()) + 1)
    held_out = texts[: max(1, round(0.2 * len(texts)))]
    valid = np.isin(samples.text, held_out)
    if valid.all():
        raise CalibrationError("the calibration text gives a single window; give a longer text")
    return np.flatnonzero(~valid & samples.read), np.flatnonzero(valid & samples.read)


def _damage_loss(net: Controller, damage: np.ndarray, train: np.ndarray) -> Loss:
    """Gamma quasi-likelihood of drawn damages; outputs are logarithms of the mean."""
    drawn = torch.from_numpy(damage + 1e-9)
    with torch.no_grad():
        net.last.weight.mul_(0.1)
        net.last.bias.copy_(drawn[train].mean(0).log())

    def loss(output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return (output + drawn[rows] * torch.exp(-output)).mean()

    return loss


def _paper_loss(damage: np.ndarray, train: np.ndarray, recipe: Recipe) -> Loss:
    """a L_ce + b L_lat + g L_qual with labels, costs and qualities from measured damage."""
    settings = recipe.paper
    bits = np.array([2.27, 4.27, 8.27, 16.02])  # per value, with scales and tags; the ratios are what counts
    low, high = 1e-12, 1e3
    for _ in range(80):
        price = (low * high) ** 0.5
        labels = (damage + price * bits).argmin(1)
        low, high = (price, high) if bits[labels[train]].mean() > settings.label_bits else (low, price)
    target = torch.from_numpy(labels)
    cost = torch.from_numpy((bits / bits[-1]).astype(np.float32))
    mean = damage[train].mean(0)
    quality = torch.from_numpy((1 - mean / mean.max()).astype(np.float32))

    def loss(output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        p = output.softmax(1)
        entropy = torch.nn.functional.cross_entropy(output, target[rows])
        latency, missing = (p @ cost).mean(), (1 - p @ quality).mean()
        return settings.ce * entropy + settings.latency * latency + settings.quality * missing

    return loss


def store(
    bundle: Bundle,
    samples: Samples,
    recipe: Recipe,
    net: Controller,
    curve: list[dict[str, float]],
    seconds: float,
    before: Earlier | None = None,
) -> Report:
    """Put a trained controller into its bundle, which is replaced as a whole: a reader sees the old or the new one.

    With one of before it becomes the mean of that one's members and the new one.
    """
    manifest = Bundle(bundle.path).manifest  # another controller may have been stored meanwhile
    shape = manifest.architecture
    classes = CLASSES[recipe.objective]
    geometry = shape.geometry
    made = Earlier(net, 1, len(samples.ids)) if before is None else before.with_another(net, len(samples.ids))
    output = outputs_of(made.net, samples, recipe.feature_set)
    nbytes = np.array([geometry.token_bytes(pair) for pair in classes])
    prices, scores = None, output - output.max(1, keepdims=True)
    if recipe.objective == "adaptive":
        scores = -np.exp(output.astype(np.float64))
        means, mu = curve_of(scores, nbytes)
        values = 2 * shape.layers * shape.kv_heads * shape.head_dim
        prices = np.interp(recipe.default_bits * values / 8, means, mu) * nbytes
        scores = scores - prices
    means, mu = curve_of(scores, nbytes)
    chosen = np.bincount(scores.argmax(1), minlength=len(classes)) / len(scores)
    name = "controller" if recipe.objective == "adaptive" else f"controller-{recipe.objective}"
    report = Report(asdict(recipe), len(samples.ids), round(seconds, 1), curve, [round(float(c), 4) for c in chosen])
    with replaced_folder(bundle.path, True) as folder:
        for file in manifest.files:
            shutil.copy2(bundle.path / file, folder / file)
        written = write_onnx(made.net, recipe.feature_set, shape, prices, folder, name)
        entry = {
            "file": written,
            "set": recipe.feature_set,
            "inputs": list(inputs_of(recipe.feature_set, made.net)),
            "objective": recipe.objective,
            "classes": [list(pair) for pair in classes],
            "bytes": nbytes.tolist(),
            "curve": {"bytes": means.tolist(), "mu": mu.tolist()},
            "model": manifest.model_digest,
            "samples": made.samples,
            "members": made.members,
            "valid_loss": min(row["valid"] for row in curve),
        }
        files = {
            **manifest.files,
            written: {"nbytes": (folder / written).stat().st_size, "sha256": digest(folder / written)},
        }
        controllers = {**manifest.controllers, recipe.objective: entry}
        write_text(folder, MANIFEST, replace(manifest, files=files, controllers=controllers).to_json())
    return report
