"""``kvq serve``: the OpenAI-compatible HTTP API over one model."""

from __future__ import annotations

from pathlib import Path

import click

from kvq.runtime.cli.run import CACHE, nbytes, options

AT_LEAST_ONE = click.IntRange(1)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-m", "--model", metavar="MODEL", help="Bundle folder or embedded model; the default model if not given.")
@click.option("--name", help="Name of the model in the API; the bundle's if not given.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option("--api-key", envvar="KVQ_API_KEY", metavar="KEY", help="Ask for this key; better set KVQ_API_KEY.")
@click.option("--cors-origin", "cors_origins", multiple=True, metavar="ORIGIN", help="Let its web pages in; repeatable.")
@options(CACHE)
@click.option("--chunk", type=AT_LEAST_ONE, default=128, show_default=True, help="Tokens per prefill step, and between kept lengths.")
@click.option("--kv-memory-total", metavar="SIZE", help="Most bytes of all KV caches together; no limit if not given.")
@click.option("--session-dir", type=click.Path(path_type=Path, file_okay=False, exists=True), metavar="FOLDER",
              help="Where idle sessions are saved; removed at exit.")
@click.option("--session-disk", default="1GB", show_default=True, metavar="SIZE", help="Most bytes of saved sessions.")
@click.option("--concurrency", type=AT_LEAST_ONE, default=8, show_default=True, help="Requests at work at a time.")
@click.option("--queue", type=click.IntRange(0), default=32, show_default=True, help="Requests that may wait; more get 429.")
@click.option("--max-tokens", type=AT_LEAST_ONE, default=1024, show_default=True, help="Most tokens of a response.")
@click.option("--max-prompt-tokens", type=AT_LEAST_ONE, help="Most tokens of a prompt; the model's context if not given.")
@click.option("--max-body", default="4MB", show_default=True, metavar="SIZE", help="Most bytes of a request.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=600.0, show_default=True, help="Seconds a request may take, waiting included.")
@click.option("--threads", type=int, help="CPU threads; all available cores if not given.")
@click.option("-q", "--quiet", is_flag=True, help="No line per request.")
def serve(
    model, name, host, port, api_key, cors_origins, policy, kv_bits, kv_memory, recent, sink, backend, chunk,
    kv_memory_total, session_dir, session_disk, concurrency, queue, max_tokens, max_prompt_tokens, max_body, timeout,
    threads, quiet,
) -> None:  # fmt: skip
    """Serve the OpenAI-compatible HTTP API.

    \b
    Examples:
      kvq serve
      kvq serve -m smollm --kv-bits 3.5 --kv-memory-total 200MB
      KVQ_API_KEY=secret kvq serve --host 0.0.0.0
    """
    if api_key is not None and not (api_key.strip() and api_key.isascii() and api_key.isprintable()):
        raise click.UsageError("the API key must be printable ASCII and not empty; unset KVQ_API_KEY to go without")
    from kvq.runtime.server.app import Limits
    from kvq.runtime.server.protocol import Settings
    from kvq.runtime.server.serve import Options
    from kvq.runtime.server.serve import serve as run

    run(
        Options(
            model=model, threads=threads, host=host, port=port, name=name,
            settings=Settings(policy, kv_bits, None if kv_memory is None else nbytes(kv_memory), recent, sink),
            backend=backend, chunk=chunk,
            kv_memory_total=None if kv_memory_total is None else int(nbytes(kv_memory_total)),
            session_dir=session_dir, session_disk=int(nbytes(session_disk)),
            concurrency=concurrency, queue=queue,
            limits=Limits(
                body=int(nbytes(max_body)), prompt_tokens=max_prompt_tokens, max_tokens=max_tokens, timeout_s=timeout
            ),
            api_key=api_key, cors_origins=cors_origins, access_log=not quiet,
        )
    )  # fmt: skip
