"""The short ways in: a model answers a text or messages, begins a conversation, and says what it is."""

from __future__ import annotations

import inspect

import pytest

import kvq


def text(responses):
    return "".join(response.text for response in responses)


def test_a_text_is_gone_on_with(embedded):
    options = {"max_tokens": 12, "seed": 2}
    expected = text(embedded.session("int4", sink=0).generate("It was late", **options))
    assert text(embedded.generate("It was late", policy="int4", sink=0, **options)) == expected
    ids = embedded.encode("It was late")
    assert text(embedded.generate(ids, policy="int4", sink=0, **options)) == expected


def test_messages_go_through_the_template(tiny_model):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    conversation = tiny_model.chat("Be brief.", policy="int8")
    options = {"max_tokens": 8, "temperature": 0.0}
    assert text(tiny_model.generate(messages, policy="int8", **options)) == text(conversation.reply("Who?", **options))
    assert isinstance(conversation, kvq.Conversation)
    begun = [*messages, {"role": "assistant", "content": "It"}]
    ids = tiny_model.chat_template.encode_begun(begun)
    stops = {"stop": tiny_model.chat_template.stop, "stop_tokens": tiny_model.chat_template.stop_tokens}
    assert text(tiny_model.generate(begun, **options)) == text(tiny_model.session().generate(ids, **options, **stops))


@pytest.mark.parametrize(
    ("call", "near"),
    [
        (lambda model: model.generate("x", temprature=1), "temperature"),
        (lambda model: model.generate("x", polcy="int4"), "policy"),
        (lambda model: model.session(kvbits=4), "kv_bits"),
        (lambda model: model.chat(sytem="x"), "system"),
        (lambda model: model.chat().reply("x", max_token=4), "max_tokens"),
        (lambda model: model.chat().resume(max_token=4), "max_tokens"),
        (lambda model: model.load_session("x", polcy="int4"), "policy"),
        (lambda model: kvq.load("kvq-books", thread=1), "threads"),
    ],
)
def test_a_typo_is_named_with_what_was_meant(embedded, call, near):
    with pytest.raises(kvq.OptionError, match=f"did you mean {near}") as caught:
        call(embedded)
    assert isinstance(caught.value, kvq.KvqError)


def test_what_is_wrong_with_messages_is_told(embedded):
    for wrong in ([{"role": "user"}], [{"role": "user", "content": 5}], []):
        with pytest.raises(kvq.PromptError):
            embedded.generate(wrong)


@pytest.mark.parametrize("name", ["generate", "chat", "session"])
def test_help_says_what_there_is(embedded, name):
    signature = inspect.signature(getattr(embedded, name))
    assert {"policy", "kv_bits"} <= signature.parameters.keys()
    assert getattr(embedded, name).__doc__


def test_things_say_what_they_are(embedded):
    assert repr(embedded).startswith("<kvq.Model kvq-books: ")
    session = embedded.session("int4")
    session.append([1, 2, 3])
    assert "3 tokens of 2048, policy int4" in repr(session)
    conversation = embedded.chat()
    list(conversation.reply("Who?", max_tokens=2))
    assert "kvq-books: 1 turn, " in repr(conversation)
    assert "a plain transcript" in repr(embedded.chat_template)
