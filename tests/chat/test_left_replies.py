"""Replies that are left, in whatever way: messages, cache and what is saved agree at any time."""

from __future__ import annotations

import asyncio
import gc
import random
import re
import threading
import weakref

import pytest

import kvq
from kvq.runtime.chat.conversation import KEY, Conversation
from tests.tools.chats import SPECIAL, cached, said

OPTIONS = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
MARKS = re.compile("|".join(re.escape(mark) for marks in SPECIAL.values() for mark in marks))
NAMES = ["chatml", "llama3", "rewriting", "plain"]


def left(conversation, question="Hello", tokens=3, **options):
    """A reply of which so many tokens have been said, still bound to a name."""
    replies = conversation.reply(question, **{**OPTIONS, **options})
    text = "".join(next(replies).text for _ in range(tokens))
    return replies, text


def state(conversation):
    session = conversation.session
    return list(session.tokens), list(session.pending), [*map(dict, conversation.messages)]


def remembered(conversation):
    """Messages as the session's metadata has them."""
    return conversation.session.metadata[KEY]["messages"]


def squeezed(text):
    """Without blanks, which beside a reply are the model's in the cache, and marks, which a reply does not show."""
    return "".join(MARKS.sub("", text.replace("\ufffd", "")).split())


def check(conversation):
    """The cache spells the conversation, and the metadata says the same.

    Of the last reply it may lack what the next question brings again: a token that came when the context was full, or
    what followed an incomplete character before a question that was taken back.
    """
    messages = conversation.messages
    assert remembered(conversation) == messages
    if not conversation.turns or conversation.document is not None or not conversation.turns[-1].prompt:
        return
    asked, held = squeezed(conversation.template.render(messages[:-1])), squeezed(cached(conversation))
    whole = asked + squeezed(messages[-1]["content"])
    assert held.startswith(asked)
    assert held.startswith(whole) or whole.startswith(held)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("then", ["reply", "undo", "regenerate", "resume", "read", "set_system", "forget", "move_to"])
def test_what_follows_a_reply_left_but_bound_is_what_follows_a_closed_one(every, name, then):
    found = []
    for close in (True, False):
        conversation = Conversation(every[name].session("fp16"), "Be brief.")
        said(conversation.reply("First", **OPTIONS))
        replies, text = left(conversation)
        if close:
            replies.close()
        if then == "reply":
            said(conversation.reply("And?", **OPTIONS))
        elif then in ("regenerate", "resume"):
            said(getattr(conversation, then)(**OPTIONS))
        else:
            argument = {"read": "A text.", "set_system": "Else.", "forget": conversation.session.room + 1}.get(then)
            argument = every[name].session("int8") if then == "move_to" else argument
            getattr(conversation, then)(*[] if argument is None else [argument])
        check(conversation)
        kept = state(conversation)
        assert next(replies, None) is None  # it has ended
        replies.close()
        assert state(conversation) == kept
        assert remembered(conversation) == kept[2]
        found.append(kept)
        if then in ("reply", "read", "move_to"):
            assert {"role": "assistant", "content": text} in kept[2]
    assert found[0] == found[1]


def test_a_reply_that_is_closed_late_changes_nothing(tiny_model):
    conversation = Conversation(tiny_model.session())
    replies, first = left(conversation)
    second = said(conversation.reply("Why?", **OPTIONS))
    said(conversation.reply("And?", **OPTIONS))
    before = state(conversation)
    replies.close()
    del replies
    gc.collect()
    assert state(conversation) == before
    assert [m["content"] for m in conversation.messages if m["role"] == "assistant"][:2] == [first, second]
    check(conversation)


def test_a_reply_asked_for_before_another_one_is_refused_by_name(tiny_model):
    conversation = Conversation(tiny_model.session())
    one, two = conversation.reply("A", **OPTIONS), conversation.reply("B", **OPTIONS)
    with pytest.raises(kvq.PromptError, match="gone on since this reply was asked for; ask"):
        next(one)
    text = said(two)
    assert [m["content"] for m in conversation.messages] == ["B", text]
    check(conversation)
    one, two = conversation.resume(**OPTIONS), conversation.reply("C", **OPTIONS)
    said(two)
    with pytest.raises(kvq.PromptError, match="gone on"):
        said(one)
    check(conversation)


def test_a_reply_that_never_begins_changes_nothing(tiny_model):
    conversation = Conversation(tiny_model.session())
    said(conversation.reply("A", **OPTIONS))
    before = state(conversation)
    asked = conversation.reply("B", **OPTIONS)
    assert state(conversation) == before
    resumed = conversation.resume(**OPTIONS)
    del asked
    resumed.close()
    assert state(conversation) == before
    assert remembered(conversation) == before[2]
    conversation.undo()
    assert conversation.messages == []


def test_two_replies_in_turn_are_not_mixed(tiny_model):
    conversation = Conversation(tiny_model.session())
    one, first = left(conversation, "A", 2)
    two, second = left(conversation, "B", 2)
    assert list(one) == []
    second += said(two)
    assert [m["content"] for m in conversation.messages] == ["A", first, "B", second]
    check(conversation)


def test_what_was_said_is_there_at_every_token(tiny_model):
    conversation = Conversation(tiny_model.session())
    said(conversation.reply("A", **OPTIONS))
    text = ""
    for response in conversation.reply("B", **OPTIONS):
        text += response.text
        assert [m["content"] for m in conversation.messages[-2:]] == ["B", text]
        check(conversation)
    for response in conversation.resume(**OPTIONS):
        text += response.text
        assert conversation.messages[-1]["content"] == text
        check(conversation)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["save", "fork"])
def test_what_is_saved_or_forked_in_the_loop_goes_on_where_the_reply_stood(every, name, way, tmp_path):
    conversation, model = Conversation(every[name].session("fp16"), "Be brief."), every[name]
    said(conversation.reply("A", **OPTIONS))
    taken = []
    for response in conversation.reply("B", **OPTIONS):
        if response.index in (0, 4):
            conversation.session.save(tmp_path / "talk.kvq")
            other = conversation.session.fork() if way == "fork" else model.load_session(tmp_path / "talk.kvq")
            taken.append((response.index, Conversation(other)))
            assert taken[-1][1].messages == conversation.messages
    whole = conversation.messages[-1]["content"]
    for index, other in taken:
        assert len(other.turns) == 2
        begun = other.messages[-1]["content"]
        assert begun + said(other.resume(**{**OPTIONS, "max_tokens": OPTIONS["max_tokens"] - index - 1})) == whole
        assert other.messages == conversation.messages
        assert said(other.reply("C", **OPTIONS)) == said(conversation.reply("C", **OPTIONS))
        conversation.undo()
        other.undo()
        other.undo()
        assert len(other.turns) == 1


def test_what_is_saved_after_room_was_made_in_the_loop_is_the_conversation_that_is_left(every):
    conversation = Conversation(every["chatml"].session("fp16"), "Be brief.")
    for question in "ABC":
        said(conversation.reply(question, **OPTIONS))
    context = every["chatml"].architecture.context
    for _ in conversation.reply("D", **{**OPTIONS, "max_tokens": context}, context_shift=True):
        check(conversation)
        if conversation.lost:
            break
    assert conversation.forgotten == 3
    assert conversation.lost > 0
    other = Conversation(conversation.session.fork())
    assert (other.messages, other.turns) == (conversation.messages, conversation.turns)
    assert said(other.reply("E", **OPTIONS)) == said(conversation.reply("E", **OPTIONS))


def test_a_fork_and_an_earlier_list_of_messages_keep_what_they_say(tiny_model):
    conversation = Conversation(tiny_model.session())
    left(conversation)
    messages, fork = conversation.messages, Conversation(conversation.session.fork())
    before = [dict(message) for message in messages]
    said(conversation.resume(**OPTIONS))
    assert messages == before == fork.messages
    assert conversation.messages[:-1] == before[:-1] != conversation.messages


def test_an_asynchronous_loop_that_is_left_and_closed_late(tiny_model):
    conversation = Conversation(tiny_model.session())
    texts = []

    async def ask(question):
        responses = kvq.aiterate(conversation.reply(question, **OPTIONS))
        async for response in responses:
            if response.index == 3:
                texts.append(conversation.messages[-1]["content"])
                return responses
        return None

    async def main():
        open_yet = [await ask(question) for question in "ABC"]
        check(conversation)
        for responses in open_yet:
            await responses.aclose()

    asyncio.run(main())
    assert [m["content"] for m in conversation.messages[::2]] == ["A", "B", "C"]
    assert [m["content"] for m in conversation.messages[1::2]] == texts
    check(conversation)


def test_a_reply_that_another_thread_computes_is_a_session_error(tiny_model):
    conversation = Conversation(tiny_model.session())
    said(conversation.reply("A", **OPTIONS))
    inside, go_on = threading.Event(), threading.Event()

    def waits(ids):
        inside.set()
        go_on.wait(20)
        return False

    texts = []
    replies = conversation.reply("B", **OPTIONS, stopping_criteria=waits)
    thread = threading.Thread(target=lambda: texts.append(said(replies)))
    thread.start()
    assert inside.wait(20)
    try:
        for act, *arguments in (("undo",), ("regenerate",), ("resume",), ("reply", "C"), ("read", "C"),
                                ("set_system", "C"), ("forget", 10**6), ("move_to", tiny_model.session())):  # fmt: skip
            with pytest.raises(kvq.SessionError, match="another thread is using this session"):
                getattr(conversation, act)(*arguments)
    finally:
        go_on.set()
        thread.join()
    assert [m["content"] for m in conversation.messages[-2:]] == ["B", texts[0]]
    check(conversation)


def test_looking_for_room_that_is_there_does_not_end_a_reply(tiny_model):
    conversation = Conversation(tiny_model.session())
    for _ in conversation.reply("A", **OPTIONS):
        assert conversation.forget(1) == 0
    assert len(conversation.session.tokens) > OPTIONS["max_tokens"]
    assert said(conversation.resume(**OPTIONS))


def test_a_reply_that_is_left_keeps_no_conversation_in_memory(tiny_model):
    conversation = Conversation(tiny_model.session())
    gone = weakref.ref(conversation)
    for _ in conversation.reply("A", **OPTIONS):
        break
    gc.disable()
    try:
        del conversation
        assert gone() is None
    finally:
        gc.enable()


def test_a_rewriting_template_leaves_what_can_be_saved_and_gone_on_with(every, tmp_path):
    conversation = Conversation(every["rewriting"].session("fp16"), "Be brief.")
    first = said(conversation.reply("A", **OPTIONS))
    said(conversation.reply("B", **OPTIONS))
    conversation.undo()  # its tokens are gone, too: they stood otherwise
    conversation.session.save(tmp_path / "talk.kvq")
    other = Conversation(every["rewriting"].load_session(tmp_path / "talk.kvq"))
    for each in (conversation, other):
        more = said(each.resume(**OPTIONS))
        assert each.messages[-1]["content"] == first + more
        check(each)

    def stop(done, total):
        if done > 8:
            raise InterruptedError

    small = Conversation(every["rewriting"].session("fp16", prefill_chunk=8), "Be brief.")
    said(small.reply("A", **OPTIONS))
    for act in (lambda: small.read("A text. " * 9, progress=stop), lambda: said(small.reply("B " * 9, progress=stop))):
        with pytest.raises(InterruptedError):
            act()
        assert Conversation(small.session.fork()).messages == small.messages
        fresh = Conversation(every["rewriting"].session("fp16"), "Be brief.")
        said(fresh.reply("A", **OPTIONS))
        assert said(Conversation(small.session.fork()).reply("C", **OPTIONS)) == said(fresh.reply("C", **OPTIONS))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_any_walk_keeps_messages_and_cache_together(every, name, seed, tmp_path):
    """Replies left at any token or never begun, in between all that a conversation does."""
    draw, model = random.Random(f"{name} {seed}"), every[name]
    conversation, bound = Conversation(model.session("fp16"), "Be brief."), []
    for at in range(24):
        act = draw.choice(["reply"] * 5 + ["resume", "regenerate", "undo", "read", "fork", "save", "forget", "late"])
        try:
            if act in ("reply", "resume", "regenerate"):
                options = {"temperature": 1.5, "seed": at, "max_tokens": 6, "stop": ["e"] * (at % 3 == 0)}
                asked = [f"Question {at}?"] if act == "reply" else []
                replies = getattr(conversation, act)(*asked, **options)
                bound.append(replies)
                for _ in range(draw.choice([0, 1, 3, 9])):
                    next(replies, None)
                    check(conversation)
            elif act == "late":
                draw.shuffle(bound)
                if bound:
                    bound.pop().close()
            elif act in ("fork", "save"):
                conversation.session.save(tmp_path / "walk.kvq")
                session = conversation.session.fork() if act == "fork" else model.load_session(tmp_path / "walk.kvq")
                before, conversation = conversation, Conversation(session)
                assert (conversation.messages, conversation.turns) == (before.messages, before.turns)
                bound.append(before)
                bound = bound[:-1]
            else:
                getattr(conversation, act)(*{"read": ["Some text."], "forget": [120]}.get(act, []))
        except kvq.PromptError as error:  # nothing to take back or to go on with
            if "damaged" in str(error):
                raise
        except kvq.ContextError:
            conversation.forget(150)
        check(conversation)
    said(conversation.reply("The last one?", **OPTIONS, context_shift=True))
    check(conversation)
