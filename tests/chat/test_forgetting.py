"""A conversation longer than its context: the oldest turns go, and what is left is what a shorter one would be."""

from __future__ import annotations

import pytest

from kvq.runtime.chat.conversation import Conversation
from kvq.runtime.errors import ContextError, PromptError

GREEDY = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True}


def ask(conversation, text, **options):
    return "".join(response.text for response in conversation.reply(text, **{**GREEDY, **options}))


def talk(model, turns, system="Be brief.", **settings):
    conversation = Conversation(model.session("fp16", **settings), system)
    for turn in range(turns):
        ask(conversation, f"Question {turn}?")
    return conversation


def begun_with(model, messages):
    """A conversation that has only ever had these messages, in token ids as the template has them."""
    template = model.chat_template
    prompt = template.encode(messages[:-1])
    return prompt + template.encode_guarded(template.guarded(messages[-1]["content"]), False, prompt[-1])


@pytest.mark.parametrize("system", ["Be brief.", None])
@pytest.mark.parametrize("kept", [1, 2, 4])
def test_what_is_left_is_what_a_shorter_conversation_would_be(tiny_model, system, kept):
    conversation = talk(tiny_model, 5, system)
    context, messages = tiny_model.architecture.context, conversation.messages
    first = len(messages) % 2
    left = [*messages[:first], *messages[-2 * kept :]]
    dropped = conversation.forget(context - len(begun_with(tiny_model, left)))
    assert dropped == 5 - kept
    assert conversation.messages == left
    assert conversation.session.tokens == begun_with(tiny_model, left)
    assert conversation.session.pending == []
    fresh = tiny_model.session("fp16")
    fresh.append(conversation.session.tokens)
    expected = "".join(r.text for r in fresh.generate(None, max_tokens=4, temperature=0.0, ignore_eos=True))
    assert (
        "".join(
            r.text for r in conversation.session.fork().generate(None, max_tokens=4, temperature=0.0, ignore_eos=True)
        )
        == expected
    )


def test_it_goes_on_and_back_afterwards(tiny_model, tmp_path):
    conversation = talk(tiny_model, 5)
    conversation.forget(tiny_model.architecture.context - 60)
    kept = len(conversation.turns)
    answer = ask(conversation, "And now?")
    conversation.session.save(tmp_path / "talk.kvq")
    again = Conversation(tiny_model.load_session(tmp_path / "talk.kvq"))
    assert again.messages == conversation.messages
    for each in (conversation, again):
        each.undo()
        assert len(each.turns) == kept
    assert ask(again, "And now?") == ask(conversation, "And now?") == answer
    for _ in range(kept + 1):
        conversation.undo()
    assert ask(conversation, "Anew?") == ask(talk(tiny_model, 0), "Anew?")


def test_there_is_room_already_or_nothing_to_forget(tiny_model):
    conversation = talk(tiny_model, 2)
    tokens = list(conversation.session.tokens)
    assert conversation.forget(10) == 0
    assert conversation.session.tokens == tokens
    assert talk(tiny_model, 0).forget(10**6) == 0
    assert conversation.forget(10**6) == 2
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    assert ask(conversation, "Hello") == ask(talk(tiny_model, 0), "Hello")


def test_a_document_that_waits_for_its_question_is_not_forgotten(tiny_model):
    conversation = talk(tiny_model, 2)
    conversation.read("A document.")
    assert conversation.forget(10**6) == 0
    with pytest.raises(PromptError, match="document"):
        conversation.set_system("x")
    assert ask(conversation, "What is it?") is not None


def test_a_reply_that_filled_the_context_goes_on(tiny_model):
    conversation = talk(tiny_model, 3)
    responses = list(conversation.reply("Tell me.", max_tokens=None, temperature=0.0, ignore_eos=True))
    assert responses[-1].finish_reason == "context"
    said = conversation.messages[-1]["content"]
    assert conversation.forget(30) > 0
    more = "".join(r.text for r in conversation.resume(max_tokens=5, temperature=0.0, ignore_eos=True))
    assert conversation.messages[-1]["content"] == said + more
    assert more


def test_another_system_prompt(tiny_model):
    conversation = talk(tiny_model, 2)
    behind = conversation.messages[1:]
    conversation.set_system("Speak as a pirate.")
    assert conversation.messages == [{"role": "system", "content": "Speak as a pirate."}, *behind]
    assert conversation.session.tokens == begun_with(tiny_model, conversation.messages)
    conversation.set_system(None)
    assert conversation.messages == behind
    with pytest.raises(ContextError):
        conversation.set_system("word " * 500)
    assert conversation.messages == behind
    assert len(conversation.turns) == 2


def test_an_answer_is_given_again(tiny_model):
    conversation = talk(tiny_model, 1)
    first = ask(conversation, "Who?", temperature=1.5, seed=1)
    tokens = list(conversation.session.tokens)
    again = "".join(r.text for r in conversation.regenerate(**{**GREEDY, "temperature": 1.5, "seed": 1}))
    assert again == first
    assert conversation.session.tokens == tokens
    other = {
        "".join(r.text for r in conversation.regenerate(**{**GREEDY, "temperature": 2.0, "seed": s})) for s in range(5)
    }
    assert len(other) > 1
    assert len(conversation.turns) == 2
    with pytest.raises(PromptError, match="no turns yet"):
        talk(tiny_model, 0).regenerate()


def test_an_answer_about_a_document_is_given_again(tiny_model):
    conversation = talk(tiny_model, 0)
    conversation.read("The lease ends in May.")
    first = ask(conversation, "When?")
    assert "".join(r.text for r in conversation.regenerate(**GREEDY)) == first
    assert conversation.messages[-2]["content"] == "The lease ends in May.\n\nWhen?"


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["int8", "int4"])
def test_three_hundred_turns_run_through_a_small_context(tiny_model, policy):
    conversation = Conversation(tiny_model.session(policy), "Be brief.")
    context, forgotten = tiny_model.architecture.context, 0
    for turn in range(300):
        question = f"Question {turn}?"
        if conversation.session.room < 40:
            forgotten += conversation.forget(context // 2)
        list(conversation.reply(question, **GREEDY))
        assert conversation.messages[0]["content"] == "Be brief."
        assert conversation.messages[-2]["content"] == question
    assert forgotten + len(conversation.turns) == 300
    assert forgotten > 250
