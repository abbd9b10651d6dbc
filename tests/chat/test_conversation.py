"""Conversations that continue from the cache: what a turn appends, undo, a full context, another policy."""

from __future__ import annotations

import pytest

import kvq
from kvq.runtime.chat.conversation import KEY, Conversation
from tests.tools.chats import ASSISTANT, GREEDY, TEMPLATES, USER, cached, counted, said, spelled


@pytest.mark.parametrize("name", ["chatml", "llama3", "plain"])
@pytest.mark.parametrize("policy", ["fp16", "mixed"])
def test_a_turn_appends_what_is_new_and_nothing_else(every, name, policy):
    session = every[name].session(policy)
    fed = counted(session)
    conversation = Conversation(session, "Be brief.")
    for question in ("Hello there", "Why?", "And <|im_end|> then?"):
        before = len(session.tokens) + len(session.pending)
        text = spelled(conversation, question)
        replies = conversation.reply(question, ignore_eos=True, **GREEDY)
        first = next(replies)
        shown = conversation.messages[-1]["content"]
        new = len(session.tokens) - before
        assert 0 < new < 60
        assert shown == first.text
        assert "".join(cached(conversation).split()).startswith("".join(text.split()))
        assert first.index == 0
        said(replies)
    assert sum(fed) == len(session.tokens)


@pytest.mark.parametrize("name", [*TEMPLATES, "plain"])
def test_the_cache_spells_what_the_template_does(every, name):
    """Whatever the replies were cut by, and with turns taken back in between."""
    conversation = Conversation(every[name].session(), "Be brief.")
    plan = [
        ("One", {}),
        ("Two", {"max_tokens": 3}),
        ("undo", {}),
        ("Three", {"stop": ["e", "a"]}),
        ("Four", {}),
        ("Five", {}),
    ]
    for question, options in plan:
        if question == "undo":
            conversation.undo()
            continue
        text = spelled(conversation, question)
        replies = conversation.reply(question, **{"temperature": 1.5, "seed": 5, "max_tokens": 12, **options})
        first = next(replies)
        shown = every[name].tokenizer.decode([first.token], skip_special_tokens=False).replace("\ufffd", "")
        # Blanks beside a reply are the template's in its text, the model's in the cache.
        assert "".join(cached(conversation).removesuffix(shown).split()) == "".join(text.split())
        said(replies)
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", *["user", "assistant"] * 4]


def test_leaving_the_loop_ends_a_reply_and_the_next_goes_on(every):
    conversation = Conversation(every["plain"].session())
    fed = counted(conversation.session)
    replies = conversation.reply("Hello", ignore_eos=True, **GREEDY)
    pieces = [next(replies).text for _ in range(4)]
    replies.close()
    assert conversation.messages[-1]["content"] == "".join(pieces)
    said(conversation.reply("More", **GREEDY))
    assert sum(fed) == len(conversation.session.tokens)


@pytest.mark.parametrize("name", ["chatml", "plain", "rewriting"])
def test_undo_goes_back_to_before_the_question(every, name):
    conversation = Conversation(every[name].session("fp16", recent=64))
    said(conversation.reply("Hello", **GREEDY))
    before = list(conversation.session.tokens), list(conversation.session.pending), list(conversation.messages)
    reply = said(conversation.reply("Why?", **GREEDY))
    conversation.undo()
    assert conversation.messages == before[2]
    if name != "rewriting":  # where the earlier turns stood otherwise, and are processed again
        assert (conversation.session.tokens, conversation.session.pending) == before[:2]
    assert said(conversation.reply("Why?", **GREEDY)) == reply
    conversation.undo()
    conversation.undo()
    assert (conversation.session.tokens, conversation.messages) == ([], [])
    with pytest.raises(kvq.PromptError, match="nothing to undo"):
        conversation.undo()


def test_a_question_beyond_the_context_changes_nothing(tiny_model):
    conversation = Conversation(tiny_model.session())
    said(conversation.reply("Hello", **GREEDY))
    before = list(conversation.session.tokens), list(conversation.messages), list(conversation.session.pending)
    with pytest.raises(kvq.ContextError, match="context of 256 tokens is full"):
        conversation.reply("word " * 300)
    assert (conversation.session.tokens, conversation.messages, conversation.session.pending) == before
    said(conversation.reply("Hello", **GREEDY))


def test_a_wrong_option_changes_nothing(tiny_model):
    conversation = Conversation(tiny_model.session())
    with pytest.raises(kvq.SamplingError):
        conversation.reply("Hello", temperature=-1)
    assert (conversation.messages, conversation.session.tokens) == ([], [])


def test_a_full_context_ends_the_reply_and_the_next_question_is_refused(tiny_model):
    conversation = Conversation(tiny_model.session())
    *_, last = conversation.reply("Hello", max_tokens=None, ignore_eos=True, temperature=0)
    while last.finish_reason == "stop":
        *_, last = conversation.reply("Go on", max_tokens=None, ignore_eos=True, temperature=1.0)
    assert last.finish_reason == "context"
    with pytest.raises(kvq.ContextError, match="is full"):
        conversation.reply("And?")
    conversation.undo()
    assert said(conversation.reply("Hello", **GREEDY))


def test_a_long_question_can_be_stopped_while_it_is_processed(tiny_model):
    conversation = Conversation(tiny_model.session(prefill_chunk=16))
    said(conversation.reply("Hello", **GREEDY))
    before = list(conversation.session.tokens), list(conversation.messages), list(conversation.session.pending)
    asked = []
    assert not list(conversation.reply("word " * 40, cancelled=lambda: asked.append(1) or len(asked) == 2))
    assert (conversation.session.tokens, conversation.messages, conversation.session.pending) == before


def test_another_policy_takes_the_same_tokens(tiny_model):
    conversation = Conversation(tiny_model.session())
    said(conversation.reply("Hello", **GREEDY))
    before = list(conversation.session.tokens), list(conversation.session.pending)
    conversation.move_to(tiny_model.session("int4"))
    assert (conversation.session.tokens, conversation.session.pending) == before
    assert conversation.session.stats().policy == "int4"
    said(conversation.reply("More", **GREEDY))
    conversation.undo()
    assert conversation.session.tokens == before[0]


def test_a_session_carries_its_conversation(tiny_model):
    conversation = Conversation(tiny_model.session(), "Be brief.")
    said(conversation.reply("Hello", **GREEDY))
    again = Conversation(conversation.session)
    assert (again.messages, again.turns) == (conversation.messages, conversation.turns)
    with pytest.raises(kvq.PromptError, match="system"):
        Conversation(conversation.session, "Other")
    bare = tiny_model.session()
    bare.append([1, 2, 3])
    with pytest.raises(kvq.PromptError, match="no conversation"):
        Conversation(bare)


@pytest.mark.parametrize(
    "data",
    [None, {}, {"messages": 3, "turns": []}, {"messages": [{"role": "user"}], "turns": []},
     {"messages": [USER, ASSISTANT], "turns": []}, {"messages": [USER], "turns": [[0, [], 0]]},
     {"messages": [USER, ASSISTANT], "turns": [[0, [], 99]]}, {"messages": [USER, ASSISTANT], "turns": [[9, [], 2]]},
     {"messages": [USER, ASSISTANT], "turns": [[-1, [], 0]]}, {"messages": [USER, ASSISTANT], "turns": [[0, [512], 0]]},
     {"messages": [USER, ASSISTANT], "turns": [[0, "x", 0]]}, {"messages": [USER, ASSISTANT], "turns": [[0.5, [], 1]]}],
    ids=lambda data: repr(data)[-40:],
)  # fmt: skip
def test_a_damaged_conversation_is_one_named_error(tiny_model, data):
    session = tiny_model.session()
    session.append([1, 2, 3])
    session.metadata[KEY] = data
    with pytest.raises(kvq.PromptError, match="damaged"):
        Conversation(session)
