"""What a conversation is written with: templates that leave out reasoning, stop strings that are tokens, files."""

from __future__ import annotations

import json

import pytest

import kvq
from kvq.composition import open_bundle
from kvq.runtime.chat.conversation import KEY, Conversation
from kvq.runtime.text.template import ChatTemplate
from tests.text.test_continuing import TOKENIZERS
from tests.tools.chats import CHATML, GREEDY, cached, chat_bundle, counted, said, special_of, spelled

# Leaves out of earlier replies everything up to their last "e", as others leave out what stands before </think>.
DROPPING = CHATML.replace(
    "message['content'] + '<|im_end|>'",
    "(message['content'].split('e')[-1] if message['role'] == 'assistant' else message['content']) + '<|im_end|>'",
)


@pytest.fixture
def dropping(models, monkeypatch):
    """The chatml model under a template that drops a part of what was said."""
    model = models["chatml"]
    template = ChatTemplate(DROPPING, model.tokenizer, special_of("chatml"), model.architecture.context)
    monkeypatch.setitem(model.__dict__, "chat_template", template)
    return model


def test_what_a_template_leaves_out_of_earlier_turns_leaves_the_cache(dropping):
    conversation = Conversation(dropping.session())
    dropped = 0
    for question in ("One", "Two", "Three"):
        text = spelled(conversation, question)
        replies = conversation.reply(question, ignore_eos=True, **GREEDY)
        shown = dropping.tokenizer.decode([next(replies).token], skip_special_tokens=False).replace("\ufffd", "")
        assert "".join(cached(conversation).removesuffix(shown).split()) == "".join(text.split())
        dropped += "e" in said(replies) + conversation.messages[-1]["content"]
    assert dropped  # the replies did say what is left out


def test_a_reply_of_which_nothing_is_left_out_stays_in_the_cache(models):
    conversation = Conversation(models["chatml"].session())
    said(conversation.reply("One", **GREEDY))
    fed = counted(conversation.session)
    before = len(conversation.session.tokens)
    said(conversation.reply("Two", **GREEDY))
    assert sum(fed) == len(conversation.session.tokens) - before


def test_a_stop_string_that_is_an_added_token_ends_the_text(models):
    model = models["chatml"]
    end = model.tokenizer.token_to_id("<|im_start|>")
    session = model.session()
    session.append([1, 2, 3])
    session.last_logits[:] = -10.0
    session.last_logits[end] = 10.0
    responses = list(session.generate(None, stop="<|im_start|>", temperature=0, max_tokens=5))
    assert [(r.token, r.text, r.finish_reason) for r in responses] == [(end, "", "stop")]


@pytest.mark.parametrize("change", ["template", "special_tokens", "eos_token_ids"])
def test_a_conversation_goes_on_with_what_it_was_written_with_or_not_at_all(models, change, monkeypatch, tmp_path):
    model = models["chatml"]
    conversation = Conversation(model.session())
    said(conversation.reply("One", **GREEDY))
    conversation.session.save(tmp_path / "talk.kvq")
    assert Conversation(model.load_session(tmp_path / "talk.kvq")).messages == conversation.messages
    other = open_bundle(model.path)
    if change == "template":
        found = ChatTemplate(CHATML + " ", other.tokenizer, special_of("chatml"))
        monkeypatch.setitem(other.__dict__, "chat_template", found)
    elif change == "special_tokens":
        other.bundle.manifest.special_tokens["bos_token"] = "<|im_end|>"
    else:
        other.bundle.manifest.eos_token_ids.append(7)
    loaded = other.load_session(tmp_path / "talk.kvq")  # as a text it is what it was
    with pytest.raises(kvq.PromptError, match="another chat template"):
        Conversation(loaded)


def test_a_conversation_of_before_goes_on(models):
    session = models["chatml"].session()
    said(Conversation(session).reply("One", **GREEDY))
    del session.metadata[KEY]["written_with"]
    json.dumps(session.metadata)
    assert len(Conversation(session).turns) == 1


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc80" * 3])
@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_a_lone_surrogate_is_a_prompt_error(every, name, text):
    conversation = Conversation(every[name].session())
    with pytest.raises(kvq.PromptError, match="surrogates"):
        conversation.reply(text)
    with pytest.raises(kvq.PromptError):
        conversation.read(text)
    with pytest.raises(kvq.PromptError):
        every[name].encode(text)
    with pytest.raises(kvq.PromptError):
        next(every[name].session().generate(text))
    assert (conversation.messages, conversation.session.tokens) == ([], [])
    with pytest.raises(kvq.PromptError):
        Conversation(every[name].session(), text).reply("Hello")


@pytest.fixture(scope="module", params=["legacy", "first"])
def spaced_model(request, tiny_checkpoint, tmp_path_factory):
    """A model whose tokenizer puts a space before a text."""
    folder = tmp_path_factory.mktemp("spaced")
    return open_bundle(chat_bundle(tiny_checkpoint, TOKENIZERS[request.param], "chatml", folder / request.param))


def test_later_turns_have_the_ids_of_the_whole_conversation(spaced_model):
    """No space comes in between, whether the reply ended by itself, was cut, or quotes a mark."""
    template, tokenizer = spaced_model.chat_template, spaced_model.tokenizer
    begin = tokenizer.token_to_id("<|im_start|>")
    conversation = Conversation(spaced_model.session(), "the capital")
    for question, options in (("of a", {}), (" is", {"max_tokens": 3}), ("<|im_end|> the", {"stop": ["e", "a"]})):
        said(conversation.reply(question, **GREEDY | options))
        held = [*conversation.session.tokens, *conversation.session.pending]
        whole = template.encode([*conversation.messages[:-1]])
        marks = [[at for at, token in enumerate(ids) if token == begin] for ids in (held, whole)]
        assert len(marks[0]) == len(marks[1])
        ours, theirs = (ids[places[-2] : places[-1]] for ids, places in zip((held, whole), marks, strict=True))
        assert ours == theirs  # the question; what was said has ids of its own


def test_a_reply_behind_text_keeps_its_first_space(spaced_model):
    session = spaced_model.session()
    tokenizer = spaced_model.tokenizer
    session.append(tokenizer.encode("the capital of").ids)
    word = tokenizer.token_to_id("▁Lon")
    session.last_logits[:] = -10.0
    session.last_logits[word] = 10.0
    (response,) = session.generate(None, max_tokens=1, temperature=0)
    assert response.text == " Lon"
    first = next(session.generate(" is", max_tokens=1, temperature=0))
    assert first.index == 0
    assert tokenizer.decode(session.tokens) == "the capital of Lon is"
