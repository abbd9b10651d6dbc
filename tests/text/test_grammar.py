"""Structures as masks: whatever is drawn within them is what they ask for, and what they cannot hold is refused."""

from __future__ import annotations

import contextlib
import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq.runtime.errors import GrammarError
from kvq.runtime.text.grammar import MOST, MOST_CHOICES, Structure, structure_of
from kvq.runtime.text.schemas import MOST_PROPERTIES
from tests.tools.packages import needs
from tests.tools.schemas import REFUSED, SCHEMAS, problems
from tests.tools.work import bounded_work

needs("llguidance"), needs("jsonschema")
EOS = 0


def walk(model, structure: Structure, seed: int, most: int = 150) -> str | None:
    """A text of tokens drawn from the masks alone, short ones rather; None if it has no end in so many tokens."""
    tokenizer, vocab = model.tokenizer, model.architecture.vocab
    lengths = np.array([len(tokenizer.id_to_token(token) or "") for token in range(vocab)])
    constraint, draw, ids = model.grammar(structure).begin(), np.random.default_rng(seed), []
    for _ in range(most):
        allowed = np.flatnonzero(constraint.mask(np.zeros(vocab, np.float32), [EOS]) == 0)
        if EOS in allowed:
            return tokenizer.decode(ids, skip_special_tokens=False)
        weights = np.where(lengths[allowed] <= 2, 20.0, 1.0)
        ids.append(int(draw.choice(allowed, p=weights / weights.sum())))
        constraint.accept(ids[-1])
        if constraint.finished:
            return tokenizer.decode(ids, skip_special_tokens=False)
    return None


def holds(model, structure: Structure, text: str) -> bool:
    """Whether a text is complete within a structure."""
    constraint = model.grammar(structure).begin()
    try:
        for token in model.tokenizer.encode(text, add_special_tokens=False).ids:
            constraint.accept(token)
        return constraint.finished or bool(
            constraint.mask(np.zeros(model.architecture.vocab, np.float32), [EOS])[EOS] == 0
        )
    except GrammarError:
        return False


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_is_drawn_within_a_schema_is_valid(embedded, name):
    structure = structure_of(schema=SCHEMAS[name])
    drawn = [text for seed in range(4) if (text := walk(embedded, structure, seed)) is not None]
    assert [problem for text in drawn for problem in problems(SCHEMAS[name], text)] == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_schema_asks_for_and_cannot_have_is_named(embedded, name):
    schema, word = REFUSED[name]
    with pytest.raises(GrammarError) as caught:
        embedded.grammar(structure_of(schema=schema))
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.datetimes(), st.sampled_from(["Z", "+05:30", "-11:00"]))
@settings(max_examples=40, deadline=None)
def test_every_real_date_and_time_can_be_said(embedded, moment, offset):
    day, hour = moment.date().isoformat(), moment.time().isoformat() + offset
    for form, text in (("date", day), ("time", hour), ("date-time", f"{day}T{hour}")):
        assert holds(embedded, structure_of(schema={"type": "string", "format": form}), f'"{text}"')


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("date", "2023-02-29"),
        ("date", "1900-02-29"),
        ("date", "2023-04-31"),
        ("date", "0000-01-01"),
        ("date", "2023-13-01"),
        ("time", "24:00:00Z"),
        ("time", "12:00:60Z"),
        ("time", "12:00:00"),
        ("date-time", "2023-02-29T12:00:00Z"),
        ("date-time", "2024-02-29 12:00:00Z"),
    ],
)
def test_no_other_can(embedded, form, text):
    assert not holds(embedded, structure_of(schema={"type": "string", "format": form}), f'"{text}"')


def test_a_format_beside_a_pattern_and_one_that_is_a_name():
    from kvq.runtime.text.schemas import held_exactly

    both = held_exactly({"type": "string", "format": "date", "pattern": "^2024"})
    assert both["pattern"] == "^2024"
    assert len(both["allOf"]) == 1
    named = {
        "properties": {"format": {"const": {"format": "date"}}, "const": {"type": "string"}},
        "required": ["format"],
    }
    assert held_exactly(named) == named


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_choice_is_each_of_its_texts_and_no_other(embedded, texts):
    structure = structure_of(choice=texts)
    assert all(holds(embedded, structure, text) for text in texts)
    assert walk(embedded, structure, 1) in texts
    assert not holds(embedded, structure, "\x00none of them")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"schema": "{"}, "not JSON"),
        ({"schema": "[" * 5000}, "not JSON"),
        ({"schema": 5}, "a schema is a JSON object"),
        ({"schema": False}, "a schema is a JSON object"),
        ({"schema": {"a": {1, 2}}}, "not made of JSON values"),
        ({"schema": {"a": float("nan")}}, "not made of JSON values"),
        ({"schema": {"title": "x" * MOST["schema"]}}, "at most"),
        ({"schema": "x" * (MOST["schema"] + 1)}, "at most"),
        ({"regex": ""}, "not empty"),
        ({"regex": 5}, "must be text"),
        ({"regex": "x" * (MOST["regex"] + 1)}, "at most"),
        ({"regex": "\ud800"}, "surrogates"),
        ({"choice": "abc"}, "list of texts"),
        ({"choice": []}, "list of texts"),
        ({"choice": ["a", ""]}, "none of them empty"),
        ({"choice": [f"{i}" for i in range(MOST_CHOICES + 1)]}, "at most"),
        ({"choice": ["a"], "regex": "a"}, "exclude each other"),
        ({"grammar": None, "schema": {}, "regex": "a"}, "exclude each other"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_structure_is_refused(what, words):
    with pytest.raises(GrammarError, match=words):
        structure_of(**what)


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "what",
    [
        {"regex": "("},
        {"regex": "a(?=b)"},
        {"grammar": "start: ("},
        {"grammar": "begin: /a/"},
        {"schema": nested(70)},
        {"regex": "(a{1000}){1000}"},
        {"grammar": "start: " + " ".join(["(a|b)?"] * 20000) + '\na: "x"\nb: "x"'},
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_valid_or_without_bound_is_refused_soon(embedded, what):
    with pytest.raises(GrammarError) as caught:
        walk(embedded, structure_of(**what), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "what",
    [
        {"regex": "((a|b)*a(a|b){15})"}, {"regex": "(x+x+)+y"},
        {"regex": "[\\s\\S]{0,3000}x"}, {"regex": "(\\w{1,99} ){1,99}"},
        {"regex": "((a{1,99}){1,99}){1,99}"}, {"regex": "(\\p{L}{1,900} ){900}" * 20},
        {"schema": {"type": "string", "pattern": "(a{1000}){1000}"}},
        {"schema": {"properties": {f"p{i}": {"pattern": f"(a{i}{{900}}b){{900}}"} for i in range(200)}}},
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_is_costly_is_refused_or_comes_to_its_end(embedded, what):
    """It would not, and would take gigabytes, without the bounds of `LIMITS`; nothing else than a refusal is raised."""
    with contextlib.suppress(GrammarError):
        walk(embedded, structure_of(**what), 0, 60)


def test_without_the_package_the_extra_is_named(embedded, monkeypatch):
    from kvq.runtime.text import grammar

    monkeypatch.setattr(grammar, "missing", lambda *names: names[0])
    with pytest.raises(GrammarError, match=r"kvq-run\[schema\]"):
        grammar.Grammars(embedded.tokenizer.to_str(), 10, [0])


def test_one_grammar_serves_texts_that_go_different_ways(embedded):
    grammar = embedded.grammar(structure_of(choice=["ab", "cd"]))
    one, other = grammar.begin(), grammar.begin()
    for text, constraint in (("ab", one), ("cd", other)):
        for token in embedded.tokenizer.encode(text, add_special_tokens=False).ids:
            constraint.accept(token)
    assert one.finished
    assert other.finished
    assert json.loads(grammar.structure.text) == ["ab", "cd"]


BOMBS = {
    "rules that name each other in turn": {
        "grammar": "start: r0\n" + "\n".join(f'r{i}: "{i % 7}" r{i + 1}?' for i in range(2800)) + '\nr2800: "x"'
    },
    "definitions that name each other in turn": {
        "schema": {"$ref": "#/$defs/d0", "$defs": {"d1400": {"type": "string"}, **{
            f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(1400)}}}
    },
    "references alone": {
        "schema": {"$ref": "#/$defs/d0", "$defs": {"d3500": {"type": "string"}, **{
            f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3500)}}}
    },
    "terminals in turn": {
        "grammar": "start: T0\n" + "\n".join(f'T{i}: "{i % 7}" T{i + 1}' for i in range(3400)) + '\nT3400: "x"'
    },
    "many properties": {"schema": {"properties": {f"p{i}": {"type": "integer"} for i in range(2000)}}},
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_structures_as_deep_as_their_size_allows_end_no_process(embedded, name):
    with bounded_work(clock=time.process_time), contextlib.suppress(GrammarError):
        constraint = embedded.grammar(structure_of(**BOMBS[name])).begin()
        constraint.mask(np.zeros(embedded.architecture.vocab, np.float32), [EOS])


SEARCHED = [{"type": "string", "pattern": f"^.*[ab].{{{i}}}$"} for i in range(10, 40)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"schema": {"allOf": SEARCHED}}, "patterns"),
        ({"schema": {"$ref": "#/$defs/0", "$defs": {
            str(i): {"$ref": f"#/$defs/{i + 1}", **part} for i, part in enumerate(SEARCHED)}}}, "patterns"),
        ({"grammar": "start: T\nT: " + " & ".join(f"/.*{i}.*/" for i in range(500))}, "joins"),
        ({"grammar": "start: %json " + json.dumps({"allOf": SEARCHED})}, "patterns"),
        ({"schema": {"properties": {f"p{i}": {} for i in range(MOST_PROPERTIES + 1)}}}, "properties"),
        ({"grammar": "start: T\nT: " + " & ".join(f"/(a|b)*a(a|b){{{i}}}/" for i in range(22))}, "joins"),
        ({"schema": {"type": "integer", "multipleOf": 3_999_971}}, "multipleOf"),
        ({"schema": {"anyOf": [{"type": "integer", "multipleOf": each} for each in (997, 991, 983)]}}, "multipleOf"),
        ({"schema": {"items": {"multipleOf": 0.123456789}}}, "multipleOf"),
        ({"grammar": 'start: %json {"type": "integer", "multipleOf": 999983}'}, "multipleOf"),
        ({"schema": {"properties": {f"p{i}": {"multipleOf": 9001 + i} for i in range(900)}}}, "multipleOf"),
        ({"schema": {"allOf": 3, "format": "date", "pattern": "a"}}, "allOf"),
    ],
    ids=["allOf", "references with patterns", "terminals", "a schema in a grammar", "properties", "some terminals",
         "a prime", "three primes", "many digits", "a multiple in a grammar", "many multiples", "allOf of a number"],
)  # fmt: skip
def test_what_takes_exponential_work_is_refused_before(embedded, options, named):
    with pytest.raises(GrammarError, match=named):
        embedded.grammar(structure_of(**options))


@pytest.mark.parametrize("multiple", [0.01, 0.25, 5, 7, 360, 1000, 1e-9, 9973])
def test_usual_multiples_are_held_to(embedded, multiple):
    begun = time.process_time()
    embedded.grammar(structure_of(schema={"type": "number", "multipleOf": multiple, "minimum": 0, "maximum": 1e6}))
    assert time.process_time() - begun < 20


def test_patterns_beside_each_other_are_not_joined(embedded):
    properties = {f"p{i}": {"type": "string", "pattern": f"^{i}+$"} for i in range(30)}
    described = {"$ref": "#/$defs/a", "description": "of it", "$defs": {"a": {"properties": properties}}}
    embedded.grammar(structure_of(schema=described))
    embedded.grammar(structure_of(grammar="start: " + json.dumps("&" * 100)))
