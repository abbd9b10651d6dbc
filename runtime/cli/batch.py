"""``kvq batch``: a file of requests to a file of responses, several at a time, without a server."""

from __future__ import annotations

import io
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import click

from kvq.runtime.cli.loading import load_model, node_loader
from kvq.runtime.cli.options import CACHE, DRAFT, MODEL, OUTPUT, SETTINGS, Command, option, options
from kvq.runtime.cli.progress import Bar
from kvq.runtime.errors import one_line


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("source", metavar="IN", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("target", metavar="OUT", **OUTPUT)
@option("--name", metavar="NAME", section="Basics", help="Of the model in requests; the bundle's if not given.")
@option("--max-tokens", type=click.IntRange(1), default=1024, metavar="N", show_default=True, section="Basics",
        help="Of a response.")  # fmt: skip
@option("--parallel", type=click.IntRange(1), metavar="N", section="Basics",
        help="Requests at work at a time, in shared passes: 8 if not given, or 1 where answers would then be rounded "
        "otherwise.")  # fmt: skip
@option("--ray", metavar="ADDRESS", section="Basics",
        help="Share them out over the nodes of this Ray cluster; auto is the one this machine is in.")  # fmt: skip
@option("-q", "--quiet", is_flag=True, section="Basics", help="No progress, no last line.")
@options(MODEL)
@options(CACHE)
@options([DRAFT])
def batch(
    source, target, name, max_tokens, parallel, ray, quiet, model, threads, policy, kv_bits, kv_memory, recent, sink,
    protect_bits, prefill, backend, draft,
) -> None:  # fmt: skip
    """Answer the requests of IN, lines as OpenAI's batch API has them, in lines of OUT.

    Every line is answered once, in any order, and known by its custom_id:
    interrupted or killed, the same command goes on where it stopped. A request
    that is refused has its error as its answer.

    \b
    Example:
      kvq batch questions.jsonl answers.jsonl -m smollm
    with lines such as
      {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions",
       "body": {"messages": [{"role": "user", "content": "Who is Ahab?"}]}}
    """
    from kvq.runtime.machine.pipes import outlasting_connections
    from kvq.runtime.server.batch import Answerer, Answering, Options, answer_file
    from kvq.runtime.server.protocol import Settings
    from kvq.runtime.text.cells import visible

    bar = Bar(shown=not quiet, what="answering", unit="requests", least=0)

    def log(message: str) -> None:
        bar.clear()
        click.echo("kvq: " + visible(message.rstrip()), err=True)

    settings = Settings(policy, kv_bits, kv_memory, recent, sink, prefill, protect_bits)
    options = Options(
        name=name, settings=settings, backend=backend, max_tokens=max_tokens, draft=draft, parallel=parallel
    )
    notice = (lambda text: None) if quiet else log

    def begin() -> Answering:
        if ray is None:
            return Answerer(load_model(model, threads), options, log, notice)
        from kvq.runtime.server.cluster import Cluster

        return Cluster(ray, node_loader(model, threads), options, threads, log, notice)

    try:
        with ExitStack() as stack:
            if ray is not None:
                # It tells of lost nodes on stdout, in dozens of lines; what matters of it is logged.
                stack.enter_context(redirect_stdout(io.StringIO()))
                stack.enter_context(outlasting_connections())
            done = answer_file(source, target, begin, options, bar)
    finally:
        bar.clear()
    if not quiet:
        before = f", {done.skipped} were there" if done.skipped else ""
        line = (
            f"{target}: {done.answered} answered, {done.failed} of them by an error{before} | prompts"
            f" {done.prompt_tokens} tokens, answers {done.generated} | {done.seconds:.1f} s"
        )
        click.echo(one_line(line), err=True)
