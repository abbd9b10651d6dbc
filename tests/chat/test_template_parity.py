"""Chat templates beside transformers': text and ids, and the files that an export reads."""

from __future__ import annotations

import json
import shutil

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvq
from kvq.exporter.sources.huggingface import HuggingFaceFolder
from kvq.runtime.text.sandbox import compiled
from kvq.runtime.text.template import ChatTemplate
from tests.tools.chats import ASSISTANT, SPECIAL, SYSTEM, TEMPLATES, USER, save_tokenizer, special_of, with_special
from tests.tools.packages import needs
from tests.tools.templates import CALL, PUBLISHED, RESULT, TOOLS

transformers = needs("transformers")

texts = st.text(max_size=40) | st.sampled_from(["", " ", "\n\n x \n", "{{ 7 * 7 }}", "{% raw %}", "Ünïcödé 😀", "<b>&"])


@pytest.fixture(scope="module")
def pairs(base):
    """Template name -> (kvq's, transformers')."""
    found = {}
    for name in TEMPLATES:
        tokenizer, (bos, eos, *_) = with_special(base, name), SPECIAL[name]
        reference = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
        reference.chat_template = TEMPLATES[name]
        found[name] = ChatTemplate(TEMPLATES[name], tokenizer, special_of(name)), reference
    return found


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


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_export_reads_what_transformers_saves(tiny_checkpoint, base, pairs, name, tmp_path):
    """The files beside a checkpoint that all other tests use, which are written without transformers, say the same."""
    ours, theirs = (shutil.copytree(tiny_checkpoint, tmp_path / folder) for folder in ("ours", "theirs"))
    save_tokenizer(base, name, ours)
    pairs[name][1].save_pretrained(theirs)
    ours, theirs = HuggingFaceFolder(ours, "x"), HuggingFaceFolder(theirs, "x")
    assert theirs.chat_template() == ours.chat_template() == TEMPLATES[name]
    assert theirs.special_tokens() == ours.special_tokens() == special_of(name)
    assert json.loads(theirs.tokenizer_json()) == json.loads(ours.tokenizer_json())


@pytest.fixture(scope="module")
def compiled_pairs():
    """Name of a published template -> (kvq's program, transformers' template)."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return {name: (compiled(source), _compile_jinja_template(source)) for name, source in PUBLISHED.items()}


@pytest.mark.parametrize("name", PUBLISHED)
@given(messages=conversations, prompt=st.booleans(), tools=st.booleans(), called=st.booleans())
@settings(max_examples=60, deadline=None)
def test_what_published_templates_use_renders_as_in_transformers(compiled_pairs, name, messages, prompt, tools, called):
    """Tools, calls of them and their results, reasoning, dates; and what no template uses all of."""
    ours, theirs = compiled_pairs[name]
    if called:
        messages = [*messages, *([USER] if messages[-1]["role"] != "user" else []), CALL, RESULT]
    names = {"bos_token": "<s>", "eos_token": "</s>", "tools": TOOLS if tools else None}
    refusal = ""
    try:
        expected = theirs.render(messages=messages, documents=None, add_generation_prompt=prompt, **names)
    except jinja2.TemplateError as error:
        refusal = " ".join(str(error).split())
    if refusal:
        with pytest.raises(kvq.ChatTemplateError, match="refuses this conversation") as caught:
            ours(messages, prompt, names)
        assert refusal in str(caught.value)
    else:
        assert ours(messages, prompt, names) == expected


MANY_TOOLS = [
    {"type": "function", "function": {"name": f"tool{i}", "description": "What it does. " * 20, "parameters": {
        "type": "object", "required": ["p1"], "properties": {
            f"p{j}": {"type": "string", "description": "What it is.", "enum": ["a", "b", "c"]} for j in range(20)}}}}
    for i in range(64)
]  # fmt: skip


@pytest.mark.parametrize("name", [*PUBLISHED, *TEMPLATES])
def test_long_conversations_are_within_the_bounds(name):
    """Two thousand turns, 64 tools of 20 parameters, turns as long as a book: what a rendering may take grows."""
    program = compiled({**PUBLISHED, **TEMPLATES}[name])
    names = {"bos_token": "<s>", "eos_token": "</s>", "tools": TOOLS}
    thought = {"role": "assistant", "content": "<think>\nWell.\n</think>\n\nYes. "}
    assert program([USER, thought] * 2000, True, names)
    assert program([USER], True, names | {"tools": MANY_TOOLS})
    book = "It was the best of times, it was the worst of times.\n" * 20_000
    assert program([{**USER, "content": book}, {**thought, "content": thought["content"] + book}] * 2, True, names)
