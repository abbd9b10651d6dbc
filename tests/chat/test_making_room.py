"""A reply longer than what is left of the context: turns go while it is given, and the conversation goes on."""

from __future__ import annotations

import pytest

from kvq.runtime.chat.conversation import Conversation
from kvq.runtime.errors import ContextError, SamplingError
from tests.tools.chats import cached, said, spelled

GREEDY = {"temperature": 0.0, "ignore_eos": True, "context_shift": True}


def talk(model, turns):
    conversation = Conversation(model.session("fp16"), "Be brief.")
    for turn in range(turns):
        said(conversation.reply(f"Question {turn}?", max_tokens=6, **GREEDY))
    return conversation


def begun_with(model, messages, reply):
    """A session that has only ever held these messages and the beginning of a reply, in the tokens it was said in."""
    session = model.session("fp16")
    session.append([*model.chat_template.encode(messages), *reply])
    return session


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_the_oldest_turns_go_while_a_reply_is_given(every, name):
    model = every[name]
    conversation = talk(model, 3)
    before, context = conversation.messages, model.architecture.context
    responses = list(conversation.reply("Tell me.", max_tokens=context, **GREEDY))
    shifts = conversation.session.shifts
    assert responses[-1].finish_reason == "length"
    assert len(responses) == context
    assert shifts.times >= 2  # turns first, then the reply's own beginning
    assert conversation.forgotten == 3
    assert conversation.lost > 0
    assert conversation.messages[0] == before[0]
    assert conversation.messages[1:-1] == [{"role": "user", "content": "Tell me."}]
    whole = "".join(response.text for response in responses)
    kept = conversation.messages[-1]["content"]
    assert whole.endswith(kept)
    assert 0 < len(kept) < len(whole)
    # What is cached is the template over the messages that are left, and the next question follows on it.
    prompt = model.chat_template.encode(conversation.messages[:-1])
    held = [*conversation.session.tokens, *conversation.session.pending]
    assert held[: len(prompt)] == prompt
    assert held[len(prompt) :] == [response.token for response in responses][-(len(held) - len(prompt)) :]
    said(conversation.reply("And now?", max_tokens=4, **GREEDY))
    assert conversation.messages[-2]["content"] == "And now?"
    conversation.undo()
    assert conversation.messages[-1]["content"] in (kept, "Be brief.")


@pytest.mark.slow
def test_what_is_said_then_is_what_the_shorter_conversation_would_say(every):
    model = every["chatml"]
    conversation = talk(model, 4)
    tokens, texts = [], conversation.messages
    for response in conversation.reply("Tell me.", max_tokens=200, **GREEDY):
        tokens.append(response.token)
        if conversation.session.shifts.times and len(conversation.messages) != len(texts) + 2:
            break
    left, reply = conversation.messages[:-1], tokens[:-1]
    fresh = begun_with(model, left, reply)
    expected = [r.token for r in fresh.generate(None, max_tokens=1, temperature=0.0, ignore_eos=True)]
    assert tokens[-1:] == expected
    assert conversation.session.tokens == fresh.tokens


@pytest.mark.slow
def test_sixty_questions_run_through_a_small_context(every, tmp_path):
    conversation = talk(every["chatml"], 0)
    for turn in range(30):
        question = f"Question {turn}?"
        said(conversation.reply(question, max_tokens=8, **GREEDY))
        assert conversation.messages[0]["content"] == "Be brief."
        assert conversation.messages[-2]["content"] == question
    assert conversation.session.stats().context_shifts >= 2
    assert cached(conversation).startswith(spelled(conversation, "x")[:20])
    conversation.session.save(tmp_path / "talk.kvq")
    again = Conversation(every["chatml"].load_session(tmp_path / "talk.kvq"))
    one = said(conversation.reply("And?", max_tokens=40, **GREEDY))
    assert said(again.reply("And?", max_tokens=40, **GREEDY)) == one


@pytest.mark.slow
def test_a_question_too_long_to_stay_has_what_is_free_behind_it(every):
    """Turns go for it, but there is nothing to go on with once the rest is full, too."""
    conversation, context = talk(every["chatml"], 3), every["chatml"].architecture.context
    system, question = conversation.messages[0], "a " * 205
    asked = len(conversation.template.encode([system, {"role": "user", "content": question}]))
    responses = list(conversation.reply(question, max_tokens=context, **GREEDY))
    assert responses[-1].finish_reason == "context"
    assert asked + len(responses) == context + 1
    assert conversation.messages[:-1] == [system, {"role": "user", "content": question}]
    assert conversation.forgotten == 3


def test_a_question_that_never_fits_and_another_value_are_refused(every):
    conversation = talk(every["chatml"], 1)
    messages = conversation.messages
    with pytest.raises(ContextError, match="the question takes"):
        conversation.reply("a " * 300, **GREEDY)
    assert conversation.messages == messages
    conversation.undo()
    with pytest.raises(SamplingError, match="true or false"):
        conversation.reply("Hello", **{**GREEDY, "context_shift": 7})
    assert len(conversation.messages) == 1
