"""/v1/embeddings and ollama's /api/embed, /api/embeddings: vectors of texts, see `kvq.runtime.session.embedding`."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvq.runtime.errors import ContextError, RequestError
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
    """Makes vectors, one text at a time, in threads beside the worker's.

    Args:
        limits: of requests.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._turn = threading.Lock()
        self._waiting = 0

    async def answer(self, wanted: Wanted, model: Model, served: str, queue: int) -> dict[str, Any]:
        """The body of the response.

        Args:
            wanted: the request.
            model, served: the loaded model and its name.
            queue: most requests that wait.

        Raises:
            RequestError: 429 where too many wait, 503 where it takes longer than a request may.
            KvqError: as `embed`.
        """
        if self._waiting > queue:
            raise RequestError("too many requests are waiting; try again in a moment", 429, "queue_full")
        self._waiting += 1
        gone = threading.Event()
        try:
            return await asyncio.to_thread(self._vectors, wanted, model, served, gone)
        finally:
            gone.set()
            self._waiting -= 1

    def _vectors(self, wanted: Wanted, model: Model, served: str, gone: threading.Event) -> dict[str, Any]:
        deadline, tokens = time.monotonic() + self._limits.timeout_s, 0
        context = model.architecture.context
        most = min(self._limits.prompt_tokens or context, context)

        def check(*_: int) -> None:
            if gone.is_set() or time.monotonic() > deadline:
                raise RequestError("the request took too long; send fewer texts", 503, "timeout")

        data = []
        for index, each in enumerate(wanted.inputs):
            ids = model.encode(each) if isinstance(each, str) else each
            ids = ids[:most] if wanted.cut else ids
            if len(ids) > most:
                raise ContextError(f"input {index} has {len(ids)} tokens, at most {most} are possible; shorten it")
            tokens += len(ids)
            with self._turn:
                check()
                vector = embed(model, ids, check)
            data.append({"object": "embedding", "index": index, "embedding": _encoded(vector, wanted.encoding)})
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": served, "usage": usage}


def _encoded(vector: np.ndarray, encoding: str) -> Any:
    return vector.tolist() if encoding == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()
