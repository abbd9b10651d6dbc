"""Templates that would give themselves more than they are allowed: what counts has no name that a template can say."""

# ruff: noqa: E501 # an attack a line

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import SecurityError

import kvq
from kvq.runtime.text import rewriting, sandbox
from kvq.runtime.text.allowance import Allowance
from kvq.runtime.text.sandbox import Sandbox
from kvq.runtime.text.template import ChatTemplate
from tests.attacks.test_templates import PAIRS, rounds
from tests.tools.chats import USER
from tests.tools.work import bounded_work

HELPERS = (rewriting.COMPARED, rewriting.CONCATENATED, rewriting.COUNTED, rewriting.HASHED, rewriting.SHOWN,
           rewriting.SLICED, rewriting.SPENT)  # fmt: skip
BARE = [name.strip("()") for name in HELPERS]
MUCH = "{% set x = 'a' * 3000000000 %}{{ x | length }}" + rounds(rounds(""))
# Ways to say the name of a filter or a test.
WAYS = {
    "by its name": "{{ (-10 ** 13) | NAME(-10 ** 13) }}",
    "in a block": "{% filter NAME(-10 ** 13) %}{% endfilter %}",
    "of a block that is set": "{% set x | NAME(-10 ** 13) %}{% endset %}",
    "in a loop": "{% for x in range(9) | NAME(-10 ** 7) %}{% endfor %}",
    "mapped": "{{ [-10 ** 13] | map('NAME', -10 ** 13) | list }}",
    "mapped by a name made up": "{{ [-10 ** 13] | map('NA' ~ 'ME', -10 ** 13) | list }}",
    "mapped twice": "{{ [[-10 ** 13]] | map('map', 'NAME', -10 ** 13) | list }}",
    "selected": "{{ [-10 ** 13] | select('NAME', -10 ** 13) | list }}",
    "rejected": "{{ [-10 ** 13] | reject('NAME', -10 ** 13) | list }}",
    "selected by attribute": "{{ [{'a': -10 ** 13}] | selectattr('a', 'NAME', -10 ** 13) | list }}",
    "rejected by attribute": "{{ [{'a': -10 ** 13}] | rejectattr('a', 'NAME', -10 ** 13) | list }}",
    "tested": "{{ -10 ** 13 is NAME(-10 ** 13) }}",
    "called": "{{ NAME(-10 ** 13, -10 ** 13) }}",
    "of the template": "{{ self.NAME(-10 ** 13, -10 ** 13) }}{{ self['NAME'](-1, -1) }}",
    "of the environment": "{{ environment.filters['NAME'](-10 ** 13, -10 ** 13) }}",
    "of the context": "{{ context.environment.filters['NAME'](-10 ** 13) }}",
    "of a macro": "{% macro m() %}{% endmacro %}{{ m._environment.filters['NAME'](-10 ** 13) }}",
    "of a macro by a filter": "{% macro m() %}{% endmacro %}{{ (m | attr('_environment')).filters['NAME'](-10 ** 13) }}",
    "of a function": "{{ range.__self__.operations.NAME(-10 ** 13, -10 ** 13) }}",
    "of a function by a filter": "{{ (range | attr('__self__')).operations.NAME(-10 ** 13, -10 ** 13) }}",
    "of a loop": "{% for x in [1] %}{{ loop._iterable.gi_frame.f_locals['self'].NAME(-10 ** 13) }}{% endfor %}",
    "imported": "{% from 'x' import NAME %}{{ NAME(-10 ** 13, -10 ** 13) }}",
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_what_counts_cannot_be_named(way):
    for name in (*HELPERS, *BARE):
        with bounded_work(), pytest.raises(kvq.ChatTemplateError):
            ChatTemplate(WAYS[way].replace("NAME", name) + MUCH).render([USER])


NAMES = {
    "mapped by a tuple": PAIRS + "{{ [1] | map(ns.x) | list }}",
    "selected by a tuple": PAIRS + "{{ [1] | select(ns.x) | list }}",
    "selected by an attribute and a tuple": PAIRS + "{{ [{'a': 1}] | selectattr('a', ns.x) | list }}",
    "mapped by a list": "{{ [1] | map([]) | list }}",
    "mapped by a number": "{{ [1] | map(1) | list }}",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_text_is_refused(name):
    with bounded_work(), pytest.raises(kvq.ChatTemplateError, match="it names no filter"):
        ChatTemplate(NAMES[name]).render([USER])


@pytest.mark.parametrize("take", ["step", "make", "read", "copy"])
@pytest.mark.parametrize("amount", [-1, -(10**13), 0.5, -0.5, True, None, "1", float("nan"), float("-inf"), [1]])
def test_an_allowance_takes_counts_and_gives_nothing_back(take, amount):
    allowance = Allowance()
    allowance.begin([])
    before = allowance.steps, allowance.characters
    with pytest.raises(SecurityError, match="cannot be counted"):
        getattr(allowance, take)(amount)
    assert (allowance.steps, allowance.characters) == before


class Watched(Allowance):
    """An allowance that notes when it grows."""

    grown: list[tuple[str, int, int]] = []  # noqa: RUF012 # of all threads
    begun = False

    def begin(self, *values):
        self.begun = False
        super().begin(*values)
        self.begun = True

    def __setattr__(self, name, value):
        if self.begun and name in ("steps", "characters") and value > getattr(self, name):
            self.grown.append((name, getattr(self, name), value))
        super().__setattr__(name, value)


FILTERS = [*Sandbox().filters, *BARE]
TESTS = [*Sandbox().tests, *BARE]
numbers = st.sampled_from(["-1", "0", "-10 ** 13", "2", "-0.5", "true", "none", "10 ** 9", "(2 ** 61 - 1)"])
leaves = numbers | st.sampled_from(
    ["'a'", "''", "messages", "messages[0]", "range(5)", "[1, -7]", "{'a': -1}", "ns", "ns.x", "loop", "'%s %999d'",
     "self", "m", "m()", "cycler(1, -2)", "nothing", "range", "('a', (-3, 2))", "'a' * 999", "'((spent))'"]
)  # fmt: skip


def _grown(inner):
    names, tests = st.sampled_from(FILTERS).map(repr), st.sampled_from(TESTS).map(repr)
    return st.one_of(
        st.builds("({} | {})".format, inner, st.sampled_from(FILTERS)),
        st.builds("({} | {}({}))".format, inner, st.sampled_from(FILTERS), inner),
        st.builds("({} | {}({}, {}))".format, inner, st.sampled_from(FILTERS), inner, inner),
        st.builds("([{}] | map({}, {}))".format, inner, names | inner, inner),
        st.builds("({} | map({}))".format, inner, names | inner),
        st.builds("([{}] | select({}, {}))".format, inner, tests | inner, inner),
        st.builds("([{{'a': {}}}] | rejectattr('a', {}, {}))".format, inner, tests | inner, inner),
        st.builds("({} is {} {})".format, inner, st.sampled_from(TESTS), inner | st.just("")),
        st.builds(
            "({} {} {})".format,
            inner,
            st.sampled_from(["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or"]),
            inner,
        ),
        st.builds("{}[{}:{}:{}]".format, inner, inner, inner, numbers),
        st.builds(
            "({}).{}({})".format,
            inner,
            st.sampled_from(["strip", "split", "find", "get", "count", "rsplit", "x"]),
            inner,
        ),
    )


expressions = st.recursive(leaves, _grown, max_leaves=8)
statements = st.lists(
    st.one_of(
        st.builds("{{{{ {} }}}}".format, expressions),
        st.builds("{{% set ns.x = {} %}}".format, expressions),
        st.builds("{{% for x in {} %}}{{{{ {} }}}}{{% endfor %}}".format, expressions, expressions),
        st.builds("{{% if {} %}}{{% endif %}}".format, expressions),
    ),
    max_size=4,
).map("".join)


@given(body=statements)
@settings(max_examples=400, deadline=None)
def test_no_template_adds_to_its_allowance(body):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "Allowance", Watched)
        Watched.grown.clear()
        source = "{% set ns = namespace(x=1) %}{% macro m() %}{% endmacro %}" + body
        with contextlib.suppress(kvq.ChatTemplateError):
            ChatTemplate(source).render([USER])
        assert not Watched.grown
