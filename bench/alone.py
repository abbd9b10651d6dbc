"""What the clients of a load test do, done by the library alone: the same conversations, without a server between.

Its sessions share passes as the server's do: a pass has the next token of every text, and of the prompts, in turn, as
many tokens as a chunk has. Nothing is sent, parsed, scheduled between threads or evicted, so the tokens a second of
both tell what all that costs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from kvq.bench.talk import TEMPERATURE, Load, Talk, Turn, talks
from kvq.runtime.chat.feeds import shared
from kvq.runtime.session.appending import Appending
from kvq.runtime.session.generation import events
from kvq.runtime.session.model import Model
from kvq.runtime.session.session import Session


def run_alone(model: Model, load: Load, turn: int = 0) -> tuple[list[Turn], float]:
    """All turns of all clients, and the seconds they took; as `kvq.bench.serve.run_load`."""
    done: list[Turn] = []
    begun = time.perf_counter()
    clients = [_client(model, talk, load, done, begun + load.seconds) for talk in talks(load, turn)]
    waiting = {each: appending for each in clients if (appending := next(each, None)) is not None}
    while waiting:
        chosen, room = [], load.chunk
        for each, appending in waiting.items():
            tokens = len(appending.next)
            if tokens == 1 or tokens <= room or room == load.chunk:
                chosen.append(each)
                room -= tokens if tokens > 1 else 0
        for error in model.run_pass([waiting[each] for each in chosen]):
            if error is not None:
                raise error
        for each in chosen:  # to the end of the line: prompts are read in turn
            appending = waiting.pop(each)
            following = next(each, None) if appending.finished else appending
            if following is not None:
                waiting[each] = following
    return done, time.perf_counter() - begun


def _client(model: Model, talk: Talk, load: Load, done: list[Turn], end: float) -> Iterator[Appending]:
    """What one client needs computed, in its order; its turns are added to `done`."""
    template = model.chat_template
    same: dict[str, Any] = {"max_tokens": load.max_tokens, "temperature": TEMPERATURE}
    same |= {"stop": template.stop, "stop_tokens": template.stop_tokens}
    sessions: list[Session | None] = [None] * load.conversations
    while time.perf_counter() < end:
        turn = talk.next()
        begun = last = time.perf_counter()
        ids = template.encode(turn.messages)
        session = sessions[talk.place] or model.session(load.policy, prefill_chunk=load.chunk)
        kept = min(shared(list(session.tokens), ids), len(ids) - 1)
        if kept < len(session.tokens):
            session.trim(kept)
        yield Appending(session, ids[kept:])
        for event in events(session, None, seed=turn.seed if load.seeds else None, **same):
            if isinstance(event, Appending):
                yield event
                continue
            turn.tokens += 1
            if event.text:
                last = turn.hear(event.text, begun, last)
        turn.prompt_tokens, turn.cached_tokens = len(ids), kept
        done.append(turn)
        talk.said(turn.text)
        sessions[talk.place] = session
