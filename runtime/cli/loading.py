"""The model of a command."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model


def load_model(model: str | None, threads: int | None, quiet: bool | None = None) -> Model:
    """The model that -m names, else the default; what takes time is told on stderr, and,
    unless --quiet, what its sessions want known.

    With `quiet`, nothing is said of how to get a model; None is as the command's --quiet or --json says.
    """
    import kvq  # onnxruntime and the rest load only now: --help stays quick
    from kvq.runtime.errors import one_line

    if quiet is None:
        context = click.get_current_context(silent=True)
        quiet = context is not None and bool(context.params.get("quiet") or context.params.get("as_json"))
    if model is None and quiet:
        from kvq.runtime.catalog.references import default_model

        model, _ = default_model()
    loaded = kvq.load(model, threads=threads, notice=lambda text: click.echo(f"kvq: {one_line(text)}", err=True))
    context = click.get_current_context(silent=True)
    if context is not None and context.params.get("quiet"):
        loaded.notice = None
    return loaded


def node_loader(model: str | None, threads: int | None) -> Callable[[], Model]:
    """What loads the model that -m names, else the default of this machine, on another one."""
    import kvq

    if model is None:
        from kvq.runtime.catalog.references import default_model

        model, _ = default_model()
    from kvq.runtime.catalog.hub import offline_wanted

    if os.path.exists(model):
        model = os.path.abspath(model)  # a process of a cluster has a folder of its own
    return partial(kvq.load, model, threads=threads, offline=offline_wanted() or None)
