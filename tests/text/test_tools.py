"""Calls of tools: how templates write them is found out, and calls are read however they come."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq.runtime.text.template import ChatTemplate
from kvq.runtime.text.tools import PLAIN, CallFormat, CallReader, Tool, call_format, forced_calls, with_tools
from tests.tools import templates
from tests.tools.packages import needs

NAMES = ["get_weather", "b", "long.name-with_signs"]
FORMATS = {
    "plain": PLAIN,
    "bare": CallFormat('{"name": "', '", "parameters": ', "}", None, True),
    "list": CallFormat('[TOOL_CALLS] [{"name": "', '", "arguments": ', ', "id": "kvqcall01"}]',
                       ', "id": "kvqcall01"}, {"name": "', True),
    "function": CallFormat("<function=", ">", "</function>", None, True),
}  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6), lambda v: st.lists(v, max_size=3), max_leaves=4
)
ARGUMENTS = st.dictionaries(st.text(max_size=5), VALUES, max_size=3)
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), ARGUMENTS), min_size=1, max_size=3)


def read(form: CallFormat, text: str, cuts: list[int], hidden=(), single=False):
    """Text and calls of an answer that comes in pieces."""
    reader, pieces = CallReader(form, NAMES, hidden, single), []
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for start, stop in itertools.pairwise(edges):
        pieces += reader.push(text[start:stop])
    pieces += reader.flush()
    shown, calls = "", []
    for kind, value in pieces:
        if kind == "text":
            shown += value
        elif kind == "call":
            calls.append([value, ""])
        else:
            calls[-1][1] += value
    return shown, [(name, json.loads(arguments)) for name, arguments in calls]


@given(st.sampled_from(sorted(FORMATS)), CALLS, st.lists(st.integers(0, 10_000), max_size=12))
@settings(deadline=None)
def test_calls_are_read_however_they_are_cut(name, calls, cuts):
    form = FORMATS[name]
    calls = calls if form.between else calls[:1]
    text = form.written([{"function": {"name": name, "arguments": arguments}} for name, arguments in calls])
    assert read(form, text, cuts) == ("", calls)


@given(st.text(max_size=60), st.lists(st.integers(0, 100), max_size=6))
@settings(deadline=None)
def test_text_that_calls_nothing_is_text(text, cuts):
    assert read(PLAIN, text, cuts)[0].strip() == text.strip()


TORN = '<tool_call>{"args": {"a": "\\ud800"}, "name": "b"}'  # half a surrogate


@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        ('Let me see.\n<tool_call>{"name":"b","arguments":{}}</tool_call>', "Let me see.", [("b", {})]),
        ('<tool_call>\n{"arguments": {"a": 1}, "name": "b"}\n</tool_call>', "", [("b", {"a": 1})]),
        ('<tool_call>{"name":"x","arguments":{}}', '<tool_call>{"name":"x","arguments":{}}', []),
        ('<tool_call>{"name": "b", "argu', '<tool_call>{"name": "b", "argu', []),
        ('<tool_call>{"arguments": {}, "name": ["b"]}', '<tool_call>{"arguments": {}, "name": ["b"]}', []),
        ('<tool_call>{"arguments": {"a": NaN}, "name": "b"}', '<tool_call>{"arguments": {"a": NaN}, "name": "b"}', []),
        (TORN, TORN, []),
        ("1 < 2 and <tool is no call", "1 < 2 and <tool is no call", []),
        ('<tool_call>{"name": "b", "arguments": {"s": "}}\\"{"}}</tool_call>', "", [("b", {"s": '}}"{'})]),
    ],
)  # fmt: skip
def test_what_models_say_otherwise(text, shown, calls):
    for cuts in ([], list(range(len(text)))):
        found, made = read(PLAIN, text, cuts)
        assert (found.strip(), made) == (shown, calls)


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.between])
def test_what_is_cut_where_a_further_call_begins_is_no_text(name):
    def written(*values):
        return FORMATS[name].written([{"function": {"name": "b", "arguments": {"i": value}}} for value in values])

    whole = written(1, 22222)
    begun = whole.index("{", whole.index("22222") - 10)  # of the second's arguments
    told = whole.index("1") + 2
    for end in range(told, begun):
        assert read(FORMATS[name], whole[:end], []) == ("", [("b", {"i": 1})]), whole[:end]
    assert read(FORMATS[name], written(1) + " I have called it.", [])[0].strip() == "I have called it."


def test_only_the_first_call_where_one_is_wanted():
    text = PLAIN.written([{"function": {"name": "b", "arguments": {"i": i}}} for i in range(3)])
    assert read(PLAIN, text, [], single=True) == ("", [("b", {"i": 0})])


@pytest.mark.parametrize(
    ("name", "begin", "middle", "several"),
    [
        ("QWEN", '<tool_call>\n{"name": "', '", "arguments": ', True),
        ("MISTRAL", '[TOOL_CALLS] [{"name": "', '", "arguments": ', True),
        ("LLAMA", '{"name": "', '", "parameters": ', False),
    ],
)
def test_how_a_template_writes_calls_is_found_out(embedded, name, begin, middle, several):
    template = ChatTemplate(getattr(templates, name), embedded.tokenizer, {"bos_token": "<s>", "eos_token": "</s>"})
    form = call_format(template)
    assert form.native
    assert (form.begin, form.middle, form.between is not None) == (begin, middle, several)


def test_a_template_without_a_section_for_tools_has_them_in_text(embedded):
    template = embedded.chat_template
    assert template.calls == PLAIN
    tool = Tool("b", {}, {"type": "function", "function": {"name": "b"}})
    call = {"id": "1", "type": "function", "function": {"name": "b", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "one", "tool_call_id": "1"}, {"role": "tool", "content": "two"},
    ]  # fmt: skip
    found = with_tools(template, messages, [tool])
    assert [message["role"] for message in found] == ["system", "user", "assistant", "user"]
    assert json.dumps(tool.definition) in found[0]["content"]
    assert read(PLAIN, found[2]["content"], []) == ("", [("b", {"x": 1})])
    assert "one" in found[3]["content"]
    assert "two" in found[3]["content"]
    assert template.render(found)


def test_definitions_and_arguments_cannot_write_a_templates_markers(embedded):
    added = next(iter(embedded.chat_template.hidden))
    source = "{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson }}{% endfor %}{{ tools | tojson }}"
    template = ChatTemplate(source, embedded.tokenizer)
    call = {"id": added, "function": {"name": "b", "arguments": {added: [added]}}}
    tools = [{"function": {"name": "b", "description": added, "parameters": {added: 1}}}]
    message = {"role": "user", "content": added, "tool_calls": [call]}
    ids = template.encode([message], tools=tools)
    assert embedded.tokenizer.token_to_id(added) not in ids
    assert embedded.tokenizer.decode(ids, skip_special_tokens=False).count(added) == 6


@pytest.mark.parametrize("parallel", [True, False])
def test_a_forced_answer_is_calls_with_valid_arguments(embedded, parallel):
    needs("llguidance")
    parameters = {
        "type": "object",
        "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 7}},
        "required": ["days"],
    }
    tools = [Tool("b", parameters, {}), Tool("get_weather", {"type": "object", "properties": {}}, {})]
    template = embedded.chat_template
    structure = forced_calls(template, template.calls, tools, parallel)
    session = embedded.session()
    session.append(embedded.encode("Call: "))
    for seed in range(5):
        constraint = embedded.grammar(structure).begin()
        responses = list(session.fork().generate(constraint=constraint, seed=seed, temperature=1.5, max_tokens=400))
        shown, calls = read(template.calls, "".join(response.text for response in responses), [])
        assert shown == ""
        assert 1 <= len(calls) <= (8 if parallel else 1)
        for name, arguments in calls:
            assert 1 <= arguments["days"] <= 7 if name == "b" else arguments == {}
