"""Documents read ahead of the questions about them, and replies that were cut: conversations with a turn left open."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import kvq
from kvq.runtime.chat.conversation import KEY, Conversation, has_template
from tests.tools.chats import ASSISTANT, GREEDY, SPECIAL, TEMPLATES, USER, cached, counted, said, spelled

LEASE = "The rent is 640 pounds,\nand due on the third. Pets are allowed, but no parrots."
NAMES = [*TEMPLATES, "plain"]
marks = [mark for each in SPECIAL.values() for mark in each]
words = st.sampled_from([*marks, "the", " rent", "640", "\n", "\n\n", " ", "é", "😀", ".", "\ufdd0", "<|im", "_end|>"])
texts = st.lists(words, max_size=8).map("".join)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_which_models_have_a_template(every):
    assert {name: has_template(model) for name, model in every.items()} == {name: name != "plain" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@given(
    document=texts.filter(str.strip), question=texts, system=st.none() | texts, role=st.sampled_from(["user", "system"])
)
@settings(max_examples=40, deadline=None)
def test_ids_are_those_of_the_whole_conversation(every, name, document, question, system, role):
    """However the document ends and the question begins, and whatever special tokens they quote."""
    model = every[name]
    before = [] if system is None else [message("system", system)]
    if role == "system":
        before = [message("system", "\n\n".join(part for part in (system, document) if part))]
        asked = question
    else:
        asked = f"{document}\n\n{question}" if question else document
    expected = model.chat_template.encode([*before, message("user", asked)])
    assume(len(expected) < model.architecture.context)  # what special tokens quote is spelled out
    conversation = Conversation(model.session(prefill_chunk=7), system)
    conversation.read(document, role)
    ahead = list(conversation.session.tokens)
    assert ahead == expected[: len(ahead)]  # so that nothing of it is processed again
    replies = conversation.reply(question, **GREEDY)
    next(replies)
    assert conversation.session.tokens == expected
    assert conversation.messages[:-1] == [*before, message("user", asked)]
    replies.close()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("policy", ["fp16", "mixed"])
def test_nothing_is_processed_twice(every, name, policy):
    session = every[name].session(policy)
    fed = counted(session)
    conversation = Conversation(session, "Be brief.")
    conversation.read(LEASE)
    document = sum(fed)
    assert document == len(session.tokens) > len(every[name].encode(LEASE, False)) - 3
    for question in ("When is the rent due?", "1 parrot?"):
        if name == "rewriting" and question[0] == "1":
            continue
        said(conversation.reply(question, **GREEDY))
        assert sum(fed) == len(session.tokens)
    assert fed[-1] == 1  # the reply came token by token


@pytest.mark.parametrize("name", NAMES)
def test_a_document_in_the_middle_of_a_conversation(every, name):
    conversation = Conversation(every[name].session(), "Be brief.")
    said(conversation.reply("Hello", **GREEDY))
    conversation.read("First document.")
    conversation.read("Second document.")
    text = spelled(conversation, "First document.\n\nSecond document.\n\nWhich is longer?")
    replies = conversation.reply("Which is longer?", **GREEDY)
    shown = every[name].tokenizer.decode([next(replies).token], skip_special_tokens=False).replace("\ufffd", "")
    assert "".join(cached(conversation).removesuffix(shown).split()) == "".join(text.split())
    said(replies)
    assert conversation.messages[-2]["content"].startswith("First document.\n\nSecond document.\n\nWhich")
    said(conversation.reply("Why?", **GREEDY))
    assert conversation.document is None


@pytest.mark.parametrize("name", NAMES)
def test_undo_takes_back_the_question_and_keeps_the_document(every, name):
    conversation = Conversation(every[name].session("fp16", recent=64))
    conversation.read(LEASE)
    before = list(conversation.session.tokens)
    reply = said(conversation.reply("When is the rent due?", **GREEDY))
    conversation.undo()
    assert conversation.document.text == LEASE
    assert conversation.session.tokens == before[: len(conversation.session.tokens)]
    assert len(before) - len(conversation.session.tokens) <= 1
    assert said(conversation.reply("When is the rent due?", **GREEDY)) == reply
    said(conversation.reply("Why?", **GREEDY))
    conversation.read("A second one.")
    conversation.undo()  # Why?, and what was read since
    assert (len(conversation.turns), conversation.document) == (1, None)
    conversation.undo()
    with pytest.raises(kvq.PromptError, match="nothing to undo"):
        conversation.undo()
    assert said(conversation.reply("When is the rent due?", **GREEDY)) == reply


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("role", ["user", "system"])
def test_a_saved_document_is_asked_many_questions(every, name, role, tmp_path):
    model = every[name]
    conversation = Conversation(model.session("int8"), "Be brief.")
    conversation.read(LEASE, role)
    conversation.session.save(tmp_path / "lease.kvq")
    questions = ("When is the rent due?", "Parrots?", "When is the rent due?")
    answers = []
    for question in questions:
        loaded = Conversation(model.load_session(tmp_path / "lease.kvq"))
        answers.append(said(loaded.reply(question, **GREEDY)))
        said(loaded.reply("Why?", **GREEDY))
    twin = Conversation(conversation.session.fork())
    answers.append(said(conversation.reply(questions[0], **GREEDY)))
    answers.append(said(twin.reply(questions[0], **GREEDY)))
    assert answers[0] == answers[2] == answers[3] == answers[4]


def test_a_document_alone_can_be_answered(every):
    for model in every.values():
        conversation = Conversation(model.session("fp16"))
        conversation.read("Name three ships.")
        whole = Conversation(model.session("fp16"))
        assert said(conversation.reply("", **GREEDY)) == said(whole.reply("Name three ships.", **GREEDY))
        assert conversation.messages == whole.messages


def test_progress_counts_all_tokens(every):
    conversation = Conversation(every["chatml"].session(prefill_chunk=16))
    told = []
    conversation.read(LEASE, progress=lambda done, total: told.append((done, total)))
    total = len(conversation.session.tokens)
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    told.clear()
    replies = conversation.reply("word " * 20, progress=lambda done, total: told.append((done, total)), **GREEDY)
    next(replies)
    assert len(told) > 2
    assert told[-1] == (len(conversation.session.tokens) - total,) * 2
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_what_cannot_be_read_changes_nothing(every):
    conversation = Conversation(every["chatml"].session(), "Be brief.")
    said(conversation.reply("Hello", **GREEDY))
    kept = list(conversation.session.tokens), list(conversation.messages), list(conversation.session.pending)
    for document, role, error, words in (
        ("word " * 300, "user", kvq.ContextError, "the document takes"),
        ("  \n", "user", kvq.PromptError, "the document is empty"),
        (None, "user", kvq.PromptError, "the document is empty"),
        ("x", "assistant", kvq.PromptError, "user or the system"),
        ("x", "system", kvq.PromptError, "the system prompt comes first"),
    ):
        with pytest.raises(error, match=words):
            conversation.read(document, role)
    assert (conversation.session.tokens, conversation.messages, conversation.session.pending) == kept
    said(conversation.reply("Hello", **GREEDY))
    conversation = Conversation(every["plain"].session())
    conversation.read(LEASE)
    with pytest.raises(kvq.PromptError, match="the system prompt comes first"):
        conversation.read("x", "system")
    with pytest.raises(kvq.ContextError, match="the question takes"):
        conversation.reply("word " * 300)
    assert conversation.document.text == LEASE


def test_reading_that_is_interrupted_leaves_a_conversation_that_goes_on(every):
    class Enough(Exception):
        pass

    def enough(done, total):
        if done > 20:
            raise Enough

    for name in NAMES:
        conversation = Conversation(every[name].session(prefill_chunk=8))
        said(conversation.reply("Hello", **GREEDY))
        with pytest.raises(Enough):
            conversation.read(LEASE, progress=enough)
        text = spelled(conversation, "Why?")
        replies = conversation.reply("Why?", **GREEDY)
        shown = every[name].tokenizer.decode([next(replies).token], skip_special_tokens=False).replace("\ufffd", "")
        assert "".join(cached(conversation).removesuffix(shown).split()) == "".join(text.split())
        replies.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_reply_goes_on_as_if_it_had_not_been_cut(every, name, tmp_path):
    options = {"temperature": 1.2, "seed": 3, "ignore_eos": True}
    whole = said(Conversation(every[name].session()).reply("Hello", max_tokens=16, **options))
    conversation = Conversation(every[name].session())
    parts = [said(conversation.reply("Hello", max_tokens=5, **options))]
    conversation.session.save(tmp_path / "talk.kvq")
    conversation = Conversation(every[name].load_session(tmp_path / "talk.kvq"))
    parts.append(said(conversation.resume(max_tokens=4, **options)))
    parts.append(said(conversation.resume(max_tokens=7, **options)))
    assert "".join(parts) == whole == conversation.messages[-1]["content"]
    said(conversation.reply("Why?", **GREEDY))


def test_a_reply_at_its_end_does_not_go_on(every):
    model = every["chatml"]
    conversation = Conversation(model.session())
    with pytest.raises(kvq.PromptError, match="ask a question"):
        conversation.resume()
    first = next(Conversation(model.session()).reply("Hello", **GREEDY))
    said(conversation.reply("Hello", stop_tokens=[first.token], **GREEDY))
    with pytest.raises(kvq.PromptError, match="has come to its end"):
        conversation.resume()
    conversation.read(LEASE)
    with pytest.raises(kvq.PromptError, match="ask a question"):
        conversation.resume()


def test_end_of_turn_is_passed_over_on_request_only(every):
    model = every["chatml"]
    end = model.chat_template.stop_tokens[0]
    told = {}
    for ignore_eos in (False, True):
        session = model.session()
        replies = Conversation(session).reply("Hello", ignore_eos=ignore_eos, max_tokens=4, temperature=0.0)
        step = session.step

        def forced(ids, end_of_call, skip, logits, step=step):
            step(ids, end_of_call, skip, logits)
            logits[:, end] = 1e4

        session.step = forced
        told[ignore_eos] = [response.finish_reason for response in replies]
    assert told == {False: ["stop"], True: [None, None, None, "length"]}


@pytest.mark.parametrize(
    "data",
    [*({"messages": [USER, ASSISTANT], "turns": [[0, [], 2, *document]]}
       for document in ([5, 1], [-1, 1], [1, 3], [1, -1], [1, 1, 1])),
     {"document": {}}, {"document": None}, {"document": {"text": "x", "start": 0}},
     {"document": {"text": "x", "start": 9, "pending": []}}, {"document": {"text": "x", "start": -1, "pending": []}},
     {"document": {"text": " ", "start": 0, "pending": []}}, {"document": {"text": "x", "start": 0, "pending": [512]}},
     {"messages": [USER, ASSISTANT], "turns": [[0, [], 2]], "document": {"text": "x", "start": 1, "pending": []}}],
    ids=lambda data: repr(data)[-40:],
)  # fmt: skip
def test_a_damaged_document_is_one_named_error(tiny_model, data):
    session = tiny_model.session()
    session.append([1, 2, 3])
    session.metadata[KEY] = {"messages": [], "turns": [], **data}
    with pytest.raises(kvq.PromptError, match="damaged"):
        Conversation(session)


def test_a_document_whose_tokens_are_others_is_read_again(tiny_model):
    """A file may say what it wants of its text: what is asked is what the template makes of it."""
    session = tiny_model.session()
    session.append([1, 2, 3])
    session.metadata[KEY] = {"messages": [], "turns": [], "document": {"text": "A lease.", "start": 2, "pending": [7]}}
    conversation = Conversation(session)
    replies = conversation.reply("Why?", **GREEDY)
    next(replies)
    assert session.tokens == tiny_model.chat_template.encode([message("user", "A lease.\n\nWhy?")])
