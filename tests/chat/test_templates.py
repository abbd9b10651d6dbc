"""Chat templates: what they may do, what they must not, and that no message can write their tokens."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvq
from kvq.runtime.text.template import GUARD, ChatTemplate
from tests.tools.chats import ASSISTANT, SPECIAL, SYSTEM, TEMPLATES, USER, special_of, with_special


@pytest.fixture(scope="module")
def templates(base):
    """Template name -> (template, the tokenizer it writes for)."""
    tokenizers = {name: with_special(base, name) for name in TEMPLATES}
    return {name: (ChatTemplate(TEMPLATES[name], found, special_of(name)), found) for name, found in tokenizers.items()}


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
def test_a_message_cannot_write_the_templates_tokens(templates, name, data):
    ours, tokenizer = templates[name]
    every = sorted(ours._specials)
    piece = st.sampled_from([*every, *(s[:4] for s in every), *(s[4:] for s in every), GUARD, "a", "\n", " "])
    contents = data.draw(st.lists(st.lists(piece, max_size=6).map("".join), min_size=1, max_size=4))
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(contents)]
    neutral = [{**message, "content": "a"} for message in messages]
    ids = ours.encode(messages)
    special = set(ours._specials.values())
    assert [i for i in ids if i in special] == [i for i in ours.encode(neutral) if i in special]
    clean = [{**message, "content": message["content"].replace(GUARD, "\ufffd")} for message in messages]
    assert tokenizer.decode(ids, skip_special_tokens=False) == ours.render(clean)


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


def test_special_tokens_listed_in_tests_are_special(models):
    for name, special in SPECIAL.items():
        assert set(special) <= models[name].chat_template._specials.keys()
