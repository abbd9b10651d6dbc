"""/v1/embeddings and ollama's /api/embed, /api/embeddings: vectors of texts, see `kvq.runtime.session.embedding`."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.requests import Request

from kvq.runtime.errors import ContextError, RequestError
from kvq.runtime.server.events import Disconnected, until_gone
from kvq.runtime.server.fields import Fields
from kvq.runtime.server.preparing import Limits
from kvq.runtime.server.protocol import texts_or_ids
from kvq.runtime.session.embedding import embed

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model

MOST_INPUTS = 256
HINTS = ("user", "metadata", "input_type", "truncation")
OLLAMA_HINTS = ("keep_alive", "options")


@dataclass(frozen=True)
class Wanted:
    """A request for vectors.

    Attributes:
        inputs: texts or token ids.
        encoding: "float", or "base64" of little-endian float32.
        model: the name asked for.
        cut: whether an input that is too long loses its end; else it is refused.
    """

    inputs: list[str | list[int]]
    encoding: str
    model: str | None
    cut: bool = False


def parse_embeddings(body: dict[str, Any]) -> Wanted:
    """A request for /v1/embeddings.

    Raises:
        RequestError: a field is missing, of a wrong type or not supported; `param` is its name.
    """
    fields = Fields(body)
    _refuse_dimensions(fields)
    for name in HINTS:
        fields.take(name)
    encoding = fields.text("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        fields.refuse("encoding_format", "must be float or base64")
    wanted = Wanted(texts_or_ids(fields.take("input"), "input", MOST_INPUTS), encoding, fields.text("model"))
    fields.done()
    return wanted


def parse_ollama_embed(body: dict[str, Any]) -> Wanted:
    """A request for /api/embed; raises as `parse_embeddings`."""
    fields = Fields(body)
    _refuse_dimensions(fields)
    for name in OLLAMA_HINTS:
        fields.take(name)
    inputs, cut = texts_or_ids(fields.take("input"), "input", MOST_INPUTS), fields.boolean("truncate")
    name = (fields.text("model", "name") or "").removesuffix(":latest")
    wanted = Wanted(inputs, "float", name or None, cut is not False)
    fields.done()
    return wanted


def parse_ollama_embedding(body: dict[str, Any]) -> Wanted:
    """A request for /api/embeddings, which is of one text; raises as `parse_embeddings`."""
    if not isinstance(body.get("prompt"), str):
        raise RequestError("prompt must be a text", param="prompt")
    return parse_ollama_embed({"input" if name == "prompt" else name: value for name, value in body.items()})


def _refuse_dimensions(fields: Fields) -> None:
    if fields.take("dimensions") is not None:
        fields.refuse("dimensions", "is not supported: a vector has the width of the model; leave it out")


class Embedder:
    """Makes vectors, one text at a time, in a thread of its own: who waits for it holds up nobody else.

    Args:
        limits: of requests.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._thread = ThreadPoolExecutor(1, "kvq-embeddings")
        self._waiting = 0

    async def answer(self, wanted: Wanted, model: Model, served: str, queue: int, request: Request) -> dict[str, Any]:
        """The body of the response. Requests at once take turns, text by text.

        Args:
            wanted: the request.
            model, served: the loaded model and its name.
            queue: most requests that wait.
            request: the client's; its body has been read.

        Raises:
            RequestError: 429 where too many wait, 503 where it takes longer than a request may.
            Disconnected: the client is gone.
            KvqError: as `embed`.
        """
        if self._waiting > queue:
            raise RequestError("too many requests are waiting; try again in a moment", 429, "queue_full")
        self._waiting += 1
        gone, deadline = threading.Event(), time.monotonic() + self._limits.timeout_s
        watch = asyncio.ensure_future(until_gone(request, gone.set))

        def check(*_: int) -> None:
            if gone.is_set():
                raise Disconnected
            if time.monotonic() > deadline:
                raise RequestError("the request took too long; send fewer texts", 503, "timeout")

        data, tokens, in_thread = [], 0, asyncio.get_running_loop().run_in_executor
        try:
            for index, each in enumerate(wanted.inputs):
                vector, count = await in_thread(self._thread, self._vector, index, each, wanted.cut, model, check)
                data.append({"object": "embedding", "index": index, "embedding": _encoded(vector, wanted.encoding)})
                tokens += count
        finally:
            gone.set()
            watch.cancel()
            self._waiting -= 1
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": served, "usage": usage}

    def _vector(
        self, index: int, text: str | list[int], cut: bool, model: Model, check: Callable[..., None]
    ) -> tuple[np.ndarray, int]:
        """The vector of an input, and how many tokens it has; `check` is called between passes and raises to end it."""
        check()
        context = model.architecture.context
        most = min(self._limits.prompt_tokens or context, context)
        ids = model.encode(text) if isinstance(text, str) else text
        ids = ids[:most] if cut else ids
        if len(ids) > most:
            raise ContextError(f"input {index} has {len(ids)} tokens, at most {most} are possible; shorten it")
        return embed(model, ids, check), len(ids)


def _encoded(vector: np.ndarray, encoding: str) -> Any:
    return vector.tolist() if encoding == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()
