"""Chat templates beside transformers', what they must not do, and conversations that continue from the cache."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvq
from kvq.composition import open_bundle
from kvq.runtime.chat.conversation import KEY, Conversation
from kvq.runtime.text.template import GUARD, ChatTemplate
from tests.tools.chats import SPECIAL, TEMPLATES, chat_bundle, chat_tokenizer
from tests.tools.checkpoints import small_tokenizer

GREEDY = {"temperature": 0.0, "max_tokens": 9}
USER, ASSISTANT, SYSTEM = ({"role": role, "content": role} for role in ("user", "assistant", "system"))
texts = st.text(max_size=40) | st.sampled_from(["", " ", "\n\n x \n", "{{ 7 * 7 }}", "{% raw %}", "Ünïcödé 😀", "<b>&"])


@pytest.fixture(scope="module")
def base():
    """A tokenizer that leaves room for special tokens in TINY's vocabulary of 512."""
    return small_tokenizer(490)


@pytest.fixture(scope="module")
def pairs(base):
    """Template name -> (kvq's, transformers')."""
    found = {}
    for name in TEMPLATES:
        reference = chat_tokenizer(base, name)
        tokens = {"bos_token": reference.bos_token, "eos_token": reference.eos_token}
        found[name] = ChatTemplate(TEMPLATES[name], reference.backend_tokenizer, tokens), reference
    return found


@pytest.fixture(scope="module")
def models(tiny_checkpoint, base, tmp_path_factory):
    """Models whose bundles have a template, by its name; "plain" has none."""
    folder = tmp_path_factory.mktemp("chat")
    found = {name: open_bundle(chat_bundle(tiny_checkpoint, base, name, folder / f"of-{name}")) for name in TEMPLATES}
    return found


@pytest.fixture(scope="module")
def every(models, tiny_model):
    return {**models, "plain": tiny_model}


conversations = st.builds(
    lambda system, contents: (
        [{"role": "system", "content": text} for text in system]
        + [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(contents)]
    ),
    st.lists(texts, max_size=1),
    st.lists(texts, min_size=1, max_size=5),
)


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations, prompt=st.booleans())
@settings(max_examples=60, deadline=None)
def test_text_and_ids_are_those_of_transformers(pairs, name, messages, prompt):
    ours, reference = pairs[name]
    text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert ours.render(messages, prompt) == text
    if not any(special in message["content"] for special in ours._specials for message in messages):
        assert ours.encode(messages, prompt) == reference.apply_chat_template(messages, add_generation_prompt=prompt)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_exporter_carries_template_and_special_tokens_over(models, pairs, name):
    carried = models[name].chat_template
    reference = pairs[name][1]
    messages = [SYSTEM, USER, ASSISTANT, USER]
    assert not carried.builtin
    assert carried.encode(messages) == reference.apply_chat_template(messages, add_generation_prompt=True)


def test_the_default_of_several_named_templates_is_carried_over(tiny_checkpoint, tmp_path):
    from kvq.exporter.sources.huggingface import HuggingFaceFolder

    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "tokenizer_config.json").write_text(
        '{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],'
        ' "bos_token": {"content": "<s>"}, "eos_token": null}'
    )
    checkpoint = HuggingFaceFolder(folder, "x")
    assert checkpoint.chat_template() == "D"
    assert checkpoint.special_tokens() == {"bos_token": "<s>"}


@pytest.mark.parametrize(
    ("name", "stop", "ends"),
    [("chatml", [], ["<|im_end|>"]),
     ("llama3", [], ["<|eot_id|>"]), ("rewriting", [], ["</s>"]), ("plain", ["\nUser:"], [])],
)  # fmt: skip
def test_what_ends_a_reply_is_found_in_the_template(every, name, stop, ends):
    template = every[name].chat_template
    assert template.stop == stop
    assert [every[name].tokenizer.id_to_token(token) for token in template.stop_tokens] == ends


def test_without_a_template_a_conversation_is_a_transcript(tiny_model):
    template = tiny_model.chat_template
    assert template.builtin
    messages = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": " Yes. "}, USER]
    assert template.render(messages) == "Be brief.\n\nUser: user\nAssistant: Yes.\nUser: user\nAssistant:"
    assert template.render(messages[1:], False) == "User: user\nAssistant: Yes.\nUser: user"
    assert template.render([]) == "Assistant:"


@pytest.mark.parametrize("name", TEMPLATES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_message_cannot_write_the_templates_tokens(pairs, name, data):
    ours, reference = pairs[name]
    every = sorted(ours._specials)
    piece = st.sampled_from([*every, *(s[:4] for s in every), *(s[4:] for s in every), GUARD, "a", "\n", " "])
    contents = data.draw(st.lists(st.lists(piece, max_size=6).map("".join), min_size=1, max_size=4))
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(contents)]
    neutral = [{**message, "content": "a"} for message in messages]
    ids = ours.encode(messages)
    special = set(ours._specials.values())
    assert [i for i in ids if i in special] == [i for i in ours.encode(neutral) if i in special]
    clean = [{**message, "content": message["content"].replace(GUARD, "\ufffd")} for message in messages]
    assert reference.decode(ids, clean_up_tokenization_spaces=False) == ours.render(clean)


@pytest.mark.parametrize(
    "messages",
    [["Hello"], [{"role": "user"}], [{"role": "user", "content": None}], [{"role": "<|im_start|>", "content": ""}],
     [{"role": "", "content": ""}], [{"role": "user", "content": "", "name": 3}]],
    ids=str,
)  # fmt: skip
def test_messages_that_are_none_are_a_prompt_error(tiny_model, messages):
    with pytest.raises(kvq.PromptError, match="role"):
        tiny_model.chat_template.render(messages)


ATTACKS = {
    "endless loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over text": "{% for a in 'x' * 20000 %}{% for a in 'x' * 20000 %}{% endfor %}{% endfor %}",
    "a huge range": "{{ range(10 ** 12) }}",
    "repetition": "{{ 'a' * 1000000000 }}",
    "repetition of a list": "{{ 1000000000 * ['a'] }}",
    "doubling": "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling by plus": "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "replacing": "{% set s = 'a' * 90000 %}{{ s | replace('', s) }}{{ s.replace('', s) }}",
    "joining": "{% set s = 'a' * 90000 %}{{ s.join(s) }}",
    "a wide field": "{{ '%099999999d' % 1 }}",
    "a wide field by argument": "{{ '%*d' % (999999999, 1) }}",
    "padding": "{{ 'x'.ljust(1000000000) }}",
    "a power": "{{ 9 ** 99999 }}",
    "endless recursion": "{% macro a() %}{{ a() }}{{ a() }}{% endmacro %}{{ a() }}",
    "globals of a function": "{{ raise_exception.__globals__ }}{{ cycler.__init__.__globals__.os }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "subclasses by item": "{{ ''['__class__']['__mro__'] }}",
    "subclasses by filter": "{{ (''|attr('__class__')).__mro__ }}",
    "a private name": "{{ messages._x.y }}",
    "changing messages": "{{ messages.append(1) }}{{ messages[0].update(role='x') }}",
    "formatting an attribute": "{{ '{0.__class__}'.format(1) }}",
    "importing": "{% import 'os' as os %}",
    "including a file": "{% include '/etc/passwd' %}",
    "wide JSON": "{{ messages | tojson(indent=999999999) }}",
    "wide JSON by separators": "{{ messages | tojson(separators=('x' * 100000, ':')) }}",
    "filling batches": "{{ messages | batch(999999999, 'x') | list }}",
    "filling slices": "{{ messages | slice(999999999) | list }}",
    "dividing": "{{ 1 / 0 }}",
    "no such thing": "{{ nothing.at.all }}",
    "refusing": "{{ raise_exception('only\nthis') }}",
    "too many arguments": "{{ strftime_now() }}",
}


@pytest.mark.parametrize("source", ATTACKS.values(), ids=ATTACKS)
def test_what_a_template_must_not_do_is_one_named_error(source):
    with pytest.raises(kvq.ChatTemplateError) as caught:
        ChatTemplate(source).render([USER])
    assert str(caught.value).startswith("the chat template ")
    assert "\n" not in str(caught.value)


def test_reaching_for_internals_yields_nothing():
    assert ChatTemplate("{{ ''.__class__ }}{{ messages.__len__ }}|{{ (1).real }}").render([USER]) == "|1"


@pytest.mark.parametrize(
    "source", ["{% for", "{{ 1 +", "{% nothing %}", "{{ x | nothing }}", "{" * 9999, "x" * (1 << 18)], ids=range(6)
)  # fmt: skip
def test_a_template_that_is_none_is_one_named_error(source):
    with pytest.raises(kvq.ChatTemplateError, match="export the bundle"):
        ChatTemplate(source + "{{ y | nothing }}")


def test_a_template_may_use_what_templates_use():
    source = (
        "{%- for m in messages if m.role != 'system' -%}{%- if loop.index > 2 %}{% break %}{% endif -%}"
        "{{ loop.length }}{{ m | tojson }}{{ loop.last }}{%- endfor -%}"
        "{% set n = namespace(found=false) %}{% set n.found = true %}{{ n.found }}"
        "{{ [1, 2] | join(', ') }}{{ 'a-b'.replace('-', '+') }}{{ ', '.join(['x', 'y']) }}{{ 'x' ~ 1 ~ none }}"
        "{{ messages | map(attribute='role') | join('|') }}{{ '%s!' % 'a' }}{{ messages | length }}{{ 'ab'[::-1] }}"
        "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice('z') }}{{ 'a,b'.split(',')[-1] }}{{ tools is none }}"
    )
    expected = (
        '3{"role": "user", "content": "<é>"}False3{"role": "assistant", "content": "assistant"}False'
        "True1, 2a+bx, yx1Nonesystem|user|assistant|usera!4bazzbTrue"
    )
    assert ChatTemplate(source).render([SYSTEM, {"role": "user", "content": "<é>"}, ASSISTANT, USER]) == expected


def said(replies) -> str:
    return "".join(response.text for response in replies)


def cached(conversation) -> str:
    """The text in the cache, and sampled but not yet in it."""
    session = conversation.session
    text = session.model.tokenizer.decode([*session.tokens, *session.pending], skip_special_tokens=False)
    return text.replace("\ufffd", "")  # of characters that random weights leave incomplete


def counted(session):
    """Lengths of everything the session feeds to the model from now on, as a list that grows."""
    fed, step = [], session._step

    def counting(ids, *rest):
        fed.append(len(ids))
        step(ids, *rest)

    session._step = counting
    return fed


def spelled(conversation, question: str) -> str:
    """What the cache must spell when the reply to a question begins: the template over all messages."""
    messages = [*conversation.messages, {"role": "user", "content": question}]
    return conversation.template.render(messages).replace("\ufffd", "")


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
        end = conversation.messages[-1]["content"]
        new = len(session.tokens) - before
        assert 0 < new < 60
        assert end == ""
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
    conversation = Conversation(every[name].session(recent=64))
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


def test_special_tokens_listed_in_tests_are_special(models):
    for name, special in SPECIAL.items():
        assert set(special) <= models[name].chat_template._specials.keys()
