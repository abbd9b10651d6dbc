"""Errors as the OpenAI API words them: a status and a JSON body."""

from __future__ import annotations

from typing import Any

from kvq.runtime.errors import (
    BudgetError,
    ChatTemplateError,
    ContextError,
    GrammarError,
    KvqError,
    PolicyError,
    PromptError,
    RequestError,
    SamplingError,
    TokenizerError,
)

# Errors of the library that a request's own values cause.
CALLERS = (
    BudgetError, ChatTemplateError, ContextError, GrammarError, PolicyError, PromptError, SamplingError, TokenizerError,
)  # fmt: skip
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY_AFTER_S = 2  # with 429 and 503: a request of this server's size takes seconds
INTERNAL = "internal error; the log has it"


def status_of(error: BaseException) -> int:
    """HTTP status of an error."""
    if isinstance(error, RequestError):
        return error.status
    return 400 if isinstance(error, CALLERS) else 500


def error_body(error: BaseException) -> dict[str, Any]:
    """The JSON body; of anything but a `KvqError` it tells nothing."""
    status = status_of(error)
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    message = " ".join(str(error).split()) if isinstance(error, KvqError) else INTERNAL
    code = "context_length_exceeded" if isinstance(error, ContextError) else getattr(error, "code", None)
    param = _plain(getattr(error, "param", None) or "")[:80] or None
    return {"error": {"message": _plain(message), "type": kind, "param": param, "code": code}}


def _plain(text: str) -> str:
    """Text that UTF-8 can encode: names come from the request and may hold lone surrogates."""
    return text.encode(errors="backslashreplace").decode()


def headers_of(error: BaseException) -> dict[str, str]:
    """Headers that go with the status."""
    status = status_of(error)
    if status in (429, 503):
        return {"retry-after": str(RETRY_AFTER_S)}
    return {"www-authenticate": "Bearer"} if status == 401 else {}
