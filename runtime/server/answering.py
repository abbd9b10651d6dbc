"""What a response of the OpenAI API needs of a model, wherever the request came from: a client or a file's line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import kvq
from kvq.runtime.errors import RequestError
from kvq.runtime.server.choices import choices_of
from kvq.runtime.server.preparing import Prepared
from kvq.runtime.server.responses import Reply
from kvq.runtime.server.tokens import TokenTexts
from kvq.runtime.text.tools import CallReader

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model


def served_name(model: Model, name: str | None) -> str:
    """The model's name in the API; name: the one that it was given, None for the bundle's."""
    return name or model.bundle.manifest.name


def check_name(served: str, asked: str | None) -> None:
    """Raise RequestError for a name that is not the model's."""
    if asked is not None and asked != served:
        raise RequestError(f"no model {asked!r:.100} here; this server has {served!r}", 404, "model_not_found", "model")


def reader_of(prepared: Prepared, model: Model) -> CallReader | None:
    """What tells calls from the text, where there are tools to call."""
    tools = prepared.request.tools
    if tools is None or not tools.offered:
        return None
    template = model.chat_template
    names = [tool.name for tool in tools.offered]
    return CallReader(template.calls, names, sorted(template.hidden), not tools.parallel)


def reply_of(prepared: Prepared, model: Model, served: str, texts: TokenTexts) -> Reply:
    """The response to a request, before anything has happened; served: the model's name in it."""
    fingerprint = f"kvq-{kvq.__version__}-{model.bundle.manifest.model_digest[:12]}"
    choices = choices_of(prepared, texts, lambda: reader_of(prepared, model))
    return Reply(prepared, served, fingerprint, texts, choices)
