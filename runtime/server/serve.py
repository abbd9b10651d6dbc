"""From options to a running server: socket, worker, signals, and the way down."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import click
import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from kvq.runtime.errors import ServerError
from kvq.runtime.machine.pipes import outlasting_connections
from kvq.runtime.server.answering import served_name
from kvq.runtime.server.app import make_app
from kvq.runtime.server.connections import HEAD_NBYTES, IDLE_S, Connection, most_connections
from kvq.runtime.server.fleet import Fleet
from kvq.runtime.server.guard import LOOPBACK_HOSTS, Guard, KeyCheck, own_names
from kvq.runtime.server.models import Options, fleet_of, name_in_api, one_model
from kvq.runtime.server.scheduler import Scheduler
from kvq.runtime.text.cells import visible

BACKLOG = 128
# asyncio takes as many connections at a time as its backlog says, before any of them is seen, and each takes a file
# descriptor; the system's own queue is set apart, afterwards.
ACCEPTED_AT_ONCE = 16
LOADING_S = 0.5  # that the end waits for a model that is being loaded, which may be minutes


class Server(uvicorn.Server):
    """uvicorn's server, with the signals that end it turned into an orderly end with exit code 0."""

    scheduler: Scheduler | Fleet | None = None
    name: str | None = None  # of the one model in the API, None for the bundle's own

    def names(self) -> str:
        """What requests may call the models, once the first of them is loaded."""
        if isinstance(self.scheduler, Fleet):
            return ", ".join(member.name for member in self.scheduler.members)
        if self.scheduler is None or self.scheduler.model is None:
            return self.name or "its own"
        return served_name(self.scheduler.model, self.name)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        if self.scheduler is not None:
            self.scheduler.stop()  # running streams end with an error event, so that connections can close

    def finish(self, patience_s: float | None) -> bool:
        """End the worker, as `Scheduler.join`."""
        if self.scheduler is None:
            return False
        self.scheduler.stop()
        return self.scheduler.join(patience_s)


class _Ended(BaseException):
    """A signal has asked for the end while there is no event loop that could see to it."""


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """In the block SIGINT and SIGTERM raise `_Ended`, except where uvicorn has put its own handlers in place."""

    def end(number: int, frame: FrameType | None) -> None:
        raise _Ended

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve(options: Options) -> bool:
    """Listen, load the model, answer until SIGINT or SIGTERM.

    Returns:
        whether all has ended; not where a signal came while a model was being loaded, see `Scheduler.join`. What such
        a load leaves, whoever comes next sweeps: its folders by their locks, its child ends with this process.

    Raises:
        ServerError: the address cannot be had, or an option is out of its range.
        KvqError: the model cannot be loaded, or the settings do not fit it.
    """
    listener = _listen(options.host, options.port)
    host, port = listener.getsockname()[:2]
    loopback = ipaddress.ip_address(host.partition("%")[0]).is_loopback
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if not loopback and options.api_key is None:
        _say(f"warning: {where} can be reached from other machines and takes requests without a key; set KVQ_API_KEY")
    failures: list[BaseException] = []

    def on_ready(error: BaseException | None) -> None:
        if error is None:
            _say(f"ready; served as {server.names()}")
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
    ended = False
    try:
        with _ended_by_signals(), outlasting_connections():
            _say(f"listening on {where}, loading the model")  # in here: who reads it may end us already
            _load(server, options, loopback, on_ready)
            asyncio.run(server.serve(sockets=[listener]))
        ended = True
    except _Ended:
        pass
    finally:
        ended = server.finish(None if failures else LOADING_S) and ended
    if failures:
        raise failures[0]
    return ended


def _load(server: Server, options: Options, loopback: bool, on_ready: Callable[[BaseException | None], None]) -> None:
    """Begin to load, and give the server its application."""
    if options.others:
        fleet = fleet_of(options, on_ready, _say)
        server.scheduler = fleet
        server.config.app = _guarded(fleet, options, loopback, None)
        fleet.load(fleet.members[0])
    else:
        server.name = options.name or name_in_api(options.model)
        server.scheduler, api = one_model(options, options.model, server.name, on_ready, _say)
        server.config.app = _guarded(make_app(api), options, loopback, api.metrics.answered)


async def _nothing(scope: object, receive: object, send: object) -> None:
    """Stands in for the application until it is made."""


def _guarded(app: ASGIApp, options: Options, loopback: bool, counted: Callable[[str, int], None] | None) -> ASGIApp:
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
    hosts: set[str] | None = None  # a key keeps out whoever lacks it, by whatever name they call this machine
    if loopback or options.api_key is None:
        hosts = {*LOOPBACK_HOSTS, options.host, *(() if loopback else own_names())}
    return Guard(
        app, hosts, _say, _say if options.access_log else None, counted,
        addresses=not loopback, origins=options.cors_origins,
    )  # fmt: skip


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
    click.echo("kvq: " + visible(message.rstrip()), err=True)
    sys.stderr.flush()
