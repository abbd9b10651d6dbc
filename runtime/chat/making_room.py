"""A conversation in a full context: its oldest turns go, and of a reply that alone takes too much its older half."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvq.runtime.chat.feeds import feed_of
from kvq.runtime.chat.turns import Turn
from kvq.runtime.errors import ContextError, SamplingError
from kvq.runtime.session.shifting import Kept, Shift, TurnShift, most_protected
from kvq.runtime.text.continuing import decoded_behind

if TYPE_CHECKING:
    from kvq.runtime.chat.conversation import Conversation


def made_room(conversation: Conversation, question: str, option: object) -> ReplyShift | bool:
    """Make room for a question, if there is none; returns what makes room for its reply.

    That is nothing where system prompt and question take more than can stay beside a reply, nor are turns dropped for
    a question that has no room without them.

    Raises:
        SamplingError: the option is not true; nothing has changed.
        ChatTemplateError: the template refuses it; nothing has changed.
    """
    shift = ReplyShift(conversation, option)
    context, asked = conversation.session.model.architecture.context, {"role": "user", "content": question}
    tokens = len(conversation.template.encode([*conversation.without(len(conversation.turns)), asked]))
    if conversation.document is None and tokens < context:
        feed = feed_of(conversation.session, conversation.messages, conversation.turns, None, question)
        if feed.length + len(feed.pending) + len(feed.ids) >= context:
            conversation.forget(max(tokens + 1, context // 2, conversation.session.room + 1))
    return shift if tokens <= most_protected(context) else False


class ReplyShift:
    """What stays of a conversation whose reply has filled the context. It tells the conversation what is gone.

    Args:
        conversation: whose session it is.
        option: of `Conversation.reply`.

    Raises:
        SamplingError: the option is not true.
    """

    def __init__(self, conversation: Conversation, option: object) -> None:
        if option is not True:
            raise SamplingError(
                f"context_shift of a conversation is true or false, its system turn stays; got {option!r:.60}"
            )
        self._conversation = conversation

    def __call__(self, ids: Sequence[int], begun: int, newest: int) -> Kept:
        talk, context = self._conversation, self._conversation.session.model.architecture.context
        prompt, turns = talk.turns[-1].prompt, len(talk.turns)

        def refuse() -> Shift:
            raise ContextError(
                f"system prompt and question take too much of the context of {context} tokens to go on; begin a new"
                " conversation"
            )

        shift = TurnShift(lambda dropped: talk.template.encode(talk.without(dropped)[:-1]), turns - 1, context, refuse)
        kept = shift(ids, prompt, newest)
        gone = len(ids) - prompt - (len(kept.ids) - kept.begun)
        gone, text = self._whole(ids[prompt:], ids[:prompt], gone)
        kept = Kept([*kept.ids[: kept.begun], *ids[prompt + gone :]], kept.begun)
        talk.messages, talk.lost = talk.without(shift.dropped), talk.lost + len(text)
        talk.messages[-1]["content"] = talk.messages[-1]["content"][len(text) :]
        talk.forgotten += shift.dropped
        talk.turns = [Turn(None, [], 0) for _ in range(turns - shift.dropped)]
        talk.turns[-1].prompt = kept.begun
        talk.remember()
        return kept

    def _whole(self, reply: Sequence[int], before: Sequence[int], gone: int) -> tuple[int, str]:
        """So many tokens of a reply, or some more that end with a whole character; what they say."""
        text, tokenizer = "", self._conversation.tokenizer
        while gone:
            text = decoded_behind(tokenizer, before, reply[:gone])
            if not text.endswith("\ufffd") or gone == len(reply) - 1:
                break
            gone += 1
        return gone, text
