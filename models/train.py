"""Train a small model of the SmolLM architecture from a text corpus: one command, resumable.

corpus -> tokenizer -> packed ids -> training -> Hugging Face folder (safetensors) -> bundle::

    python -m kvq.models.train corpus.txt.xz out/ --valid valid.txt.xz

Runs on CPU or one CUDA GPU with the same command and is deterministic for a seed on one
device: the batch of a step depends on (seed, step) alone, so a resumed run sees the same data.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import time
from pathlib import Path

import click
import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from kvq.exporter.export import export
from kvq.exporter.weights.matrices import LAYER_BITS
from kvq.models.corpus import documents, pack, train_tokenizer
from kvq.models.family import SHAPES, config
from kvq.runtime.files import atomic_file, write_atomically


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the result; written to recipe.json beside the weights."""

    shape: str = "kvq-books"
    steps: int = 2600
    tokens_per_step: int = 8192
    # (fraction of the steps done, sequence length): short sequences first because attention
    # costs grow with length and local statistics are learned first; full context at the end.
    lengths: tuple[tuple[float, int], ...] = ((0.0, 512), (0.5, 1024), (0.9, 2048))
    learning_rate: float = 2e-3
    final_learning_rate: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta2: float = 0.95
    clip_norm: float = 1.0
    checkpoint_steps: int = 200  # between checkpoints and validations
    seed: int = 0

    def length(self, step: int) -> int:
        """Sequence length, in tokens, of a step."""
        return [n for start, n in self.lengths if step >= start * self.steps][-1]

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then cosine to the final rate."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        span = self.learning_rate - self.final_learning_rate
        return self.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))


def batch(ids: np.ndarray, recipe: Recipe, step: int, device: str) -> torch.Tensor:
    """Windows of one step, int64 [tokens_per_step / length, length + 1], from (seed, step) alone."""
    length = recipe.length(step)
    starts = np.random.default_rng((recipe.seed, step)).integers(
        0, len(ids) - length - 1, recipe.tokens_per_step // length
    )
    windows = np.stack([ids[s : s + length + 1] for s in starts]).astype(np.int64)
    return torch.from_numpy(windows).to(device)


def _halves_are_fast(device: str) -> bool:
    """Whether matrix products in bfloat16 are: on x86 without AVX-512 they are emulated, many times slower."""
    if device != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return True
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def make_loss(model: LlamaForCausalLM, device: str):
    """Mean next-token cross-entropy in nats over windows; matrix products in bfloat16 where that is faster."""
    halves = _halves_are_fast(device)

    def loss(windows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=halves):
            logits = model(windows[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    return loss


def validate(loss, ids: np.ndarray, length: int, device: str, windows: int = 64) -> float:
    """Mean loss in nats a token over evenly spaced windows of the validation ids."""
    starts = np.linspace(0, len(ids) - length - 1, windows).astype(int)
    with torch.no_grad():
        parts = [
            loss(torch.from_numpy(np.stack([ids[s : s + length + 1] for s in part]).astype(np.int64)).to(device))
            for part in np.split(starts, windows // 8)
        ]
    return float(sum(parts) / len(parts))


def prepare(corpus: Path, valid: Path | None, out: Path, vocab_size: int) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
    """Tokenizer and packed ids (uint16 [tokens]) of both texts, made once and reused."""
    tokenizer_file = out / "tokenizer.json"
    if not tokenizer_file.exists():
        click.echo("training the tokenizer", err=True)
        # Every fourth document: merges are stable long before that much text.
        train_tokenizer((d for i, d in enumerate(documents(corpus)) if i % 4 == 0), vocab_size).save(
            str(tokenizer_file)
        )
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    packed = []
    for name, text in (("train", corpus), ("valid", valid)):
        file = out / f"{name}.ids"
        if text is not None and not file.exists():
            click.echo(f"packing {text.name}: {pack(documents(text), tokenizer, file)} tokens", err=True)
        packed.append(np.memmap(file, np.uint16, "r") if file.exists() else np.zeros(0, np.uint16))
    return tokenizer, packed[0], packed[1]


def optimizer_for(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only (norm gains and the embedding are left alone)."""
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    free = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, recipe.beta2))


def train(model, recipe: Recipe, ids: np.ndarray, valid: np.ndarray, out: Path, device: str, compiled: bool) -> None:
    """Run or resume the recipe; checkpoint.pt and curve.jsonl in `out` are the state of the run."""
    optimizer = optimizer_for(model, recipe)
    checkpoint, curve = out / "checkpoint.pt", out / "curve.jsonl"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        click.echo(f"resuming at step {first}", err=True)
    loss_of = make_loss(model, device)
    step_loss = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    started, tokens = time.perf_counter(), 0
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        loss = step_loss(batch(ids, recipe, step, device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += recipe.tokens_per_step
        done = step + 1
        if done % 20 == 0 or done == recipe.steps:
            speed = tokens / (time.perf_counter() - started)
            line = {"step": done, "loss": round(loss.item(), 4), "tokens_per_s": round(speed)}
            if len(valid) and (done % recipe.checkpoint_steps == 0 or done == recipe.steps):
                line["valid_loss"] = round(validate(loss_of, valid, 1024, device), 4)
            click.echo(json.dumps(line), err=True)
            with open(curve, "a") as file:
                file.write(json.dumps(line) + "\n")
        if done % recipe.checkpoint_steps == 0 or done == recipe.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            with atomic_file(checkpoint) as file:
                torch.save(state, file)


def plot_curve(curve: Path, image: Path) -> None:
    """Training and validation loss against steps, as PNG (needs matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in curve.read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([r["step"] for r in lines], [r["loss"] for r in lines], color="0.7", label="training, one step")
    checked = [r for r in lines if "valid_loss" in r]
    axes.plot([r["step"] for r in checked], [r["valid_loss"] for r in checked], "k.-", label="validation")
    axes.set(xlabel="step", ylabel="nats a token")
    axes.legend()
    figure.tight_layout()
    figure.savefig(image, dpi=120)


@click.command()
@click.argument("corpus", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--valid", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="held-out text")
@click.option("--shape", type=click.Choice(list(SHAPES)), metavar="NAME", default=Recipe.shape, show_default=True,
              help=", ".join(SHAPES))  # fmt: skip
@click.option("--steps", default=Recipe.steps, show_default=True)
@click.option("--seed", default=Recipe.seed, show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--weights", type=click.Choice(list(LAYER_BITS)), default="int8", show_default=True, help="of the bundle")
@click.option("--compile/--no-compile", "compiled", default=True, help="torch.compile (needs a C++ compiler)")
def main(corpus, out, valid, shape, steps, seed, device, weights, compiled) -> None:
    """Train SHAPE on CORPUS into OUT; run it again to resume.

    OUT gets the tokenizer, the packed ids, checkpoint.pt, curve.jsonl and curve.png, the finished
    checkpoint in the folder SHAPE (half precision) and a bundle in the folder bundle.
    """
    recipe = Recipe(shape=shape, steps=steps, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    fields = config(shape)
    tokenizer, ids, valid_ids = prepare(corpus, valid, out, fields["vocab_size"])
    model = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation="sdpa")).to(device)
    write_atomically(out / "recipe.json", json.dumps(dataclasses.asdict(recipe), indent=2) + "\n")
    train(model, recipe, ids, valid_ids, out, device, compiled)
    plot_curve(out / "curve.jsonl", out / "curve.png")
    checkpoint = out / shape
    model.to("cpu", torch.float16).save_pretrained(checkpoint)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    exported = export(str(checkpoint), out / "bundle", weights=weights, activations="int16-head", overwrite=True)
    click.echo("\n".join(exported.lines()))


if __name__ == "__main__":
    main()
