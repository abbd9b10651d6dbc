"""Load on `kvq serve`: several clients in conversations at once, every text checked.

    python -m kvq.bench.serve --clients 8 --seconds 120 --kv-memory-total 10MB

A server of its own on a free loopback port; every client keeps several conversations open and takes a turn in one after
the other, so that idle ones have to leave memory. Afterwards every response is generated once more by the library
alone, from an empty session, and compared; without seeds there is nothing to compare. Times are taken in the clients,
which run on the same machine.
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import click
import numpy as np

import kvq
from kvq.bench.alone import run_alone
from kvq.bench.machine import resident_bytes
from kvq.bench.options import FILE, HELP
from kvq.bench.report.tables import quartiles, write_json
from kvq.bench.talk import TEMPERATURE, Load, Talk, Turn, talks

TIMEOUT_S = 600
SHOWN = (
    "reused", "evictions", "restores", "dropped_files", "kv_limit_nbytes", "kv_peak_nbytes", "file_nbytes",
    "peak_rss_nbytes",
)  # fmt: skip


class ServerProcess:
    """`kvq serve` on a free port."""

    def __init__(self, *arguments: str) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        command = [sys.executable, "-m", "kvq", "serve", "--port", "0", "-q", *arguments]
        self.process = subprocess.Popen(command, stderr=self._log)
        self.port = int(self._wait_for(r"listening on http://127\.0\.0\.1:(\d+)")[1])
        self._wait_for("^kvq: ready")

    def _wait_for(self, pattern: str) -> re.Match[str]:
        while True:
            self._log.seek(0)
            log = self._log.read()
            if found := re.search(pattern, log, re.MULTILINE):
                return found
            if self.process.poll() is not None:
                raise click.ClickException(f"the server ended: {log.strip()[-300:]}")
            time.sleep(0.05)

    def stats(self) -> dict[str, Any]:
        """Of the server, and its largest resident memory."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        connection.request("GET", "/stats")
        stats = json.loads(connection.getresponse().read())
        return stats | {"peak_rss_nbytes": resident_bytes(self.process.pid, peak=True)}

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait()
        self._log.close()


def pieces(connection: http.client.HTTPConnection, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed response."""
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise click.ClickException(f"{answer.status}: {answer.read()[:300]!r}")
    for line in answer:
        data = line.removeprefix(b"data: ").strip()
        if data and data != b"[DONE]":
            chunk = json.loads(data)
            if "error" in chunk:
                raise click.ClickException(str(chunk["error"]))
            yield chunk
    answer.read()


def take_turn(connection: http.client.HTTPConnection, turn: Turn, load: Load) -> None:
    """Send the request of a turn and note what comes back."""
    body = {"messages": turn.messages, "max_tokens": load.max_tokens, "policy": load.policy}
    body |= {"seed": turn.seed} if load.seeds else {}
    body |= {"temperature": TEMPERATURE, "stream": True, "stream_options": {"include_usage": True}}
    begun = last = time.perf_counter()
    for chunk in pieces(connection, body):
        if chunk["choices"] and (text := chunk["choices"][0]["delta"].get("content")):
            last = turn.hear(text, begun, last)
        elif usage := chunk["usage"]:
            turn.prompt_tokens, turn.tokens = usage["prompt_tokens"], usage["completion_tokens"]
            turn.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]


def client(talk: Talk, port: int, load: Load, end: float) -> list[Turn]:
    """Turns in the conversations of one client until the time is over."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    done: list[Turn] = []
    while time.perf_counter() < end:
        done.append(talk.next())
        take_turn(connection, done[-1], load)
        talk.said(done[-1].text)
    return done


def run_load(server: ServerProcess, load: Load, turn: int = 0) -> tuple[list[Turn], float]:
    """All turns of all clients, and the seconds they took; turn: what they talk of is another time another thing."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(load.clients) as pool:
        shared = (server.port, load, begun + load.seconds)
        clients = [pool.submit(client, talk, *shared) for talk in talks(load, turn)]
    return [turn for one in clients for turn in one.result()], time.perf_counter() - begun


def wrong_texts(turns: list[Turn], model: str | None, load: Load) -> int:
    """How many responses are not what the library alone says to the same messages."""
    loaded = kvq.load(model)
    template = loaded.chat_template
    same: dict[str, Any] = {"max_tokens": load.max_tokens, "temperature": TEMPERATURE}
    same |= {"stop": template.stop, "stop_tokens": template.stop_tokens}
    wrong = 0
    for turn in turns:
        session = loaded.session(load.policy, prefill_chunk=load.chunk)
        responses = session.generate(template.encode(turn.messages), seed=turn.seed, **same)
        wrong += "".join(response.text for response in responses) != turn.text
    return wrong


def report(turns: list[Turn], seconds: float, stats: dict[str, Any] | None = None) -> dict[str, Any]:
    """The figures: milliseconds, bytes, counts; stats: of the server."""
    first = np.percentile([1e3 * turn.first for turn in turns], [50, 95])
    gaps = np.percentile([1e3 * gap for turn in turns for gap in turn.gaps], [50, 95])
    return {
        "responses": len(turns),
        "seconds": round(seconds, 1),
        "tokens_per_s": round(sum(turn.tokens for turn in turns) / seconds, 1),
        "prompt_tokens": sum(turn.prompt_tokens for turn in turns),
        "cached_tokens": sum(turn.cached_tokens for turn in turns),
        "first_token_ms": [round(value, 1) for value in first],
        "per_token_ms": [round(value, 2) for value in gaps],
    } | {name: stats[name] for name in SHOWN if stats is not None}


def in_turn(server: ServerProcess, model: str | None, load: Load, rounds: int) -> list[Turn]:
    """The server's turns; the library alone has the same conversations after it, round for round. Shows both."""
    loaded = kvq.load(model)
    done: list[Turn] = []
    rates = []
    for turn in range(rounds):
        found, took = run_load(server, load, turn)
        done += found
        both = {"server": report(found, took, server.stats()), "alone": report(*run_alone(loaded, load, turn))}
        click.echo(json.dumps(both, indent=1))
        rates.append(both["server"]["tokens_per_s"] / both["alone"]["tokens_per_s"])
    click.echo(f"tokens/s of the server to those of the library alone: {quartiles(rates, '.3f')}")
    return done


@click.command(context_settings=HELP)
@click.option("--model", help="bundle; the embedded model if not given")
@click.option("--clients", default=8, show_default=True)
@click.option("--seconds", default=60.0, show_default=True, help="how long the load lasts")
@click.option("--conversations", default=3, show_default=True, help="open ones of each client")
@click.option("--turns", default=5, show_default=True, help="of a conversation")
@click.option("--max-tokens", default=48, show_default=True, help="of a response")
@click.option("--policy", default="k8v4", show_default=True, help="one without a budget")
@click.option("--chunk", default=128, show_default=True, help="as of kvq serve")
@click.option(
    "--seeds/--no-seeds", default=True, help="without them conversations go on from answers, nothing is checked"
)
@click.option("--kv-memory-total", default="10MB", show_default=True)
@click.option(
    "--alone", default=0, metavar="N", help="N times in turn with the library alone, which has the same conversations"
)
@click.option("--record", type=FILE, help="write the responses there and do not check them now")
@click.option("--check", type=click.File(), help="check the responses of a --record")
def main(model, kv_memory_total, alone, record, check, **options) -> None:
    """Put load on a server, print the figures as JSON, and check every text."""
    if record is not None and not options["seeds"]:
        raise click.UsageError("--record keeps responses to be checked, which takes --seeds")
    if check is not None:
        saved = json.load(check)
        load, done = Load(**saved["load"]), [Turn(**turn) for turn in saved["turns"]]
    else:
        load = Load(**options)
        limits = ["--kv-memory-total", kv_memory_total, "--concurrency", str(load.clients), "--chunk", str(load.chunk)]
        with closing(ServerProcess(*limits, *(["-m", model] if model else []))) as server:
            if alone:
                done = in_turn(server, model, load, alone)
            else:
                done, took = run_load(server, load)
                click.echo(json.dumps(report(done, took, server.stats()), indent=1))
        if not load.seeds:
            return
        if record is not None:
            write_json({"load": vars(load), "turns": [vars(turn) for turn in done]}, record)
            return
    wrong = wrong_texts(done, model, load)
    click.echo(f"{wrong} of {len(done)} texts differ from those of the library alone")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
