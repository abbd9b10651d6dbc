"""``kvq serve``: the OpenAI-compatible HTTP API over one model, or several."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from kvq.runtime.cli.options import (
    CACHE,
    DRAFT,
    MODEL,
    SETTINGS,
    SIZE,
    Command,
    Words,
    complete_model,
    option,
    options,
)

AT_LEAST_ONE = click.IntRange(1)
SERVER = [
    option("--host", default="127.0.0.1", show_default=True, section="Server", help="Address to listen on."),
    option("--port", type=click.IntRange(0, 65535), default=8080, metavar="N", show_default=True, section="Server",
           help="0 takes a free one."),
    option("--name", metavar="NAME", section="Server",
           help="Of the model in the API; that of kvq list, or the bundle's, if not given."),
    option("--api-key", metavar="KEY", section="Server", help="Ask for it; better set KVQ_API_KEY."),
    option("--cors-origin", "cors_origins", multiple=True, metavar="URL", section="Server",
           help="Let pages from there in; can be repeated."),
    option("-q", "--quiet", is_flag=True, section="Server", help="No line per request."),
]  # fmt: skip
MODELS = [
    option("-m", "--model", "models", multiple=True, type=Words(), metavar="MODEL", section="Model",
           shell_complete=complete_model,
           help="Name (kvq list), bundle or checkpoint folder, .gguf file or hub id; can be repeated."),
    option("--models-memory", type=SIZE, metavar="SIZE", section="Model",
           help="Most bytes of several models; half of memory if not given."),
]  # fmt: skip
SESSIONS = [
    option("--kv-memory-total", type=SIZE, metavar="SIZE", section="Sessions",
           help="Most bytes of all caches; a quarter of memory if not given."),
    option("--session-dir", type=click.Path(path_type=Path, file_okay=False, exists=True), metavar="DIR",
           section="Sessions", help="Where idle ones are saved until the end."),
    option("--session-disk", type=SIZE, default="1GB", metavar="SIZE", show_default=True, section="Sessions",
           help="Most bytes saved there."),
    option("--session-shared", is_flag=True, section="Sessions",
           help="Keep sessions in DIR for other servers with the same one, after the end too."),
    option("--chunk", type=AT_LEAST_ONE, default=128, metavar="N", show_default=True, section="Sessions",
           help="Tokens per prefill step; what can be repeated is reused at multiples."),
]  # fmt: skip
LIMITS = [
    option("--concurrency", type=AT_LEAST_ONE, default=8, metavar="N", show_default=True, section="Limits",
           help="Requests at work."),
    option("--queue", type=click.IntRange(0), default=32, metavar="N", show_default=True, section="Limits",
           help="Requests that wait; more get 429."),
    option("--max-tokens", type=AT_LEAST_ONE, default=1024, metavar="N", show_default=True, section="Limits",
           help="Of a response."),
    option("--context-shift", is_flag=True, section="Limits",
           help="Go on where the context is full: the oldest part goes. Else a request's own context_shift says so."),
    option("--max-prompt-tokens", type=AT_LEAST_ONE, metavar="N", section="Limits",
           help="The model's context if not given."),
    option("--max-body", type=SIZE, default="4MB", metavar="SIZE", show_default=True, section="Limits",
           help="Of a request."),
    option("--timeout", type=click.FloatRange(0, min_open=True), default=600.0, metavar="S", show_default=True,
           section="Limits", help="Seconds for a request, waiting included."),
]  # fmt: skip


@click.command(cls=Command, context_settings=SETTINGS)
@options(SERVER)
@options([*MODELS, *MODEL[1:]])
@options(CACHE)
@options([DRAFT])
@options(SESSIONS)
@options(LIMITS)
def serve(
    models, models_memory, name, host, port, api_key, cors_origins, policy, kv_bits, kv_memory, recent, sink,
    protect_bits, prefill, backend, draft, chunk, kv_memory_total, session_dir, session_disk, session_shared,
    concurrency, queue, max_tokens, context_shift, max_prompt_tokens, max_body, timeout, threads, quiet,
) -> None:  # fmt: skip
    """Serve the OpenAI-compatible HTTP API.

    \b
    Examples:
      kvq serve
      kvq serve -m smollm --kv-bits 3.5 --kv-memory-total 200MB
      kvq serve -m kvq-books -m smollm
      KVQ_API_KEY=secret kvq serve --host 0.0.0.0
    """
    if api_key is not None and not (api_key.strip() and api_key.isascii() and api_key.isprintable()):
        raise click.UsageError("the API key must be printable ASCII and not empty; unset KVQ_API_KEY to go without")
    if session_shared and session_dir is None:
        raise click.UsageError("--session-shared needs the folder that the servers share: give --session-dir DIR")
    from kvq.runtime.server.models import Options
    from kvq.runtime.server.preparing import Limits
    from kvq.runtime.server.protocol import Settings
    from kvq.runtime.server.serve import serve as run

    ended = run(
        Options(
            model=models[0] if models else None, others=models[1:],
            models_memory=None if models_memory is None else int(models_memory),
            threads=threads, host=host, port=port, name=name,
            settings=Settings(policy, kv_bits, kv_memory, recent, sink, prefill, protect_bits),
            backend=backend, chunk=chunk,
            kv_memory_total=None if kv_memory_total is None else int(kv_memory_total),
            session_dir=session_dir, session_disk=int(session_disk), session_shared=session_shared,
            concurrency=concurrency, queue=queue,
            limits=Limits(
                body=int(max_body), prompt_tokens=max_prompt_tokens, max_tokens=max_tokens, timeout_s=timeout,
                draft=draft, context_shift=context_shift,
            ),
            api_key=api_key, cors_origins=cors_origins, access_log=not quiet,
        )
    )  # fmt: skip
    if not ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # as at the end of any other command, but without taking down what still loads
