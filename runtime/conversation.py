"""A conversation on one session: every turn appends what is new, and nothing is processed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any, Unpack

from kvq.runtime.chat import REPLY
from kvq.runtime.errors import ContextError, PromptError
from kvq.runtime.generate import Response
from kvq.runtime.sampling import SamplingOptions

if TYPE_CHECKING:
    from kvq.runtime.session import Session

# Where `Session.metadata`, and so a saved session, holds the conversation.
KEY = "chat"


@dataclass
class Turn:
    """A question and its reply, as places in the session.

    Attributes:
        start: tokens cached before the question; None if the template has rewritten earlier turns for it.
        pending: `Session.pending` before the question.
        prompt: tokens cached when the reply began.
    """

    start: int | None
    pending: list[int]
    prompt: int


@dataclass(frozen=True)
class Feed:
    """How a question gets into the cache.

    Attributes:
        length: tokens of the cache that stay.
        pending: of `Session.pending`, what stays.
        ids: what is appended.
        rewritten: whether the template has changed what precedes, so that part of it is processed again.
    """

    length: int
    pending: list[int]
    ids: list[int]
    rewritten: bool = False


class Conversation:
    """Messages, and the session in which they are cached.

    The session must not be used otherwise in between. The conversation is kept in its metadata, so
    that `Session.save` saves it too, and is found there again.

    Args:
        session: an empty one, or one that holds a conversation (loaded, or forked).
        system: system prompt of a new conversation.

    Raises:
        PromptError: the session holds tokens but no conversation, or `system` is given besides one.
        ChatTemplateError: the bundle's chat template is not valid.
        TokenizerError: the bundle has no tokenizer.
    """

    def __init__(self, session: Session, system: str | None = None) -> None:
        self.session = session
        self.template = session.model.chat_template
        self.tokenizer = session.model.tokenizer
        self.messages: list[dict[str, str]] = []
        self.turns: list[Turn] = []
        if KEY in session.metadata:
            self.messages, self.turns = _parsed(
                session.metadata[KEY], len(session.tokens), session.model.architecture.vocab
            )
            if system is not None:
                raise PromptError("the session holds a conversation, with its own system prompt; leave system out")
        elif session.tokens or session.pending:
            raise PromptError("the session holds tokens, but no conversation; begin with an empty session")
        elif system is not None:
            self.messages.append({"role": "system", "content": system})
        self._remember()

    def reply(
        self,
        text: str,
        *,
        cancelled: Callable[[], bool] | None = None,
        max_tokens: int | None = 512,
        stop: Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        ignore_eos: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[Response]:
        """Answer a question; yields a `Response` per token. Leave the loop to stop: what was said so far stays.

        Args:
            text: the question.
            cancelled: asked while a long question is processed; once it says so the question is taken back.
            max_tokens, stop, stop_tokens, ignore_eos, sampling: as `Session.generate`; what ends a reply in the
                chat template is added.

        Raises:
            ContextError: the question does not fit into what is left of the context; nothing has changed.
            ChatTemplateError: the template refuses it; nothing has changed.
            SamplingError: an option is out of range; nothing has changed.
        """
        question = {"role": "user", "content": text}
        feed = self._feed(question)
        session = self.session
        room = session.model.architecture.context - feed.length - len(feed.pending)
        if len(feed.ids) >= room:
            raise ContextError(
                f"the context of {session.model.architecture.context} tokens is full: the question takes"
                f" {len(feed.ids)}, {max(0, room)} are left; drop turns or begin a new conversation"
            )
        responses = session.generate(
            feed.ids[self._leading(feed) :],
            max_tokens=max_tokens,
            stop=[*self.template.stop, *stop],
            stop_tokens=[*self.template.stop_tokens, *stop_tokens],
            ignore_eos=ignore_eos,
            **sampling,
        )
        return self._reply(question, feed, responses, cancelled)

    def _leading(self, feed: Feed) -> int:
        """How many tokens of a long question go ahead in whole chunks, with a look at `cancelled` after each."""
        return (len(feed.ids) - 1) // self.session.prefill_chunk * self.session.prefill_chunk

    def _reply(
        self,
        question: dict[str, str],
        feed: Feed,
        responses: Iterator[Response],
        cancelled: Callable[[], bool] | None,
    ) -> Iterator[Response]:
        session = self.session
        if feed.length < len(session.tokens):
            session.trim(feed.length)
        session.pending[:] = feed.pending
        if feed.rewritten:
            for earlier in self.turns:
                earlier.start = None
        prompt = feed.length + len(feed.pending) + len(feed.ids)
        said: list[str] = []
        begun = False
        self.messages += [question, {"role": "assistant", "content": ""}]
        self.turns.append(Turn(None if feed.rewritten else feed.length, feed.pending, prompt))
        try:
            for at in range(0, self._leading(feed), session.prefill_chunk):
                session.append(feed.ids[at : at + session.prefill_chunk])
                if cancelled is not None and cancelled():
                    return
            for response in responses:
                begun = True
                said.append(response.text)
                yield response
        finally:
            if begun:
                self.messages[-1]["content"] = "".join(said)
                self._remember()
            else:
                self.undo()

    def undo(self) -> None:
        """Take back the last question and its reply: the cache is trimmed to what was there before.

        Raises:
            PromptError: there is nothing to take back.
        """
        if not self.turns:
            raise PromptError("nothing to undo: the conversation has no turns yet")
        turn = self.turns.pop()
        del self.messages[-2:]
        self.session.trim(turn.start or 0)
        self.session.pending[:] = turn.pending if turn.start is not None else []
        self._remember()

    def move_to(self, session: Session) -> None:
        """Continue in another session of the same model, which processes all tokens so far anew.

        Args:
            session: an empty one, for example with another policy.
        """
        if self.session.tokens:
            session.append(self.session.tokens)
        session.pending[:] = self.session.pending
        session.metadata.update(self.session.metadata)
        self.session = session
        self._remember()

    def _remember(self) -> None:
        turns = [[turn.start, turn.pending, turn.prompt] for turn in self.turns]
        self.session.metadata[KEY] = {"messages": self.messages, "turns": turns}

    def _feed(self, question: dict[str, str]) -> Feed:
        """What to append for a question: only what follows the last reply, wherever the template allows it."""
        session, template = self.session, self.template
        start = len(session.tokens)
        if self.turns and start:
            rest = self._after_last_reply(question)
            if rest is not None:
                return self._join(rest)
        ids = template.encode([*self.messages, question])
        same = 0
        while same < min(start, len(ids) - 1) and session.tokens[same] == ids[same]:
            same += 1
        return Feed(same, [], ids[same:], rewritten=bool(self.turns))

    def _after_last_reply(self, question: dict[str, str]) -> str | None:
        """The text between the last reply and the next, with guards; None if the template rewrites what precedes."""
        *before, reply = self.messages
        prompt = self.template.render_guarded(before)
        text = self.template.render_guarded([*before, {**reply, "content": REPLY}, question])
        if not text.startswith(prompt):
            return None
        blank, found, rest = text[len(prompt) :].partition(REPLY)
        return rest if found and not blank.strip() and rest else None

    def _join(self, rest: str) -> Feed:
        """How `rest` follows the cached reply, of which the model may have said more than was shown."""
        session, turn = self.session, self.turns[-1]
        said = [*session.tokens[turn.prompt :], *session.pending]
        reply = self.messages[-1]["content"]
        tokenizer = self.tokenizer
        shown = len(said)
        while not reply.startswith(text := tokenizer.decode(said[:shown], skip_special_tokens=False)):
            shown -= 1
        rest = reply[len(text) :] + rest
        beyond = tokenizer.decode(said[shown:], skip_special_tokens=False) if shown < len(said) else ""
        start = len(session.tokens)
        if not beyond.strip("\ufffd"):  # nothing, or bytes of a character that the end of the reply has cut
            length, pending = start, list(session.pending)
        elif rest.startswith(beyond) and len(rest) > len(beyond):  # an end-of-turn token above all
            length, pending, rest = start, list(session.pending), rest[len(beyond) :]
        elif turn.prompt + shown >= start:  # not cached yet, so there is nothing to take out of the cache
            length, pending = start, said[start - turn.prompt : shown]
        else:
            length, pending = turn.prompt + shown, []
        return Feed(length, pending, self.template.encode_guarded(rest, beginning=False))


def _parsed(data: Any, tokens: int, vocab: int) -> tuple[list[dict[str, str]], list[Turn]]:
    """Messages and turns from a session's metadata, which may come from anybody's file."""
    try:
        messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in data["messages"]]
        turns = [
            Turn(None if start is None else index(start), [index(token) for token in pending], index(prompt))
            for start, pending, prompt in data["turns"]
        ]
        roles = [message["role"] for message in messages]
        if roles != ["system"] * (len(roles) % 2) + ["user", "assistant"] * len(turns):
            raise ValueError(f"roles {roles}")
        places = [0, *(place for turn in turns for place in (turn.start or 0, turn.prompt) if turn.start is not None)]
        if places != sorted(places) or places[-1] > tokens or any(turn.prompt > tokens for turn in turns):
            raise ValueError(f"turns at {places} of {tokens} tokens")
        if not all(0 <= token < vocab for turn in turns for token in turn.pending):
            raise ValueError("ids outside the vocabulary")
    except (KeyError, TypeError, ValueError) as error:
        raise PromptError(
            f"the session's conversation is damaged ({type(error).__name__}: {error}); begin a new one"
        ) from None
    return messages, turns
