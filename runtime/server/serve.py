"""From options to a running server: socket, worker, signals, and the way down."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import click
import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

import kvq
from kvq.runtime.errors import ServerError
from kvq.runtime.server.app import Api, make_app
from kvq.runtime.server.capacity import quarter_of_memory
from kvq.runtime.server.connections import HEAD_NBYTES, IDLE_S, Connection, most_connections
from kvq.runtime.server.guard import LOOPBACK_HOSTS, Guard, KeyCheck
from kvq.runtime.server.pool import SessionPool
from kvq.runtime.server.preparing import Limits
from kvq.runtime.server.protocol import Settings
from kvq.runtime.server.scheduler import Scheduler
from kvq.runtime.session.model import Model

BACKLOG = 128
# asyncio takes as many connections at a time as its backlog says, before any of them is seen, and each takes a file
# descriptor; the system's own queue is set apart, afterwards.
ACCEPTED_AT_ONCE = 16


@dataclass(frozen=True)
class Options:
    """Everything `kvq serve` can be told.

    Attributes:
        model, threads: as in `kvq.load`.
        host, port: to listen on; port 0 takes a free one.
        name: of the model in the API; None takes the bundle's.
        settings, backend, chunk: of sessions.
        kv_memory_total: most bytes of all KV stores; None is a quarter of the machine's memory.
        session_dir, session_disk: where idle sessions are saved (None: the system's temporary folder), most bytes.
        concurrency, queue: most requests at work, and waiting.
        limits: of single requests.
        api_key: None lets everybody in.
        cors_origins: origins whose web pages may use the API.
        access_log: one line per request on stderr.
    """

    model: str | None = None
    threads: int | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    name: str | None = None
    settings: Settings = field(default_factory=Settings)
    backend: str | None = None
    chunk: int = 128
    kv_memory_total: int | None = None
    session_dir: Path | None = None
    session_disk: int = 1_000_000_000
    concurrency: int = 8
    queue: int = 32
    limits: Limits = field(default_factory=Limits)
    api_key: str | None = None
    cors_origins: Sequence[str] = ()
    access_log: bool = True


class Server(uvicorn.Server):
    """uvicorn's server, with the signals that end it turned into an orderly end with exit code 0."""

    scheduler: Scheduler

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        self.scheduler.stop()  # running streams end with an error event, so that connections can close


def serve(options: Options) -> None:
    """Listen, load the model, answer until SIGINT or SIGTERM.

    Raises:
        ServerError: the address cannot be had, or an option is out of its range.
        KvqError: the model cannot be loaded, or the settings do not fit it.
    """
    listener = _listen(options.host, options.port)
    host, port = listener.getsockname()[:2]
    loopback = ipaddress.ip_address(host.partition("%")[0]).is_loopback
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if not loopback and options.api_key is None:
        _say(f"warning: {where} can be reached from other machines and takes requests without a key; give --api-key")
    _say(f"listening on {where}, loading the model")
    failures: list[BaseException] = []

    def load() -> Model:
        return kvq.load(options.model, threads=options.threads, notice=_say)

    def make_pool(model: Model) -> SessionPool:
        pool = SessionPool(
            model,
            quarter_of_memory() if options.kv_memory_total is None else options.kv_memory_total,
            options.session_dir,
            options.session_disk,
            options.chunk,
            options.backend,
            _say,
        )
        pool.check(options.settings, 1)
        pool.check_draft(options.settings, options.limits.draft)
        return pool

    def on_ready(error: BaseException | None) -> None:
        if error is None:
            _say("ready")
        else:
            failures.append(error)
            server.should_exit = True

    Connection.most = most_connections()
    server = Server(
        uvicorn.Config(
            _nothing, http=Connection, ws="none", loop="asyncio", lifespan="off", log_config=None, log_level="critical",
            access_log=False, proxy_headers=False, server_header=False, timeout_graceful_shutdown=10,
            timeout_keep_alive=IDLE_S, backlog=ACCEPTED_AT_ONCE, h11_max_incomplete_event_size=HEAD_NBYTES,
        )
    )  # fmt: skip
    scheduler = Scheduler(load, make_pool, options.concurrency, options.queue, on_ready, _say)
    server.scheduler = scheduler
    api = Api(scheduler, options.name, options.settings, options.limits)
    hosts = [*LOOPBACK_HOSTS, options.host] if loopback else None
    server.config.app = _guarded(make_app(api), options, hosts, api.metrics.answered)
    try:
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        scheduler.stop()
        scheduler.join()
    if failures:
        raise failures[0]


async def _nothing(scope: object, receive: object, send: object) -> None:
    """Stands in for the application until it is made."""


def _guarded(
    app: ASGIApp, options: Options, hosts: Sequence[str] | None, counted: Callable[[str, int], None]
) -> ASGIApp:
    """The application behind its checks; a preflight request of CORS comes without a key."""
    if options.api_key is not None:
        app = KeyCheck(app, options.api_key)
    if options.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=options.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return Guard(app, hosts, _say, _say if options.access_log else None, counted)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        # With the protocol named, asyncio sets TCP_NODELAY on the connections. Without, a stream on a connection used
        # before stands still for 40 ms, until its first piece is acknowledged.
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        return listener
    except (OSError, OverflowError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ServerError(f"cannot listen on {host} port {port} ({why}); choose another --host or --port") from None


def _say(message: str) -> None:
    click.echo("kvq: " + message.rstrip(), err=True)
    sys.stderr.flush()
