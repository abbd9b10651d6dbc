"""All that a chat template can do, one by one: known, and as dear as it is to what does it."""

# ruff: noqa: E501 # an attack a line

from __future__ import annotations

import jinja2
import pytest
from jinja2 import nodes
from jinja2.runtime import LoopContext, Macro, TemplateReference, Undefined
from jinja2.utils import Cycler, Joiner, Namespace
from markupsafe import Markup

from kvq.runtime.text import methods, operations, rewriting, values
from kvq.runtime.text.sandbox import Sandbox
from tests.attacks.test_template_allowances import HELPERS
from tests.attacks.test_templates import PAIRS, rounds, stopped_at_once

LOOP = "{% set ns = namespace(x=[]) %}"
ALIKE = "{% set s = 'a' * 200000 %}{% set t = 'ab' + 'a' * 90000 %}"
SHORT = "{% set s = 'a' * 2499 %}{% set t = 'a' * 600 + 'b' + 'a' * 600 %}"
STRIP = "{% set s = 'a' * 100000 %}{% set t = 'b' * 100000 + 'a' %}"
WIDE = "{% set s = '\u4e00' * 100000 %}{% set t = '\u4f00\u5000\u5100' * 30000 + '\u4e00' %}"
MARKUP = "{% set m = ('a' * 400000) | safe %}{% set h = namespace(__html__='a'.upper) %}"
HASHES = 2**61 - 1  # integers that it divides have the same hash
ALIKE_KEYS = f"{{% set r = range(0, {HASHES} * 15000, {HASHES}) %}}"

ATTACKS = {
    # what is looked for is compared with one number after the other
    "0.5 in range": "{% set r = range(100000) %}" + rounds("{% set x = 0.5 in r %}", 5000),
    "text in range": "{% set r = range(100000) %}" + rounds("{% set x = 'a' in r %}", 5000),
    "none in range": "{% set r = range(100000) %}" + rounds("{% set x = none in r %}", 5000),
    "nothing in range": "{% set r = range(100000) %}" + rounds("{% set x = nothing not in r %}", 5000),
    "none in a list": "{% set r = [1] * 100000 %}" + rounds("{% set x = none in r %}", 5000),
    "none in text": "{% set r = ['a' * 1000] * 1000 %}" + rounds("{% set x = none in r %}", 90000),
    # each character is looked up in a text
    "strip chars": STRIP + rounds("{% set x = s.strip(t) %}", 9000),
    "strip wide": WIDE + rounds("{% set x = s.strip(t) %}", 9000),
    "lstrip": STRIP + "{{ s.lstrip(t) }}",
    "rstrip": STRIP + "{{ s.rstrip(t) }}",
    "trim filter": STRIP + "{{ s | trim(t) }}",
    "trim filter wide": WIDE + rounds("{% set x = s | trim(chars=t) %}", 9000),
    "trim filter mapped": STRIP + "{{ [s] | map('trim', t) | list | length }}",
    # a text is looked for
    "rfind": ALIKE + "{{ s.rfind(t) }}",
    "rindex": ALIKE + "{{ s.rindex(t) }}",
    "rsplit": ALIKE + "{{ s.rsplit(t) | length }}",
    "rsplit by name": ALIKE + "{{ s.rsplit(sep=t) | length }}",
    "rpartition": ALIKE + "{{ s.rpartition(t) | length }}",
    **{
        f"{name} of a short text": SHORT + rounds(f"{{% set x = s.{name}(t) %}}", 20000)
        for name in ("find", "count", "rfind", "partition", "split", "rsplit")
    },
    "in a short text": SHORT + rounds("{% set x = t in s %}", 20000),
    "in a short text by a test": SHORT + rounds("{% set x = t is in s %}", 20000),
    "selected by a search": SHORT + rounds("{% set x = [t] | select('in', s) | list %}", 20000),
    "replace in a short text": SHORT + rounds("{% set x = s.replace(t, 'c') %}", 20000),
    "find of less": "{% set s = 'a' * 29000 %}{% set t = 'a' * 50 + 'b' + 'a' * 48 %}" + rounds("{% set x = s.find(t) %}", 9000),
    # keys that have the same hash
    "colliding unique": ALIKE_KEYS + "{{ r | list | unique | list | length }}",
    "colliding unique by attribute": ALIKE_KEYS + "{% set ns = namespace(x=[]) %}{% for i in r %}{% set ns.x = ns.x + [{'a': i}] %}{% endfor %}"
    "{{ ns.x | unique(attribute='a') | length }}",
    "colliding keys": f"{{{{ {{{HASHES}: 1, {2 * HASHES}: 2}} }}}}",
    "colliding keys of dict()": f"{{{{ dict([[{HASHES}, 1], [{2 * HASHES}, 2]]) }}}}",
    "colliding keys of a namespace": f"{{{{ namespace([({HASHES}, 1)]).a }}}}",
    "tuples of dict()": "{{ dict([[(1, 2), 1], [(2, 3), 1]]) }}",
    "unique tuples": "{{ [(1, 2), (2, 3)] | unique | list }}",
    # a tuple in itself is hashed
    "a tuple called": PAIRS + "{{ ns.x() }}",
    "a tuple as an attribute": PAIRS + "{{ 1 | attr(ns.x) }}",
    "a tuple as an attribute by name": PAIRS + "{{ 1 | attr(name=ns.x) }}",
    "a tuple as a filter": PAIRS + "{{ ns.x is filter }}",
    "a tuple as a test": PAIRS + "{{ ns.x is test }}",
    "a tuple that is unique": PAIRS + "{{ [ns.x] | unique | list | length }}",
    # text where a number is meant
    "text rounded": "{{ 'a' | round(9, 'ceil') | length }}",
    "a list rounded": "{{ [1] | round(9, 'floor') | length }}",
    "text that is odd": "{{ '%999999999d' is odd }}",
    "text that is even": "{{ '%999999999d' is even }}",
    "text that is divisible": "{{ '%999999999d' is divisibleby 1 }}",
    "text selected as odd": "{{ ['%999999999d'] | select('odd') | list }}",
    "much text that is lower": "{% set s = '\U000e0001' * 100000 %}{{ ([s] * 300) is lower }}",
    # integers
    "a long integer": "{{ " + "9" * 4200 + " }}",
    "a long integer in hexadecimal": LOOP + "{% set h = 0x" + "f" * 3500 + " %}" + rounds("{% set ns.x = [ns.x, -h] %}"),
    # paths of attributes that are read again and again
    "joined by a long path": "{% set a = 'x.' * 900000 %}{{ [1] * 9000 | join(attribute=a) }}{{ ([1] * 9000) | join('', a) }}",
    "summed by a long path": "{% set a = 'x.' * 900000 %}{{ ([1] * 9000) | sum(a) }}",
    "sorted by many": "{% set a = 'x,' * 9000 %}" + rounds("{% set x = ([1] * 900) | sort(attribute=a) %}"),
    # values that say for themselves how they are added
    "markup and a namespace": LOOP + MARKUP + rounds("{% set ns.x = [ns.x, m + h] %}"),
    "a namespace and markup": LOOP + MARKUP + rounds("{% set ns.x = [ns.x, h + m] %}"),
    # dates
    "wide dates": LOOP + rounds("{% set ns.x = [ns.x, strftime_now('%9999Y' * 16)] %}"),
    "comparing deep lists": "{% set ns = namespace(x=[1] * 100) %}" + "{% set ns.x = [ns.x] * 9 %}" * 3 + rounds("{% set x = ns.x == ns.x[:] %}"),
    "sorting long equal texts": "{% set s = ['a' * 10000 + 'b'] * 100 %}" + rounds("{% set x = s | sort %}"),
    "counting in a list of long texts": "{% set s = ['a' * 10000 + 'b'] * 100 %}{% set t = 'a' * 10000 + 'b' %}" + rounds("{{ s.count(t) }}"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_what_takes_long_is_taken_from_the_allowance(name):
    stopped_at_once(ATTACKS[name])


# What jinja2 and Python have beside what a template may use, as of the versions that this was looked through with.
# Whatever they add later is neither here nor in a table of kvq's: this fails, until someone has seen what it takes.
REFUSED_FILTERS = {
    "batch",
    "center",
    "format",
    "indent",
    "pprint",
    "slice",
    "striptags",
    "urlize",
    "wordwrap",
    "xmlattr",
}
OWN_FILTERS = {"join", "replace", "sum", "tojson", "unique"}
REFUSED_METHODS = {
    str: {
        "center",
        "encode",
        "expandtabs",
        "format",
        "format_map",
        "ljust",
        "maketrans",
        "rjust",
        "translate",
        "zfill",
    },
    dict: {"clear", "fromkeys", "pop", "popitem", "setdefault", "update"},
    list: {"append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"},
    tuple: set(),
    float: {"as_integer_ratio", "conjugate", "fromhex", "from_number", "hex"},
    int: {"as_integer_ratio", "bit_count", "conjugate", "from_bytes", "to_bytes"},
}
# Attributes of what a template has beside JSON values; of the methods, what can be called is what `Sandbox.call` knows.
PUBLIC = {
    range: {"count", "index", "start", "step", "stop"},
    LoopContext: {"changed", "cycle", "depth", "first", "index", "index0", "last", "length", "nextitem",
                  "previtem", "revindex", "revindex0"},
    Macro: set(),
    Namespace: set(),
    Cycler: {"current", "next", "reset"},
    Joiner: set(),
    Undefined: set(),
    TemplateReference: set(),
    Markup: {"escape", "striptags", "unescape"},
}  # fmt: skip
REFUSED_NODES = {
    "Block", "ContextReference", "DerivedContextReference", "EnvironmentAttribute", "EvalContextModifier",
    "ExprStmt", "Extends", "ExtensionAttribute", "FromImport", "Import", "ImportedName", "Include", "InternalName",
    "MarkSafe", "MarkSafeIfAutoescape", "OverlayScope", "ScopedEvalContextModifier",
}  # fmt: skip


def public(kind: type) -> set[str]:
    """Names that do not begin with a line."""
    return {name for name in dir(kind) if not name.startswith("_")}


def test_every_filter_is_known():
    tables = [*map(set, (operations.FREE, operations.SHALLOW, operations.DEEP, operations.TEXT)), OWN_FILTERS]
    known = set().union(*tables)
    assert sum(map(len, tables)) == len(known)
    assert set(Sandbox().filters) == known | set(HELPERS)
    assert set(jinja2.filters.FILTERS) == known | REFUSED_FILTERS


def test_every_test_is_known():
    tables = [operations.OUTSIDE, operations.COMPARING, operations.OF_NUMBERS, operations.OF_TEXT, operations.OF_NAMES]
    known = set().union(*tables)
    assert sum(map(len, tables)) == len(known)
    assert set(Sandbox().tests) == known == set(jinja2.tests.TESTS)


def test_every_function_is_known():
    names = {"range", "dict", "namespace", "cycler", "joiner", "raise_exception", "strftime_now"}
    assert set(Sandbox().globals) == names


@pytest.mark.parametrize("kind", methods.METHODS, ids=lambda kind: kind.__name__)
def test_every_method_is_known(kind):
    callables = {name for name in public(kind) if callable(getattr(kind, name))}
    refused = REFUSED_METHODS[kind]
    assert not methods.METHODS[kind] & refused
    assert callables <= methods.METHODS[kind] | refused
    if kind is str:
        assert {*methods.LOOKS, *methods.COPIES, *methods.SPLITS, "join", "replace"} == methods.METHODS[str]
        assert methods.METHODS[str] > methods.SEARCHES | methods.STRIPS


@pytest.mark.parametrize("kind", PUBLIC, ids=lambda kind: kind.__name__)
def test_every_attribute_is_known(kind):
    assert public(kind) - (public(str) if kind is Markup else set()) == PUBLIC[kind]


def test_every_statement_and_expression_is_known():
    found, waiting = set(), [nodes.Node]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__ == nodes.__name__ and not kind.__dict__.get("abstract"):
            found.add(kind)
    unknown = {kind.__name__ for kind in found if not issubclass(kind, rewriting.ALLOWED)}
    abstract = {"Node", "Stmt", "Expr", "Helper", "Literal", "BinExpr", "UnaryExpr"}
    assert unknown - abstract <= REFUSED_NODES


def test_every_operator_is_counted():
    sandbox = Sandbox()
    assert sandbox.intercepted_binops == set(sandbox.default_binop_table)
    assert set(operations.COMPARING.values()) < set(nodes._cmpop_to_func)
    assert set(nodes._cmpop_to_func) == set(values.COMPARISONS)
