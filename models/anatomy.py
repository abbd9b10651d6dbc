"""What a model's keys, values and attention look like: is its cache like a real LLM's?

    python -m kvq.models.anatomy CHECKPOINT valid.txt.xz

Printed by layer: outlier channels and kurtosis of keys and values before and after the
rotation that kvq applies, the share of key energy in the head's mean, the attention that goes
to the first token (the sink), and the entropy of attention rows.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from kvq.exporter.checkpoint import load_checkpoint
from kvq.exporter.rotation import head_rotation
from kvq.models.corpus import documents


def outlier(x: np.ndarray) -> float:
    """Largest channel's RMS over the median channel's, of x float32 [tokens, head_dim]; 1 is even."""
    rms = np.sqrt(np.square(x).mean(axis=0))
    return float(rms.max() / np.median(rms))


def kurtosis(x: np.ndarray) -> float:
    """Kurtosis of the values of a token's vector, mean over tokens; 3 is Gaussian."""
    centred = x - x.mean(axis=1, keepdims=True)
    return float((np.mean(centred**4, axis=1) / np.mean(centred**2, axis=1) ** 2).mean())


def describe(keys: np.ndarray, values: np.ndarray, attention: np.ndarray, rotation: np.ndarray) -> dict:
    """Statistics of one layer.

    Args:
        keys, values: float32 [kv_heads, tokens, head_dim], keys after the rotary embedding.
        attention: float32 [heads, tokens, tokens].
        rotation: float32 [head_dim, head_dim].
    """

    def mean(f, x: np.ndarray) -> float:
        return round(float(np.mean([f(head) for head in x])), 2)

    centre = keys.mean(axis=1, keepdims=True)
    late = attention[:, attention.shape[1] // 4 :]  # rows with enough tokens to choose from
    rows = np.where(late > 0, late, 1.0)
    return {
        "key_outlier": mean(outlier, keys),
        "key_outlier_rotated": mean(outlier, keys @ rotation.T),
        "key_kurtosis": mean(kurtosis, keys),
        "key_kurtosis_rotated": mean(kurtosis, (keys - centre) @ rotation.T),
        "key_energy_in_mean": round(float(np.square(centre).mean() / np.square(keys).mean()), 2),
        "value_outlier": mean(outlier, values),
        "value_outlier_rotated": mean(outlier, values @ rotation.T),
        "value_kurtosis": mean(kurtosis, values),
        "value_kurtosis_rotated": mean(kurtosis, values @ rotation.T),
        "sink_share": round(float(late[:, :, 0].mean()), 3),
        "attention_entropy_nats": round(float(-(late * np.log(rows)).sum(axis=-1).mean()), 2),
    }


@click.command()
@click.argument("checkpoint")
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--tokens", default=1024, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(checkpoint, text, tokens, as_json) -> None:
    """Print statistics of CHECKPOINT's cache and attention on the first tokens of TEXT."""
    loaded = load_checkpoint(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    rotation = head_rotation(loaded.architecture.head_dim)[1]
    ids = Tokenizer.from_str(loaded.tokenizer_json()).encode("\n\n".join(documents(text))).ids[:tokens]
    model.set_attn_implementation("eager")  # the other kernels do not return attention rows
    with torch.inference_mode():
        out = model(torch.tensor([ids]), use_cache=True, output_attentions=True)
    rows = [
        describe(layer.keys[0].numpy(), layer.values[0].numpy(), attention[0].float().numpy(), rotation)
        for layer, attention in zip(out.past_key_values.layers, out.attentions, strict=True)
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    click.echo("| | " + " | ".join(f"layer {i}" for i in range(len(rows))) + " |")
    click.echo("|---" * (len(rows) + 1) + "|")
    for key in rows[0]:
        click.echo(f"| {key.replace('_', ' ')} | " + " | ".join(str(row[key]) for row in rows) + " |")


if __name__ == "__main__":
    main()
