"""The models of a server: what each is loaded with, alone or as one of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from starlette.types import ASGIApp

import kvq
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.catalog.references import default_model, find, locate
from kvq.runtime.errors import BundleError, ServerError
from kvq.runtime.server.app import Api, make_app
from kvq.runtime.server.capacity import quarter_of_memory
from kvq.runtime.server.fleet import Asleep, Fleet, Member
from kvq.runtime.server.guard import Guard
from kvq.runtime.server.pool import SessionPool
from kvq.runtime.server.preparing import Limits
from kvq.runtime.server.protocol import Settings
from kvq.runtime.server.scheduler import Scheduler
from kvq.runtime.server.shared import SharedSessions
from kvq.runtime.session.model import Model

Ready = Callable[[BaseException | None], None]


@dataclass(frozen=True)
class Options:
    """Everything `kvq serve` can be told.

    Attributes:
        model, threads: as in `kvq.load`.
        others: further models that are served by their names.
        models_memory: most bytes of the models that are loaded; None is half of the machine's memory.
        host, port: to listen on; port 0 takes a free one.
        name: of the model in the API; None takes the bundle's.
        settings, backend, chunk: of sessions.
        kv_memory_total: most bytes of all KV stores; None is a quarter of the machine's memory.
        session_dir, session_disk: where idle sessions are saved (None: the system's temporary folder), most bytes.
        session_shared: let other servers with the same folder go on from what is kept of prompts.
        concurrency, queue: most requests at work, and waiting.
        limits: of single requests.
        api_key: None lets everybody in.
        cors_origins: origins whose web pages may use the API.
        access_log: one line per request on stderr.
    """

    model: str | None = None
    others: Sequence[str] = ()
    models_memory: int | None = None
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
    session_shared: bool = False
    concurrency: int = 8
    queue: int = 32
    limits: Limits = field(default_factory=Limits)
    api_key: str | None = None
    cors_origins: Sequence[str] = ()
    access_log: bool = True


def one_model(
    options: Options, reference: str | None, name: str | None, on_ready: Ready, log: Callable[[str], None]
) -> tuple[Scheduler, Api]:
    """A model's worker, which begins to load it, and its endpoints.

    Args:
        options: of the server; several models share its caches' bytes alike.
        reference: as in `kvq.load`.
        name: in the API; None takes the bundle's.
        on_ready, log: as in `Scheduler`.
    """
    share = 1 + len(options.others)
    total = quarter_of_memory() if options.kv_memory_total is None else options.kv_memory_total

    def load() -> Model:
        return kvq.load(reference, threads=options.threads, notice=log)

    def make_pool(model: Model) -> SessionPool:
        folder, disk, shared = options.session_dir, options.session_disk // share, None
        if options.session_shared and folder is not None:
            shared = SharedSessions(folder, model, options.backend, options.chunk, options.session_disk, log)
        pool = SessionPool(model, total // share, folder, disk, options.chunk, options.backend, log, shared)
        pool.check(options.settings, 1)
        pool.check_draft(options.settings, options.limits.draft)
        return pool

    scheduler = Scheduler(load, make_pool, options.concurrency, options.queue, on_ready, log)
    return scheduler, Api(scheduler, name, options.settings, options.limits)


def name_in_api(reference: str | None) -> str | None:
    """The name that `kvq list` has for a model; None for a folder, a file, or what there is not, which loading says."""
    try:
        found = find(default_model()[0] if reference is None else reference)
    except BundleError:
        return None
    return None if found.origin in ("folder", "checkpoint") else found.name


def fleet_of(options: Options, on_ready: Ready, log: Callable[[str], None]) -> Fleet:
    """The application of several models; none is loaded yet.

    Args:
        options: of the server.
        on_ready: told when the first model is there, or cannot be loaded, the first time.
        log: told lines.

    Raises:
        ServerError: two of the same name, or a name for all.
        KvqError: a model that there is not.
    """
    if options.name is not None:
        raise ServerError("--name is of one model; several have their own names, kvq name gives them others")
    begun: list[bool] = []

    def member(reference: str) -> Member:
        path = locate(reference, notice=log)
        manifest = Bundle(path).manifest
        name = name_in_api(reference) or manifest.name

        def make(settle: Ready) -> tuple[Scheduler, ASGIApp]:
            first = not begun

            def ready(error: BaseException | None) -> None:
                settle(error)
                if first:
                    on_ready(error)

            begun.append(True)
            scheduler, api = one_model(options, str(path), name, ready, log)
            return scheduler, Guard(make_app(api), None, log, None, api.metrics.answered)

        nbytes = sum(file["nbytes"] for file in manifest.files.values())
        asleep = make_app(Api(cast(Scheduler, Asleep(name)), name, options.settings, options.limits))
        return Member(name, nbytes, manifest.architecture.context, asleep, make)

    members = [member(reference) for reference in (options.model or "", *options.others)]
    names = [each.name for each in members]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ServerError(f"two models are named {twice[0]!r}; kvq name gives one of them another")
    limit = 2 * quarter_of_memory() if options.models_memory is None else options.models_memory
    return Fleet(members, limit, log, options.limits)
