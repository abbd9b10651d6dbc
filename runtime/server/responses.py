"""Response bodies of the OpenAI API: whole ones and the frames of a stream."""

from __future__ import annotations

import secrets
import time
from typing import Any

from kvq.runtime.server.protocol import Generation
from kvq.runtime.server.scheduler import Done, Step
from kvq.runtime.server.tokens import Scored, TokenTexts, chat_logprobs, completion_logprobs
from kvq.runtime.session.statistics import Stats

# The API knows no end of the context; the extension block does.
FINISH = {"stop": "stop", "length": "length", "context": "length"}


class Reply:
    """One response on its way: what all its bodies have in common, and how far it has got.

    Args:
        request: what is answered.
        model: name of the model.
        fingerprint: of model and version.
        prompt_tokens: tokens of the prompt.
        texts: of single tokens, for log-probabilities.
        end_tokens: ids that end a text and are no part of it.
        stops: whether strings can end it: the tokens of one are no part of it either.

    Attributes:
        generated: tokens so far.
    """

    def __init__(
        self,
        request: Generation,
        model: str,
        fingerprint: str,
        prompt_tokens: int,
        texts: TokenTexts,
        end_tokens: set[int],
        stops: bool = False,
    ) -> None:
        self.request = request
        self._texts = texts
        self._end_tokens = end_tokens
        self._stops = stops
        self._held: list[tuple[int, Step]] = []  # steps whose text has not been shown: where it begins, in bytes
        self._said = self._shown = 0  # bytes of all tokens, and of the text that was shown
        self._prompt_tokens = prompt_tokens
        self.generated = 0
        self._offset = 0  # characters of the tokens so far, for completion log-probabilities
        kind = "chat.completion" if request.chat else "text_completion"
        self._common = {
            "id": ("chatcmpl-" if request.chat else "cmpl-") + secrets.token_hex(12),
            "object": kind + ".chunk" if request.chat and request.stream else kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def opening(self) -> dict[str, Any] | None:
        """The first frame of a chat stream, which names the role; completions have none."""
        if not self.request.chat:
            return None
        return self._framed([self._choice({"role": "assistant", "content": ""}, None, None)])

    def frame(self, step: Step) -> dict[str, Any] | None:
        """The frame of a token; None if it has nothing to tell. The last one says what ran."""
        logprobs = self._logprobs([step])
        text, finish = step.response.text, step.response.finish_reason
        if not text and logprobs is None and finish is None:
            return None
        content = ({"content": text} if text else {}) if self.request.chat else text
        body = self._framed([self._choice(content, logprobs, finish)])
        return body if step.done is None else body | {"kvq": extension(step.done.stats, finish)}

    def usage_frame(self, done: Done) -> dict[str, Any] | None:
        """The frame after the last one, if usage was asked for."""
        return self._common | {"choices": [], "usage": self._usage(done)} if self.request.include_usage else None

    def whole(self, steps: list[Step], done: Done) -> dict[str, Any]:
        """A response that is no stream, of all its steps; done: of the last one."""
        text = "".join(step.response.text for step in steps)
        finish = steps[-1].response.finish_reason
        logprobs = self._logprobs(steps)
        content = {"role": "assistant", "content": text, "refusal": None} if self.request.chat else text
        choice = self._choice(content, logprobs, finish)
        return self._common | {"choices": [choice], "usage": self._usage(done), "kvq": extension(done.stats, finish)}

    def _framed(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        body = self._common | {"choices": choices}
        return body | {"usage": None} if self.request.include_usage else body

    def _choice(self, content: Any, logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
        name = "text" if not self.request.chat else "delta" if self.request.stream else "message"
        return {"index": 0, name: content, "logprobs": logprobs, "finish_reason": finish and FINISH[finish]}

    def _logprobs(self, steps: list[Step]) -> dict[str, Any] | None:
        self.generated += len(steps)
        if self.request.top_logprobs is None:
            return None
        shown = self._released(steps)
        if self.request.stream and not shown:
            return None
        chosen = [Scored(step.response.token, step.response.logprob) for step in shown]
        alternatives = [step.alternatives for step in shown]
        if self.request.chat:
            return chat_logprobs(self._texts, chosen, alternatives)
        found = completion_logprobs(self._texts, chosen, alternatives, self._offset)
        self._offset += sum(map(len, found["tokens"]))
        return found

    def _released(self, steps: list[Step]) -> list[Step]:
        """Those whose text is shown, with those held back before: what may be a part of a stop string waits with it."""
        released: list[Step] = []
        for step in steps:
            response, ended = step.response, step.response.token in self._end_tokens
            if not ended:
                self._held.append((self._said, step))
                self._said += self._texts.shown_nbytes(response.token)
            self._shown += len(response.text.encode())
            whole = not self._stops or ended or response.finish_reason not in (None, "stop")
            released += [held for begin, held in self._held if whole or begin < self._shown]
            self._held = [(begin, held) for begin, held in self._held if not whole and begin >= self._shown]
        return released

    def _usage(self, done: Done) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self.generated,
            "total_tokens": self._prompt_tokens + self.generated,
            "prompt_tokens_details": {"cached_tokens": done.cached},
        }


def extension(stats: Stats, finish: str | None) -> dict[str, Any]:
    """The block `kvq` of a response: what really ran, measured from the session's arrays."""
    held = {name: row["tokens"] for name, row in stats.precisions.items() if row["tokens"]}
    return {
        "policy": stats.policy,
        "policy_reason": stats.policy_reason or None,
        "kv_bits": stats.kv_used_bits,
        "kv_nbytes": stats.kv_nbytes,
        "tokens": stats.tokens,
        "precisions": held,
        "recent": stats.recent,
        "sink": stats.sink,
        "protect_bits": stats.protect_bits,
        "backend": f"{stats.backend} {stats.backend_detail}".strip(),
        "finish_reason": finish,
    }
