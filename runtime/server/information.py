"""Endpoints that generate nothing: models, health, counts, properties, text to tokens and back, and to vectors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

import kvq
from kvq.runtime.errors import RequestError
from kvq.runtime.server.answering import check_name, served_name
from kvq.runtime.server.embeddings import (
    Embedder,
    Wanted,
    parse_embeddings,
    parse_ollama_embed,
    parse_ollama_embedding,
)
from kvq.runtime.server.fields import Fields, is_integer, parse_json
from kvq.runtime.server.guard import refusal
from kvq.runtime.server.messages import parse_messages
from kvq.runtime.server.metrics import Metrics
from kvq.runtime.server.ollama import now
from kvq.runtime.server.page import page
from kvq.runtime.server.preparing import Limits
from kvq.runtime.server.scheduler import Scheduler
from kvq.runtime.text.tokenizer import decoded, encoded

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model

MOST_COUNTED = 65_536  # tokens of a text that is only tokenized, where the context is shorter
MOST_IDS = 1 << 18


class Information:
    """The endpoints.

    Args:
        scheduler: has model and pool.
        name: of the model in the API; None takes the bundle's.
        limits: of requests.
        metrics: what requests were and took.
        body: reads the body of a request.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        name: str | None,
        limits: Limits,
        metrics: Metrics,
        body: Callable[[Request], Awaitable[bytes]],
    ) -> None:
        self.scheduler, self.limits, self.metrics = scheduler, limits, metrics
        self._name, self._body = name, body
        self._created = int(time.time())
        self._embedder = Embedder(limits)

    def routes(self) -> list[Route]:
        """Starlette's routes."""
        get, post = ["GET"], ["POST"]
        routes = [
            Route("/", self.root, methods=get),
            Route("/health", self.health, methods=get), Route("/stats", self.stats, methods=get),
            Route("/metrics", self.prometheus, methods=get), Route("/props", self.props, methods=get),
            Route("/version", self.version, methods=get), Route("/api/version", self.version, methods=get),
            Route("/api/tags", self.tags, methods=get), Route("/api/ps", self.tags, methods=get),
            Route("/api/show", self.show, methods=post), Route("/api/embed", self.ollama_embed, methods=post),
            Route("/api/embeddings", self.ollama_embedding, methods=post),
        ]  # fmt: skip
        for prefix in ("/v1", ""):
            routes.append(Route(f"{prefix}/models", self.models, methods=get))
            routes.append(Route(f"{prefix}/models/{{name:path}}", self.model, methods=get))
            routes.append(Route(f"{prefix}/tokenize", self.tokenize, methods=post))
            routes.append(Route(f"{prefix}/detokenize", self.detokenize, methods=post))
            routes.append(Route(f"{prefix}/embeddings", self.embeddings, methods=post))
        return routes

    # -- the model ----------------------------------------------------------------------------------

    def served(self, model: Model) -> str:
        """The model's name."""
        return served_name(model, self._name)

    def check_name(self, model: Model, name: str | None) -> None:
        """Raise RequestError for a name that is not the model's."""
        check_name(self.served(model), name)

    def _card(self, model: Model) -> dict[str, Any]:
        shape = model.architecture
        card = {"id": self.served(model), "object": "model", "created": self._created, "owned_by": "kvq"}
        return card | {"context_length": shape.context, "max_model_len": shape.context}

    async def models(self, request: Request) -> Response:
        """The one model."""
        model, _ = self.scheduler.ready()
        return JSONResponse({"object": "list", "data": [self._card(model)]})

    async def model(self, request: Request) -> Response:
        """The one model, by its name."""
        model, _ = self.scheduler.ready()
        self.check_name(model, request.path_params["name"])
        return JSONResponse(self._card(model))

    def _tag(self, model: Model) -> dict[str, Any]:
        manifest, name = model.bundle.manifest, self.served(model)
        details = {"format": "kvq", "family": "llama", "families": ["llama"], "parent_model": ""}
        details |= {"parameter_size": "", "quantization_level": str(manifest.weights.get("layers", ""))}
        nbytes = sum(file["nbytes"] for file in manifest.files.values())
        return {
            "name": name, "model": name, "modified_at": now(), "size": nbytes, "digest": manifest.model_digest,
            "details": details,
        }  # fmt: skip

    async def tags(self, request: Request) -> Response:
        """The one model, as ollama lists it."""
        model, _ = self.scheduler.ready()
        return JSONResponse({"models": [self._tag(model)]})

    async def show(self, request: Request) -> Response:
        """The one model, as ollama shows it."""
        model, _ = self.scheduler.ready()
        fields = Fields(parse_json(await self._body(request)))
        name = fields.text("model", "name")
        self.check_name(model, name and name.removesuffix(":latest"))
        shape, template = model.architecture, model.chat_template
        capabilities = ["completion"] + ["tools"] * (not template.builtin)
        info = {
            "general.architecture": "llama", "llama.context_length": shape.context, "llama.block_count": shape.layers,
            "llama.embedding_length": shape.hidden, "llama.attention.head_count": shape.heads,
            "llama.attention.head_count_kv": shape.kv_heads,
        }  # fmt: skip
        tag = self._tag(model)
        return JSONResponse({
            "template": template.source, "parameters": _parameters(model), "modelfile": "", "details": tag["details"],
            "model_info": info, "capabilities": capabilities, "modified_at": tag["modified_at"],
        })  # fmt: skip

    async def root(self, request: Request) -> Response:
        """The page, for a browser; a word, for clients that look whether somebody is there."""
        if "text/html" in request.headers.get("accept", ""):
            return page()
        return PlainTextResponse("kvq is running")

    async def version(self, request: Request) -> Response:
        """Of kvq."""
        return JSONResponse({"version": kvq.__version__})

    async def props(self, request: Request) -> Response:
        """What a client may want to know before it asks, as llama.cpp tells it."""
        model, _ = self.scheduler.ready()
        template = model.chat_template
        generation = {**model.sampling, "n_predict": self.limits.max_tokens, "n_ctx": model.architecture.context}
        return JSONResponse({
            "default_generation_settings": {"n_ctx": model.architecture.context, "params": generation},
            "total_slots": self.scheduler.concurrency, "model": self.served(model),
            "model_digest": model.bundle.manifest.model_digest, "chat_template": template.source,
            "chat_template_builtin": template.builtin, "tools_native": template.calls.native,
            "build_info": f"kvq {kvq.__version__}", "modalities": {"vision": False, "audio": False},
        })  # fmt: skip

    # -- counts -------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """200 once requests can be answered, 503 before and while the server ends."""
        try:
            self.scheduler.ready()
        except RequestError as error:
            return refusal(error, status=error.code)
        return JSONResponse({"status": "ok"})

    def _counts(self) -> dict[str, int | None]:
        _, pool = self.scheduler.ready()
        active, waiting = self.scheduler.counts()
        memory, disk = pool.prefixes.counts()
        passes = self.scheduler.passes
        return {
            "active": active,
            "waiting": waiting,
            "sessions_in_memory": memory,
            "sessions_on_disk": disk,
            "kv_limit_nbytes": pool.limit,
            "kv_nbytes": pool.known_nbytes,
            "kv_peak_nbytes": pool.peak_nbytes,
            "file_nbytes": pool.prefixes.file_nbytes(),
            "reused": pool.hits,
            "evictions": pool.prefixes.evictions,
            "restores": pool.prefixes.restores,
            "shared_reads": pool.shared.reads if pool.shared else 0,
            "shared_writes": pool.shared.writes if pool.shared else 0,
            "dropped_files": pool.prefixes.dropped_files,
            "passes": passes.passes,
            "pass_sessions": passes.sessions,
            "pass_tokens": passes.rows,
        }

    async def stats(self, request: Request) -> Response:
        """Counts since the start, for operators and benchmarks."""
        return JSONResponse(self._counts())

    async def prometheus(self, request: Request) -> Response:
        """Counts since the start, for Prometheus."""
        gauges = {
            f"kvq_{name}": (f"{name.replace('_', ' ')} (see /stats).", float(value))
            for name, value in self._counts().items()
            if value is not None
        }
        return PlainTextResponse(self.metrics.text(gauges), media_type="text/plain; version=0.0.4")

    # -- text and tokens ----------------------------------------------------------------------------

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text (`content`, as of llama.cpp, or `prompt`, as of vLLM) or of `messages`."""
        body = parse_json(await self._body(request))
        return JSONResponse(await asyncio.to_thread(self._tokenized, body))

    def _tokenized(self, body: dict[str, Any]) -> dict[str, Any]:
        model, _ = self.scheduler.ready()
        fields = Fields(body)
        self.check_name(model, fields.text("model"))
        content, prompt, messages = fields.text("content"), fields.text("prompt"), fields.take("messages")
        special = fields.boolean("add_special_tokens", "add_special")
        prompted = fields.boolean("add_generation_prompt") is not False
        pieces, strings = fields.boolean("with_pieces"), fields.boolean("return_token_strs")
        fields.boolean("parse_special")
        fields.done()
        if sum(each is not None for each in (content, prompt, messages)) != 1:
            raise RequestError("give one of content, prompt and messages", param="content")
        if messages is not None:
            ids = model.chat_template.encode(parse_messages(messages), prompted)
        else:
            text = prompt if content is None else content or ""
            special = content is None if special is None else special
            most = max(MOST_COUNTED, model.architecture.context)
            ids = encoded(model.tokenizer, self._encodable(text or ""), special, most) if text else []
        named = [model.tokenizer.id_to_token(token) for token in ids] if pieces or strings else None
        tokens: list[Any] = list(ids)
        if pieces and named is not None:
            tokens = [{"id": token, "piece": piece} for token, piece in zip(ids, named, strict=True)]
        found = {"tokens": tokens, "count": len(ids), "max_model_len": model.architecture.context}
        return found | ({"token_strs": named} if strings else {})

    @staticmethod
    def _encodable(text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError("the text holds lone surrogates, which are no characters", param="content") from None
        return text

    async def embeddings(self, request: Request) -> Response:
        """Vectors of texts."""
        return JSONResponse(await self._vectors(parse_embeddings(parse_json(await self._body(request))), request))

    async def ollama_embed(self, request: Request) -> Response:
        """Vectors of texts, as ollama gives them."""
        begun = time.monotonic_ns()
        found = await self._vectors(parse_ollama_embed(parse_json(await self._body(request))), request)
        return JSONResponse({
            "model": found["model"], "embeddings": [each["embedding"] for each in found["data"]],
            "total_duration": time.monotonic_ns() - begun, "load_duration": 0,
            "prompt_eval_count": found["usage"]["prompt_tokens"],
        })  # fmt: skip

    async def ollama_embedding(self, request: Request) -> Response:
        """The vector of a text, as ollama gave it before it took several."""
        found = await self._vectors(parse_ollama_embedding(parse_json(await self._body(request))), request)
        return JSONResponse({"embedding": found["data"][0]["embedding"]})

    async def _vectors(self, wanted: Wanted, request: Request) -> dict[str, Any]:
        model, _ = self.scheduler.ready()
        self.check_name(model, wanted.model)
        return await self._embedder.answer(wanted, model, self.served(model), self.scheduler.queue, request)

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        model, _ = self.scheduler.ready()
        fields = Fields(parse_json(await self._body(request)))
        self.check_name(model, fields.text("model"))
        tokens = fields.take("tokens")
        fields.done()
        vocab = model.architecture.vocab
        known = isinstance(tokens, list) and all(is_integer(token) and 0 <= token < vocab for token in tokens)
        if not known or len(tokens) > MOST_IDS:
            raise RequestError(f"tokens must be a list of at most {MOST_IDS} ids in [0, {vocab})", param="tokens")
        text = await asyncio.to_thread(decoded, model.tokenizer, tokens, False)
        return JSONResponse({"content": text, "prompt": text})


def _parameters(model: Model) -> str:
    """What the model's makers recommend for drawing, as ollama has it: a line each, by its names."""
    said = {name.replace("repetition", "repeat"): value for name, value in model.bundle.manifest.sampling.items()}
    return "\n".join(f"{name:<31}{value:g}" for name, value in said.items())
