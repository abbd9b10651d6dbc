"""``kvq show``: all about one model, without loading it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvq.runtime.cli.options import SETTINGS, Command, complete_model, option

if TYPE_CHECKING:
    from kvq.runtime.bundle.manifest import Architecture
    from kvq.runtime.catalog.registry import Entry

# Uniform policies, by bits of keys and values: what a token takes at most, and what choices of a policy lie between.
PAIRS = {"fp16": ("16",), "int8": ("8",), "k8v4": ("8", "4"), "int4": ("4",), "int3": ("3",), "int2": ("2",)}


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("model", shell_complete=complete_model)
@option("--json", "as_json", is_flag=True, section="Basics", help="Print one JSON object.")
def show(model: str, as_json: bool) -> None:
    """Show what MODEL is, anything that -m takes: shape, weights, bytes of cache a token. Digests are checked.

    \b
    Examples:
      kvq show kvq-books
      kvq show smollm2-135m-instruct --json
    """
    from kvq.runtime.catalog.references import find
    from kvq.runtime.catalog.registry import registry

    found = find(model)
    entry = registry().get(found.name) if found.origin == "registry" else None
    if found.path is not None:
        row = {"model": found.name, "from": found.origin, "here": True, **_bundle(found.path, entry)}
        lines = _lines(row)
    elif entry is not None:
        row, lines = _known(entry)
    else:
        raise click.ClickException(f"{found.name} is not here yet; {found.way}")
    if as_json:
        click.echo(json.dumps(row))
    else:  # what comes from a file must not move the cursor of a terminal
        click.echo("\n".join("".join(c if c.isprintable() else "\ufffd" for c in line) for line in lines))


def _bundle(path: Path, entry: Entry | None) -> dict[str, Any]:
    from kvq.runtime.bundle.bundle import Bundle
    from kvq.runtime.bundle.manifest import CHAT_TEMPLATE, KEY_TURNS, TOKENIZER

    manifest = Bundle(path).manifest
    licence = entry.licence if entry else getattr(manifest, "source", {}).get("licence")
    return {
        "path": str(path),
        "name": manifest.name,
        "about": entry.about if entry else None,
        "licence": licence,
        "nbytes": sum(file["nbytes"] for file in manifest.files.values()),
        "digest": manifest.model_digest,
        "architecture": manifest.architecture.fields(),
        "weights": manifest.weights,
        "kv_token_nbytes": kv_token_nbytes(manifest.architecture),
        "turned_keys": KEY_TURNS in manifest.files,
        "tokenizer": TOKENIZER in manifest.files,
        "chat_template": CHAT_TEMPLATE in manifest.files,
        "sampling": manifest.sampling,
        "controllers": sorted(manifest.controllers),
        "files": {name: file["nbytes"] for name, file in manifest.files.items()},
    }


def kv_token_nbytes(shape: Architecture) -> dict[str, int]:
    """Bytes that one stored token takes, by policy."""
    from kvq.runtime.precision.table import named

    geometry = shape.geometry
    return {name: geometry.token_bytes(named(*pair)) for name, pair in PAIRS.items()}


def _lines(row: dict[str, Any]) -> list[str]:
    from kvq.runtime.session.statistics import size

    shape, weights, controllers = row["architecture"], row["weights"], row["controllers"]
    tokens = ", ".join(f"{name} {nbytes:,}" for name, nbytes in row["kv_token_nbytes"].items())
    graphs = sum(name.endswith(".onnx") for name in row["files"])
    lines = [
        f"{row['model']}: {row['about'] or 'a bundle of ' + row['name']}",
        f"  licence      {row['licence'] or 'not stated'}",
        f"  shape        {shape['layers']} layers of {shape['hidden']}, {shape['heads']}/{shape['kv_heads']} heads of"
        f" {shape['head_dim']}, vocabulary {shape['vocab']}, context {shape['context']}",
        f"  weights      layers {weights.get('layers')}, embedding and head {weights.get('head')}, activations"
        f" {weights.get('activations')}",
        *_kept(weights),
        f"  KV cache     bytes a token: {tokens}",
        *([f"{'':15}keys of 2 to 4 bits less a mean that turns with the position"] if row["turned_keys"] else []),
        f"  by layer     {_profiles(shape)}",
        f"  controllers  {', '.join(controllers) or 'none'}",
        f"  chat         {'has a template' if row['chat_template'] else 'no template: a plain transcript'}",
        f"  sampling     {', '.join(f'{name} {x:g}' for name, x in row['sampling'].items()) or 'nothing recommended'}",
        f"  files        {size(row['nbytes'])} in {len(row['files'])} files, {graphs} of them graphs",
        f"  digest       {row['digest']}",
        f"  folder       {row['path']}",
    ]
    return lines


def _kept(weights: dict[str, Any]) -> list[str]:
    """What an export has left of the matrices of its source; bundles of before do not say all of it."""
    counts = (
        (weights.get("exact", 0), "as their source has them"),
        (weights.get("grid", 0), "rotated on the grids of their source"),
    )
    told = [f"{count} {what}" for count, what in counts if count]
    return [f"{'':15}of {weights.get('matrices')} matrices {', '.join(told)}"] if told else []


def _profiles(shape: dict[str, Any]) -> str:
    """Classes that are stored at precisions by layer: bits of keys and of values on average."""
    from kvq.runtime.precision.codecs import CODECS

    means = {}
    for name, by_layer in shape.get("profiles", {}).items():
        means[name] = " + ".join(
            f"{sum(CODECS[p].bits for p in side) / len(side):.1f}" for side in zip(*by_layer, strict=True)
        )
    return ", ".join(f"{name} at {mean} bits" for name, mean in means.items()) or "all layers alike"


def _known(entry: Entry) -> tuple[dict[str, Any], list[str]]:
    """What the registry says of a model that is not here."""
    from kvq.runtime.session.statistics import size

    row = {
        "model": entry.name, "from": "registry", "here": False, "about": entry.about, "licence": entry.licence,
        "download_nbytes": entry.nbytes, "sources": [asdict(source) for source in entry.sources],
    }  # fmt: skip
    sources = ", then ".join(getattr(source, "pip", None) or f"the hub's {source.hub}" for source in entry.sources)  # type: ignore[union-attr]
    lines = [
        f"{entry.name}: {entry.about}",
        f"  licence      {entry.licence}",
        f"  download     {size(entry.nbytes) if entry.nbytes else 'size unknown'}, from {sources}",
        f"  not here yet: kvq pull {entry.name}",
    ]
    return row, lines
