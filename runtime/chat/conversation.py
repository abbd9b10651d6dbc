"""A conversation on one session: every turn appends what is new, and nothing is processed twice."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

from kvq.runtime.bundle.manifest import CHAT_TEMPLATE
from kvq.runtime.chat.turns import KEY, Document, Turn, from_metadata, to_metadata
from kvq.runtime.errors import ContextError, PromptError
from kvq.runtime.session.generation import Progress, Response
from kvq.runtime.session.sampling import SamplingOptions
from kvq.runtime.text.template import REPLY

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model
    from kvq.runtime.session.session import Session

# Between a document and what is asked about it: a paragraph of its own.
BREAK = "\n\n"
# What a question may begin with. The tokens of a document that all of them leave as they are can be cached before
# the question is known; "" closes the turn at once.
BEGINNINGS = ("", "What", "what", " what", "1", ".", '"', "\n", "\n\n\nWhat", "\t", "é", "日", "😀")


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

    Attributes:
        messages: {"role", "content"} each, questions and replies in turn.
        turns: where in the session they stand.
        document: what has been read ahead of the next question; None for nothing.

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
        self.document: Document | None = None
        if KEY in session.metadata:
            self.messages, self.turns, self.document = from_metadata(
                session.metadata[KEY], len(session.tokens), session.model.architecture.vocab
            )
            if system is not None:
                raise PromptError("the session holds a conversation, with its own system prompt; leave system out")
        elif session.tokens or session.pending:
            raise PromptError("the session holds tokens, but no conversation; begin with an empty session")
        elif system is not None:
            self.messages.append({"role": "system", "content": system})
        self._remember()

    def read(self, text: str, role: str = "user", progress: Progress | None = None) -> None:
        """Cache a document ahead of the questions about it.

        As the user's it is the beginning of the next question: the turn stays open, and `reply` puts its text behind
        the document, a blank line between them, and closes it. Token ids are those of the whole question; what of the
        document's end depends on how the question begins is left for then. As the system's it is the end of the
        system prompt, before the first question.

        Args:
            text: the document; a further one follows the last.
            role: whose turn it is in, "user" or "system".
            progress: as in `Session.append`; raising there leaves the conversation as it was, with what has been
                cached so far.

        Raises:
            PromptError: no text, another role, or a system prompt after the first turn.
            ContextError: it does not fit into what is left of the context; nothing has changed.
            ChatTemplateError: the template refuses it; nothing has changed.
        """
        if not isinstance(text, str) or not text.strip():
            raise PromptError("the document is empty: give some text")
        messages = self.messages
        if role == "user":
            document = self._opened(text)
            questions = [_joined(document.text, beginning) for beginning in BEGINNINGS]
        elif role != "system":
            raise PromptError(f"a document is in the turn of the user or the system, not of {role!r:.40}")
        elif self.turns or self.document:
            raise PromptError("the system prompt comes first: read it before the first question, or as the user's")
        else:
            before = self.messages[0]["content"] if self.messages else ""
            messages, document = [{"role": "system", "content": _joined(before, text)}], Document("")
            questions = list(BEGINNINGS)
        feeds = [self._feed(messages, document, question) for question in questions]
        held = self.session.tokens
        whole = [[*held[: feed.length], *feed.pending, *feed.ids] for feed in feeds]
        ids = whole[0][: _shared(*whole)]
        same = _shared(held, ids)
        self._check_room(same, len(ids) - same, "the document")
        self._cut(same, [])
        if feeds[0].rewritten:
            self._forget_places()
            document = Document(document.text)
        if ids[same:]:
            self.session.append(ids[same:], progress=progress)
        self.messages, self.document = messages, document if document.text else None
        self._remember()

    def _opened(self, text: str) -> Document:
        """The open turn with a document at its end."""
        if self.document is None:
            return Document(text, len(self.session.tokens), list(self.session.pending))
        return Document(_joined(self.document.text, text), self.document.start, self.document.pending)

    def reply(
        self,
        text: str,
        *,
        cancelled: Callable[[], bool] | None = None,
        progress: Progress | None = None,
        max_tokens: int | None = 512,
        stop: Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        ignore_eos: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[Response]:
        """Answer a question; yields a `Response` per token. Leave the loop to stop: what was said so far stays.

        Args:
            text: the question; with a document before it, it may be "".
            cancelled: asked while a long question is processed; once it says so the question is taken back.
            progress: as in `Session.append`, while the question is processed.
            max_tokens, stop, stop_tokens, ignore_eos, sampling: as `Session.generate`; what ends a reply in the
                chat template is added. With `ignore_eos` its ids end no reply either.

        Raises:
            ContextError: the question does not fit into what is left of the context; nothing has changed.
            ChatTemplateError: the template refuses it; nothing has changed.
            SamplingError: an option is out of range; nothing has changed.
        """
        document = self.document
        question = text if document is None else _joined(document.text, text)
        feed = self._feed(self.messages, document, question)
        if document is None:
            turn = Turn(None if feed.rewritten else feed.length, feed.pending, 0)
        else:  # of which most is cached
            fed = [*feed.pending, *feed.ids]
            same = min(_shared(self.session.tokens[feed.length :], fed), len(fed) - 1)
            start = None if feed.rewritten else feed.length
            turn = Turn(start, feed.pending, 0, len(document.text), feed.length + same)
            feed = Feed(turn.read, [], fed[same:], feed.rewritten)
        turn.prompt = feed.length + len(feed.pending) + len(feed.ids)
        self._check_room(feed.length + len(feed.pending), len(feed.ids), "the question", spare=1)
        responses = self.session.generate(
            feed.ids[self._leading(feed) :],
            max_tokens=max_tokens,
            stop=[*self.template.stop, *stop],
            stop_tokens=[*(() if ignore_eos else self.template.stop_tokens), *stop_tokens],
            ignore_eos=ignore_eos,
            progress=None if progress is None else _behind(progress, self._leading(feed), len(feed.ids)),
            **sampling,
        )
        return self._reply({"role": "user", "content": question}, turn, feed, responses, cancelled, progress)

    def resume(
        self,
        *,
        max_tokens: int | None = 512,
        stop: Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        ignore_eos: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[Response]:
        """Go on with a reply that was cut; yields as `reply`, whose options it takes.

        Raises:
            PromptError: there is no reply, or it has come to its end.
            SamplingError: an option is out of range; nothing has changed.
        """
        if not self.turns or self.document:
            raise PromptError("there is no reply to go on with: ask a question")
        if self._said(len(self.session.tokens), self.session.pending)[2].strip("\ufffd"):
            raise PromptError("the last reply has come to its end: ask the next question")
        responses = self.session.generate(
            None,
            max_tokens=max_tokens,
            stop=[*self.template.stop, *stop],
            stop_tokens=[*(() if ignore_eos else self.template.stop_tokens), *stop_tokens],
            ignore_eos=ignore_eos,
            **sampling,
        )
        return self._told(responses)

    def _leading(self, feed: Feed) -> int:
        """How many tokens of a long question go ahead in whole chunks, with a look at `cancelled` after each."""
        return (len(feed.ids) - 1) // self.session.prefill_chunk * self.session.prefill_chunk

    def _reply(
        self,
        question: dict[str, str],
        turn: Turn,
        feed: Feed,
        responses: Iterator[Response],
        cancelled: Callable[[], bool] | None,
        progress: Progress | None,
    ) -> Iterator[Response]:
        session = self.session
        self._cut(feed.length, feed.pending)
        if feed.rewritten:
            self._forget_places()
        self.messages = [*self.messages, question, {"role": "assistant", "content": ""}]
        self.turns.append(turn)
        self.document = None
        begun, told = False, self._told(responses)
        try:
            for at in range(0, self._leading(feed), session.prefill_chunk):
                chunk = feed.ids[at : at + session.prefill_chunk]
                session.append(chunk, progress=None if progress is None else _behind(progress, at, len(feed.ids)))
                if cancelled is not None and cancelled():
                    return
            for response in told:
                begun = True
                yield response
        finally:
            told.close()
            if not begun:
                self.undo()

    def _told(self, responses: Iterator[Response]) -> Generator[Response, None, None]:
        """Pass responses on, and keep what they say in the last message, however they end."""
        said = [self.messages[-1]["content"]]
        try:
            for response in responses:
                said.append(response.text)
                yield response
        finally:
            self.messages[-1]["content"] = "".join(said)
            self._remember()

    def undo(self) -> None:
        """Take back the last question and its reply, and what has been read since.

        The cache is trimmed to what was there before; a document that was read ahead of the question stays.

        Raises:
            PromptError: there is nothing to take back.
        """
        if not self.turns:
            raise PromptError("nothing to undo: the conversation has no turns yet")
        turn = self.turns.pop()
        question = self.messages[-2]["content"]
        self.messages = self.messages[:-2]
        pending = turn.pending if turn.start is not None else []
        self.document = None
        if turn.document:
            self.document = Document(question[: turn.document], turn.start or 0, pending)
            self._cut(turn.read if turn.start is not None else 0, [])
        else:
            self._cut(turn.start or 0, pending)
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
        self.session.metadata[KEY] = to_metadata(self.messages, self.turns, self.document)

    def _cut(self, length: int, pending: list[int]) -> None:
        """Leave so many tokens in the cache, and these behind it."""
        if length < len(self.session.tokens):
            self.session.trim(length)
        self.session.pending[:] = pending

    def _forget_places(self) -> None:
        """Earlier turns stand in the cache otherwise than they did."""
        for earlier in self.turns:
            earlier.start = None

    def _check_room(self, start: int, tokens: int, what: str, spare: int = 0) -> None:
        """Raise ContextError where the context has no room for so many tokens after `start`, and some to spare."""
        context = self.session.model.architecture.context
        if start + tokens + spare > context:
            raise ContextError(
                f"the context of {context} tokens is full: {what} takes {tokens}, {max(0, context - start)} are left;"
                " drop turns, shorten it, or begin a new conversation"
            )

    def _feed(self, messages: list[dict[str, str]], document: Document | None, question: str) -> Feed:
        """What to append for a question: only what follows the last reply, wherever the template allows it.

        With a document that the question begins with, as if nothing of it had been cached.
        """
        session, template = self.session, self.template
        asked = {"role": "user", "content": question}
        start, pending = len(session.tokens), session.pending
        if document is not None:
            start, pending = document.start, document.pending
        if self.turns and start:
            rest = self._after_last_reply(messages, asked)
            if rest is not None:
                return self._join(rest, start, pending)
        ids = template.encode([*messages, asked])
        same = 0 if document else min(_shared(session.tokens, ids), len(ids) - 1)
        return Feed(same, [], ids[same:], rewritten=bool(self.turns))

    def _after_last_reply(self, messages: list[dict[str, str]], question: dict[str, str]) -> str | None:
        """The text between the last reply and the next, with guards; None if the template rewrites what precedes."""
        *before, reply = messages
        prompt = self.template.render_guarded(before)
        text = self.template.render_guarded([*before, {**reply, "content": REPLY}, question])
        if not text.startswith(prompt):
            return None
        blank, found, rest = text[len(prompt) :].partition(REPLY)
        return rest if found and not blank.strip() and rest else None

    def _said(self, start: int, pending: list[int]) -> tuple[list[int], str, str]:
        """The last reply as it stands before `start` and in `pending`.

        Returns:
            its tokens that were shown, their text, and the text of those behind them: of an end-of-turn token above
            all, of what a stop string has cut, or of bytes of a character that the end has cut.
        """
        said = [*self.session.tokens[self.turns[-1].prompt : start], *pending]
        reply = self.messages[-1]["content"]
        decode = self.tokenizer.decode
        shown = len(said)
        while not reply.startswith(text := decode(said[:shown], skip_special_tokens=False)):
            shown -= 1
        return said[:shown], text, decode(said[shown:], skip_special_tokens=False) if shown < len(said) else ""

    def _join(self, rest: str, start: int, pending: list[int]) -> Feed:
        """How `rest` follows the cached reply, of which the model may have said more than was shown."""
        shown, text, beyond = self._said(start, pending)
        prompt = self.turns[-1].prompt
        rest = self.messages[-1]["content"][len(text) :] + rest
        if not beyond.strip("\ufffd"):
            length, kept = start, list(pending)
        elif rest.startswith(beyond) and len(rest) > len(beyond):
            length, kept, rest = start, list(pending), rest[len(beyond) :]
        elif prompt + len(shown) >= start:  # not cached yet, so there is nothing to take out of the cache
            length, kept = start, shown[start - prompt :]
        else:
            length, kept = prompt + len(shown), []
        return Feed(length, kept, self.template.encode_guarded(rest, beginning=False))


def has_template(model: Model) -> bool:
    """Whether the model's bundle has a chat template of its own: it was trained on conversations."""
    return CHAT_TEMPLATE in model.bundle.manifest.files


def _joined(document: str, text: str) -> str:
    """A document and what follows it in the same turn."""
    return BREAK.join(part for part in (document, text) if part)


def _shared(first: Sequence[int], *others: Sequence[int]) -> int:
    """How many ids all begin with."""
    most = min(map(len, (first, *others)))
    return next((at for at in range(most) if any(other[at] != first[at] for other in others)), most)


def _behind(progress: Progress, before: int, total: int) -> Progress:
    """Progress of a part of the tokens, as that of all of them."""
    return lambda done, _: progress(min(before + done, total), total)
