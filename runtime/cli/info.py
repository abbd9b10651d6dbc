"""``kvq info``: what is in a session file or a bundle, without running a model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvq.runtime.cli.options import SETTINGS, Command, option
from kvq.runtime.session.statistics import size

if TYPE_CHECKING:
    from kvq.runtime.bundle.manifest import Architecture

SHOWN = 400  # characters of metadata: a session may hold a whole document


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("path", type=click.Path(path_type=Path))
@option("--json", "as_json", is_flag=True, section="Basics", help="Print one JSON object.")
def info(path, as_json) -> None:
    """Say what is in the session file or bundle folder PATH. Its digests are checked.

    \b
    Examples:
      kvq info story.kvq
      kvq info ./my-bundle --json
    """
    from kvq.runtime.catalog.references import embedded_models

    if str(path) in embedded_models():
        path = embedded_models()[str(path)]
    found, lines = _bundle(path) if path.is_dir() else _session(path)
    if as_json:
        click.echo(json.dumps(found))
    else:  # what comes from a file must not move the cursor of a terminal
        click.echo("\n".join("".join(c if c.isprintable() else "\ufffd" for c in line) for line in lines))


def _session(path: Path) -> tuple[dict[str, Any], list[str]]:
    from kvq.runtime.session.file import check_payload
    from kvq.runtime.session.header import FORMAT_VERSION, open_session_file

    with open_session_file(path) as (file, header):
        check_payload(file, header, path)
    nbytes = path.stat().st_size
    precisions = header.precisions()
    found = {"kind": "session", "path": str(path), "format_version": FORMAT_VERSION, "nbytes": nbytes}
    found |= asdict(header) | {"precisions": precisions}
    held = ", ".join(f"{name} {row['tokens']}" for name, row in precisions.items() if row["tokens"])
    policy = header.policy + ("" if header.policy_options is not None else " (an object: name one when loading)")
    if header.policy_options:
        policy += f" {json.dumps(header.policy_options)}"
    budget = [f"{name} {value:g}" for name, value in asdict(header).items() if name[:3] == "kv_" and value]
    lines = [
        f"session of {header.tokens} tokens, {size(nbytes)}, format version {FORMAT_VERSION}, kvq {header.kvq}",
        f"  model {header.model}, digest {header.model_digest[:16]}; {_shape(header.architecture)}",
        f"  policy {', '.join([policy, *budget])}; recent {header.recent}, sink {header.sink}, at"
        f" {header.protect_bits} bits",
        f"  tokens by precision: {held or 'none'}",
    ]
    if header.metadata:
        metadata = json.dumps(header.metadata)
        cut = f"... ({len(metadata)} characters, all of them with --json)" if len(metadata) > SHOWN else ""
        lines.append(f"  metadata {metadata[:SHOWN]}{cut}")
    return found, lines


def _bundle(path: Path) -> tuple[dict[str, Any], list[str]]:
    from kvq.runtime.bundle.bundle import Bundle
    from kvq.runtime.bundle.manifest import FORMAT_VERSION, TOKENIZER, WEIGHTS

    manifest = Bundle(path).manifest
    nbytes = sum(entry["nbytes"] for entry in manifest.files.values())
    found = {"kind": "bundle", "path": str(path), "format_version": FORMAT_VERSION, "nbytes": nbytes}
    found |= {"model_digest": manifest.model_digest, **asdict(manifest)}
    weights = manifest.weights
    lines = [
        f"bundle of {manifest.name}, {size(nbytes)}, format version {FORMAT_VERSION}",
        f"  digest {manifest.model_digest[:16]}; {_shape(manifest.architecture)}",
        f"  weights {size(manifest.files[WEIGHTS]['nbytes'])}: layers {weights.get('layers')}, embedding and"
        f" head {weights.get('head')}, activations {weights.get('activations')}",
        f"  controllers: {', '.join(manifest.controllers) or 'none'};"
        f" {'with' if TOKENIZER in manifest.files else 'without'} a tokenizer",
    ]
    return found, lines


def _shape(shape: Architecture) -> str:
    return (
        f"{shape.layers} layers, {shape.heads}/{shape.kv_heads} heads of {shape.head_dim}, vocabulary {shape.vocab},"
        f" context {shape.context}"
    )
