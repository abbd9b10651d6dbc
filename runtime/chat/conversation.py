"""A conversation on one session: every turn appends what is new, and nothing is processed twice."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Unpack

from kvq.runtime.bundle.manifest import CHAT_TEMPLATE
from kvq.runtime.chat.documents import BEGINNINGS, BREAK, joined
from kvq.runtime.chat.feeds import Feed, feed_of, said, shared
from kvq.runtime.chat.making_room import ReplyShift, made_room
from kvq.runtime.chat.reply import OneReply, behind, ends_reply, telling
from kvq.runtime.chat.turns import KEY, Document, Turn, check_identity, from_metadata, identity_of, to_metadata
from kvq.runtime.errors import ContextError, PromptError
from kvq.runtime.keywords import named_keywords
from kvq.runtime.session.generation import GenerationOptions, Progress, Response, ending_as
from kvq.runtime.session.shifting import least_dropped

if TYPE_CHECKING:
    from kvq.runtime.session.model import Model
    from kvq.runtime.session.session import Session

MAX_TOKENS = 512  # of a reply, if not given


class ReplyOptions(GenerationOptions, total=False):
    """The keyword options of `Conversation.reply`."""

    cancelled: Callable[[], bool] | None


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
        forgotten: turns that had to make room since it was made.
        lost: characters of the last reply that had to make room.

    Raises:
        PromptError: the session holds tokens but no conversation, one that was written with another chat template, or
            `system` is given besides one.
        ChatTemplateError: the bundle's chat template is not valid.
        TokenizerError: the bundle has no tokenizer.
    """

    def __init__(self, session: Session, system: str | None = None) -> None:
        self.session = session
        self.template = session.model.chat_template
        self.tokenizer = session.model.tokenizer
        self._identity = identity_of(
            self.template.source, self.template.special_tokens, session.model.bundle.manifest.eos_token_ids
        )
        self.messages: list[dict[str, str]] = []
        self.turns: list[Turn] = []
        self.document: Document | None = None
        self.forgotten = self.lost = 0
        self.one_reply = OneReply()
        if KEY in session.metadata:
            check_identity(session.metadata[KEY], self._identity)
            self.messages, self.turns, self.document = from_metadata(
                session.metadata[KEY], len(session.tokens), session.model.architecture.vocab
            )
            if system is not None:
                raise PromptError("the session holds a conversation, with its own system prompt; leave system out")
        elif session.tokens or session.pending:
            raise PromptError("the session holds tokens, but no conversation; begin with an empty session")
        elif system is not None:
            self.messages.append({"role": "system", "content": system})
        self.remember()

    def __repr__(self) -> str:
        turns, session = len(self.turns), self.session
        ahead = " and a document" if self.document else ""
        return (
            f"<kvq.Conversation with {session.model.bundle.manifest.name}: {turns} turn{'s' * (turns != 1)}{ahead},"
            f" {len(session.tokens)} of {session.model.architecture.context} tokens>"
        )

    @ends_reply
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
            questions = [joined(document.text, beginning) for beginning in BEGINNINGS]
        elif role != "system":
            raise PromptError(f"a document is in the turn of the user or the system, not of {role!r:.40}")
        elif self.turns or self.document:
            raise PromptError("the system prompt comes first: read it before the first question, or as the user's")
        else:
            before = self.messages[0]["content"] if self.messages else ""
            messages, document = [{"role": "system", "content": joined(before, text)}], Document("")
            questions = list(BEGINNINGS)
        feeds = [feed_of(self.session, messages, self.turns, document, question) for question in questions]
        held = self.session.tokens
        whole = [[*held[: feed.length], *feed.pending, *feed.ids] for feed in feeds]
        ids = whole[0][: shared(*whole)]
        same = shared(held, ids)
        self._check_room(same, len(ids) - same, "the document")
        self._cut(same, [])
        if feeds[0].rewritten:
            self._forget_places()
            document = Document(document.text)
        if ids[same:]:
            self.session.append(ids[same:], progress=progress)
        self.messages, self.document = messages, document if document.text else None
        self.remember()

    def _opened(self, text: str) -> Document:
        """The open turn with a document at its end."""
        if self.document is None:
            return Document(text, len(self.session.tokens), list(self.session.pending))
        return Document(joined(self.document.text, text), self.document.start, self.document.pending)

    @named_keywords(ReplyOptions)
    @ends_reply
    def reply(self, text: str, **options: Unpack[ReplyOptions]) -> Generator[Response, None, None]:
        """Answer a question; yields a `Response` per token. Leave the loop to stop: what was said so far stays.

        Args:
            text: the question; with a document before it, it may be "".
            cancelled: asked while a long question is processed; once it says so the question is taken back.
            progress: as in `Session.append`, while the question is processed.
            max_tokens: most tokens of the reply, 512 if not given.
            context_shift: true makes room in a full context: the oldest turns go, of a reply that alone takes too much
                its older half; the system prompt stays. See `kvq.runtime.chat.making_room`.
            stop, stop_tokens, ignore_eos and all others: as `Session.generate`; what ends a reply in the chat template
                is added. With `ignore_eos` its ids end no reply either.

        Raises:
            ContextError: the question does not fit into what is left of the context; nothing has changed.
            ChatTemplateError: the template refuses it; nothing has changed.
            SamplingError, GrammarError: an option is out of range; nothing has changed.
            OptionError: an option that there is not.
        """
        cancelled, progress = options.pop("cancelled", None), options.pop("progress", None)
        document = self.document
        question = text if document is None else joined(document.text, text)
        if options.get("context_shift"):
            options["context_shift"] = made_room(self, question, options["context_shift"])
        feed = feed_of(self.session, self.messages, self.turns, document, question)
        if document is None:
            turn = Turn(None if feed.rewritten else feed.length, feed.pending, 0)
        else:  # of which most is cached
            fed = [*feed.pending, *feed.ids]
            same = min(shared(self.session.tokens[feed.length :], fed), len(fed) - 1)
            start = None if feed.rewritten else feed.length
            turn = Turn(start, feed.pending, 0, len(document.text), feed.length + same)
            feed = Feed(turn.read, [], fed[same:], feed.rewritten)
        turn.prompt = feed.length + len(feed.pending) + len(feed.ids)
        self._check_room(feed.length + len(feed.pending), len(feed.ids), "the question", spare=1)
        leading = feed.leading(self.session.prefill_chunk)
        responses = self._responses(feed.ids[leading:], behind(progress, leading, len(feed.ids)), options)
        asked = {"role": "user", "content": question}
        return self.one_reply.of(self._reply(asked, turn, feed, responses, cancelled, progress))

    @named_keywords(GenerationOptions)
    @ends_reply
    def resume(self, **options: Unpack[GenerationOptions]) -> Generator[Response, None, None]:
        """Go on with a reply that was cut; yields as `reply`, whose options it takes.

        Raises:
            PromptError: there is no reply, or it has come to its end.
            SamplingError: an option is out of range; nothing has changed.
        """
        if not self.turns or self.document:
            raise PromptError("there is no reply to go on with: ask a question")
        if not self.turns[-1].prompt:  # it went when the template rewrote it for a turn that is gone
            self._process_again(self.messages, self.turns)
        session, reply = self.session, self.messages[-1]["content"]
        if said(session, self.turns[-1], reply, len(session.tokens), session.pending).beyond.strip("\ufffd"):
            raise PromptError("the last reply has come to its end: ask the next question")
        if options.get("context_shift"):
            options["context_shift"] = ReplyShift(self, options["context_shift"])
        return self.one_reply.of(telling(self, self._responses(None, options.pop("progress", None), options)))

    def _responses(
        self, ids: Sequence[int] | None, progress: Progress | None, options: GenerationOptions
    ) -> Iterator[Response]:
        """As `Session.generate`; what ends a reply in the chat template ends this one too."""
        options |= ending_as(self.template, options)  # type: ignore[typeddict-item]
        options.setdefault("max_tokens", MAX_TOKENS)
        options["progress"] = progress
        return self.session.generate(ids, **options)

    def _reply(
        self,
        question: dict[str, str],
        turn: Turn,
        feed: Feed,
        responses: Iterator[Response],
        cancelled: Callable[[], bool] | None,
        progress: Progress | None,
    ) -> Generator[Response, None, None]:
        session = self.session
        self._cut(feed.length, feed.pending)
        if feed.rewritten:
            self._forget_places()
        self.messages = [*self.messages, question, {"role": "assistant", "content": ""}]
        self.turns.append(turn)
        self.document = None
        begun, told = False, telling(self, responses)
        try:
            for at in range(0, feed.leading(session.prefill_chunk), session.prefill_chunk):
                chunk = feed.ids[at : at + session.prefill_chunk]
                session.append(chunk, progress=behind(progress, at, len(feed.ids)))
                if cancelled is not None and cancelled():
                    return
            for response in told:
                begun = True
                yield response
        finally:
            told.close()
            if not begun:
                self._undo()

    @ends_reply
    def undo(self) -> None:
        """Take back the last question and its reply, and what has been read since.

        The cache is trimmed to what was there before; a document that was read ahead of the question stays.

        Raises:
            PromptError: there is nothing to take back.
        """
        if not self.turns:
            raise PromptError("nothing to undo: the conversation has no turns yet")
        self._undo()

    def _undo(self) -> None:
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
        self.remember()

    @ends_reply
    def regenerate(self, **options: Unpack[ReplyOptions]) -> Generator[Response, None, None]:
        """Take back the last reply and answer its question again; yields as `reply`, whose options it takes.
        Its window is computed anew from what is stored, so it may be another one even at temperature 0 or of a seed.

        Raises:
            PromptError: there is nothing to take back.
        """
        if not self.turns:
            raise PromptError("nothing to answer again: the conversation has no turns yet")
        question, ahead = self.messages[-2]["content"], self.turns[-1].document
        self._undo()
        return self.reply(question[ahead:].removeprefix(BREAK) if ahead else question, **options)

    @ends_reply
    def set_system(self, system: str | None) -> None:
        """Another system prompt, or none; the conversation behind it is processed again.

        Raises:
            PromptError: a document has been read and not asked about.
            ContextError: the conversation does not fit behind it; nothing has changed.
            ChatTemplateError: the template refuses it; nothing has changed.
        """
        if self.document is not None:
            raise PromptError("ask about the document first, or begin a new conversation")
        behind = self.messages[len(self.messages) % 2 :]
        self._process_again(([] if system is None else [{"role": "system", "content": system}]) + behind, self.turns)

    def forget(self, room: int) -> int:
        """Drop the oldest turns until there is room for so many tokens; the system prompt stays.

        What is left is processed again, as the chat template has it: its text is what it would be in a conversation
        that began with it. A reply that was cut can be gone on with by `resume`.

        Args:
            room: tokens of the context.

        Returns:
            How many turns are gone: none where there is the room, or where a document has been read and not asked
            about; all where even the last one takes too much.
        """
        if not self.turns or self.document is not None or self.session.room >= room:
            return 0  # and a reply goes on
        return self._forget(room)

    @ends_reply
    def _forget(self, room: int) -> int:
        context = self.session.model.architecture.context

        def fits(dropped: int) -> bool:
            return sum(map(len, self._fed(self.without(dropped)))) + room <= context

        dropped, held = least_dropped(1, len(self.turns), fits), context - self.session.room
        self._process_again(self.without(dropped), self.turns[dropped:])
        self.session.shifts.add(held - len(self.session.tokens))
        self.forgotten += dropped
        return dropped

    def without(self, turns: int) -> list[dict[str, str]]:
        """The messages but those of so many of the oldest turns."""
        first = len(self.messages) % 2
        return [*self.messages[:first], *self.messages[first + 2 * turns :]]

    def _fed(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        """Token ids up to the last reply, and of that reply."""
        prompt = self.template.encode(messages[:-1])
        reply = self.template.guarded(messages[-1]["content"])
        return prompt, self.template.encode_guarded(reply, beginning=False, before=prompt[-1]) if reply else []

    def _process_again(self, messages: list[dict[str, str]], turns: list[Turn]) -> None:
        """Make these the conversation, and cache them as the template has them, up to the end of the last reply."""
        prompt, reply = self._fed(messages) if turns else ([], [])
        self._check_room(0, len(prompt) + len(reply), "the conversation")
        ids = prompt + reply
        same = min(shared(self.session.tokens, ids), max(0, len(ids) - 1))
        self._cut(same, [])
        if ids[same:]:
            self.session.append(ids[same:])
        self.messages = messages
        self.turns = [Turn(None, [], 0) for _ in turns]
        if self.turns:
            self.turns[-1].prompt = len(prompt)
        self.remember()

    @ends_reply
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
        self.remember()

    def remember(self) -> None:
        """Have the session's metadata say what the conversation is."""
        self.session.metadata[KEY] = to_metadata(self.messages, self.turns, self.document, self._identity)

    def _cut(self, length: int, pending: list[int]) -> None:
        """Leave so many tokens in the cache, and these behind it."""
        if length < len(self.session.tokens):
            self.session.trim(length)
        self.session.pending[:] = pending

    def _forget_places(self) -> None:
        """Earlier turns stand in the cache otherwise than they did, or not any more."""
        for earlier in self.turns:
            earlier.start, earlier.prompt = None, 0
        self.remember()

    def _check_room(self, start: int, tokens: int, what: str, spare: int = 0) -> None:
        """Raise ContextError where the context has no room for so many tokens after `start`, and some to spare."""
        context = self.session.model.architecture.context
        if start + tokens + spare > context:
            raise ContextError(
                f"the context of {context} tokens is full: {what} takes {tokens}, {max(0, context - start)} are left;"
                " drop turns, shorten it, or begin a new conversation"
            )


def has_template(model: Model) -> bool:
    """Whether the model's bundle has a chat template of its own: it was trained on conversations."""
    return CHAT_TEMPLATE in model.bundle.manifest.files
