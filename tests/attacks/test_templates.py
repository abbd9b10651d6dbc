"""Chat templates made to run for ever or to fill memory: each is refused by name, at once, and before it does."""

# ruff: noqa: E501 # templates as they are published, and one an attack

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest

import kvq
from kvq.runtime.text.rewriting import MOST_NODES
from kvq.runtime.text.sandbox import MOST_TEMPLATE_BYTES
from kvq.runtime.text.template import ChatTemplate
from tests.tools.chats import USER
from tests.tools.tree import ROOT
from tests.tools.work import bounded_work

MOST_NBYTES = 100_000_000

NESTED = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
PAIRS = "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"
MAPS = "{% set ns = namespace(x={}) %}{% for i in range(60) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}"
BIG = "{% set s = 'ab' * 50000 %}"
WIDE = "{% set s = '😀' * 30000 %}"
NUMBER = "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}"


def rounds(body: str, count: int = 90_000) -> str:
    """A body in a loop."""
    return f"{{% for i in range({count}) %}}{body}{{% endfor %}}"


# What holds itself many times, in whatever looks at all of it.
SHARED = {
    "shown": "{{ ns.x }}",
    "tojson": "{{ ns.x | tojson }}",
    "tojson with an indent": "{{ ns.x | tojson(indent=4) }}",
    "string": "{{ ns.x | string | length }}",
    "equal to its like": "{{ ns.x == [ns.x, ns.x][1] }}{% set ns.y = [ns.x] %}{{ ns.y == [[ns.x[0], ns.x[1]]] }}",
    "less": "{{ [ns.x[0], 1] < [ns.x[1], 2] }}",
    "in": "{{ [1] in ns.x }}",
    "not in": "{{ ns.x not in [1, [ns.x[0], ns.x[1]]] }}",
    "joined": "{{ ns.x | join }}",
    "joined by a method": "{{ ','.join(ns.x) }}",
    "concatenated": "{{ 'a' ~ ns.x }}",
    "replaced": "{{ ns.x | replace('1', '2') }}",
    "replaced by": "{{ 'a' | replace('a', ns.x) }}",
    "formatted": "{{ '%s' % (ns.x,) }}",
    "formatted by representation": "{{ '%r' % (ns.x,) }}",
    "upper": "{{ ns.x | upper }}",
    "trimmed": "{{ ns.x | trim }}",
    "escaped": "{{ ns.x | e }}",
    "sorted": "{{ [ns.x, [ns.x[0], ns.x[1]]] | sort | length }}",
    "unique": "{{ [ns.x, ns.x] | unique | list | length }}",
    "the largest": "{{ [ns.x, [ns.x[0], ns.x[1]]] | max | length }}",
    "grouped": "{{ [{'a': ns.x}, {'a': ns.x}] | groupby('a') | length }}",
    "selected": "{{ [ns.x] | select('equalto', [ns.x[0], ns.x[1]]) | list | length }}",
    "selected by attribute": "{{ [{'a': ns.x}] | selectattr('a', 'in', [[ns.x[0]]]) | list | length }}",
    "mapped to text": "{{ [ns.x] | map('string') | list | length }}",
    "tested": "{{ ns.x is lower }}",
    "tested for equality": "{{ ns.x is eq [ns.x[0], ns.x[1]] }}",
    "counted": "{{ [ns.x].count([ns.x[0], ns.x[1]]) }}",
    "found": "{{ [ns.x].index([ns.x[0], ns.x[1]]) }}",
    "of a namespace": "{{ ns }}",
    "of a list of a namespace": "{{ [ns] }}{{ ns | string }}{{ [ns] | tojson }}",
    "summed": "{{ [ns.x, ns.x] | sum(start=[]) }}",
    "as a refusal": "{{ raise_exception(ns.x) }}",
    "changed": "{% for i in range(3) %}{{ loop.changed([ns.x[0], ns.x[1]]) }}{% endfor %}",
    "of the items": "{% set d = {'a': ns.x} %}{{ d.items() }}{{ d.values() }}{{ d | items }}",
    "in a macro": "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(ns.x) | length }}",
    "in a block": "{% set y %}{{ ns.x }}{% endset %}{{ y | length }}",
    "rounded": "{{ ns.x | urlencode }}",
}
KEYS = {
    "a key": "{{ {ns.x: 1} | length }}",
    "looked up": "{{ {}[ns.x] }}",
    "looked up by a method": "{{ {}.get(ns.x) }}",
    "in a dictionary": "{{ ns.x in {} }}",
    "of dict()": "{{ dict([[ns.x, 1]]) }}",
}
BOMBS = {
    **{f"a list in itself, {how}": NESTED + use for how, use in SHARED.items()},
    **{f"a tuple in itself, {how}": PAIRS + use for how, use in KEYS.items()},
    "a dictionary in itself": MAPS + "{{ ns.x }}",
    "a dictionary in itself as JSON": MAPS + "{{ ns.x | tojson(sort_keys=true) }}",
    "lists in depth": "{% set ns = namespace(x=[]) %}" + rounds("{% set ns.x = [ns.x] %}") + "{{ ns.x }}",
    "an integer multiplied by itself": NUMBER + "{{ ns.n }}",
    "an integer squared": NUMBER.replace("ns.n * ns.n", "ns.n ** 2") + "{{ ns.n % 7 }}",
    "an integer as text in hexadecimal": "{{ ('f' * 900000) | int(base=16) }}",
    "a factorial": "{% set ns = namespace(n=1) %}" + rounds("{% set ns.n = ns.n * (i + 1) %}"),
    "powers": rounds("{% set x = 999 ** 999 %}" * 20),
    "attributes that are not there": rounds("{% set x = i.q %}{% set x = 'a'['q'] %}" * 20),
    "unsafe attributes": rounds("{% set x = ''|attr('__class__') %}{% set x = ''.__class__ %}" * 20),
    "filters of nothing": rounds("{% set x = i|filesizeformat %}{% set x = 'abc'|random %}" * 20),
    "blocks of nothing": rounds("{% filter upper %}a{% endfilter %}{% set x %}a{% endset %}" * 20),
    "the time": rounds("{% set x = strftime_now('%c%c%c%c%c%c%c%c%c%c%c%c') %}" * 20),
    "keeping loops": "{% set ns = namespace(x=[]) %}" + rounds("{% for j in 'a' %}{% set ns.x = [ns.x, loop] %}{% endfor %}"),
    "keeping large integers": "{% set ns = namespace(x=[]) %}" + rounds("{% set ns.x = [ns.x, 2 ** 900 + i] %}"),
    "keeping slices": "{% set ns = namespace(x=[]) %}{% set s = [1] * 9000 %}" + rounds("{% set ns.x = [ns.x, s[1:]] %}"),
    "keeping items": "{% set ns = namespace(x=[]) %}{% set d = {1: 1, 2: 2, 3: 3} %}" + rounds("{% set ns.x = [ns.x, d.items()] %}"),
    "a float of millions of digits": "{{ ('9' * 3000000) | float }}",
    "a long shift": "{% set ns = namespace(n=1) %}" + rounds("{% set ns.n = ns.n + ns.n %}"),
    "rounding to many places": "{{ 1.5 | round(999999999, 'floor') }}",
    "lower": BIG + rounds("{% set x = s | lower %}"),
    "trim": BIG + rounds("{% set x = s | trim %}"),
    "title": WIDE + rounds("{% set x = s | title %}"),
    "counting words": BIG + rounds("{{ s | wordcount }}"),
    "escaping": "{% set s = '<' * 100000 %}" + rounds("{% set x = s | e %}"),
    "escaping what is escaped": "{% set ns = namespace(s='<' | e) %}" + rounds("{% set ns.s = ns.s + (ns.s | string) %}"),
    "stripping": BIG + rounds("{% set x = s.strip() %}"),
    "looking for": BIG + rounds("{{ s.find('bb') }}"),
    "a slow search": "{% set s = 'a' * 100000 %}{% set t = 'a' * 5000 + 'b' %}" + rounds("{{ t in s }}"),
    "comparing": BIG + "{% set t = 'ab' * 50000 %}" + rounds("{{ s == t }}"),
    "comparing lists": "{% set s = [1] * 20000 %}{% set t = [1] * 20000 %}" + rounds("{{ s == t }}"),
    "reversing": BIG + rounds("{% set x = s[::-1] %}"),
    "slicing lists": "{% set s = [1] * 50000 %}" + rounds("{% set x = s[1:] %}"),
    "splitting": "{% set s = 'a ' * 100000 %}" + rounds("{% set x = s.split() %}"),
    "splitting once, finely": "{% set s = 'ab ' * 1000000 %}{% set x = s.split(' ') %}",
    "splitting lines": "{% set s = 'ab\n' * 1000000 %}{% set x = s.splitlines(true) %}",
    "splitting by nothing": "{% set s = 'ab ' * 1000000 %}{% set x = s.rsplit() %}",
    "a list of characters": "{% set s = '😀' * 900000 %}{% set x = s | list %}",
    "mapping characters": WIDE + rounds("{% set x = s | map('upper') | list %}"),
    "reversing by a filter": WIDE + rounds("{% set x = s | reverse %}"),
    "sorting": "{% set s = 'ba' * 20000 %}" + rounds("{% set x = s | sort %}"),
    "unique characters": "{% set s = 'ba' * 20000 %}" + rounds("{% set x = s | unique %}"),
    "attributes of attributes": "{% set a = 'x.' * 9000 %}" + rounds("{% set x = [1] * 900 | map(attribute=a) | list %}"),
    "replacing": BIG + rounds("{% set x = s.replace('a', 'bb') %}"),
    "replacing with much": BIG + "{{ s | replace('a', s) }}",
    "joining with much": BIG + "{{ s | join(s) }}{{ s.join(s) }}",
    "joining pieces": "{% set s = [1] * 90000 %}" + rounds("{% set x = s | join('') %}"),
    "formatting many fields": "{{ ('%999d' * 100000) % ((1,) * 100000) }}",
    "formatting much": BIG + "{{ ('%s' * 1000) % ((s,) * 1000) }}",
    "formatting by name": BIG + "{{ ('%(a)s' * 1000) % {'a': s} }}",
    "a wide precision": "{{ '%.999999999f' % 1 }}",
    "repeating": "{{ 'a' * 999999999 }}{{ 999999999 * 'a' }}",
    "repeating a tuple": "{{ (1,) * 999999999 }}",
    "adding lists": "{% set ns = namespace(x=[1]) %}" + rounds("{% set ns.x = ns.x + ns.x %}"),
    "adding to a list": "{% set ns = namespace(x=[1]) %}" + rounds("{% set ns.x = ns.x + [i] %}"),
    "adding to a text": "{% set ns = namespace(x='') %}" + rounds("{% set ns.x = ns.x + 'abcdefgh' %}"),
    "concatenating to a text": "{% set ns = namespace(x='') %}" + rounds("{% set ns.x = ns.x ~ 'abcdefgh' %}"),
    "keeping ranges": "{% set ns = namespace(x=[]) %}" + rounds("{% set ns.x = [ns.x, range(99) | list] %}"),
    "keeping dictionaries": "{% set ns = namespace(x=[]) %}" + rounds("{% set ns.x = [ns.x, {}, {}, {}, {}] %}"),
    "keeping namespaces": "{% set ns = namespace(x=[]) %}" + rounds("{% set ns.x = [ns.x, namespace(a=1)] %}"),
    "keeping texts": "{% set ns = namespace(x=[]) %}" + rounds("{% set ns.x = [ns.x, 'a' ~ i] %}"),
    "keeping what a macro says": "{% macro m() %}" + "text " * 9000 + "{% endmacro %}{% set ns = namespace(x=[]) %}"
    + rounds("{% set ns.x = [ns.x, m()] %}"),
    "keeping blocks": "{% set ns = namespace(x=[]) %}"
    + rounds("{% set b %}" + "text " * 9000 + "{% endset %}{% set ns.x = [ns.x, b] %}"),
    "keeping what a call says": "{% macro m() %}{{ caller() }}{% endmacro %}"
    + rounds("{% call m() %}" + "text " * 9000 + "{% endcall %}"),
    "keeping cyclers": "{% set ns = namespace(x=[]) %}" + rounds("{% set ns.x = [ns.x, cycler(1, 2, 3, 4)] %}"),
    "showing text": rounds("text " * 2000),
    "loops in loops": rounds(rounds("")),
    "loops in loops in loops": rounds(rounds(rounds("", 300), 300), 300),
    "a loop of a long body": rounds("{% set x = i %}" * 2000),
    "a loop of conditions that never hold": rounds("{% for i in range(90000) if not (" + " and ".join(["i == i"] * 99) + ") %}"
    "{% endfor %}", 9),
    "a loop over text": BIG + rounds("{% for c in s %}{% endfor %}", 1000),
    "a loop that calls itself": "{% for i in [1] recursive %}{{ loop([1, 1, 1]) }}{% endfor %}",
    "a loop that calls itself on much": "{% set s = [1] * 90000 %}{% for i in [1] recursive %}{{ loop(s) }}{% endfor %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) ~ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "macros by turns": "{% macro a(n) %}{{ b(n) }}{{ b(n) }}{% endmacro %}{% macro b(n) %}{% if n %}{{ a(n - 1) }}{% endif %}"
    "{% endmacro %}{{ a(60) }}",
    "many arguments": "{% set s = [1] * 90000 %}" + rounds("{{ cycler(*s) }}"),
    "the length of a loop": BIG + rounds("{% for c in s %}{{ loop.length }}{% break %}{% endfor %}"),
    "batches": "{{ range(9) | batch(999999999, 'x') | list }}",
    "indenting": "{{ ('a\n' * 9999) | indent(99999) }}",
    "wide JSON of much": "{{ ([[1]] * 90000) | tojson(indent=16, separators=('x' * 16, 'y' * 16)) }}",
    "removing tags": "{{ ('<!---->' * 90000) | striptags }}",
    "pretty printing": NESTED + "{{ ns.x | pprint }}",
    "a constant that is computed before": "{{ ('a' * 99999999) | upper | length }}",
    "a range of ranges": "{{ range(range(10 ** 9) | length) }}",
    "filling a line": "{{ 'x'.rjust(10 ** 9) }}{{ 'x'.zfill(10 ** 9) }}{{ '\t'.expandtabs(10 ** 9) }}",
    "formatting by a method": "{{ '{:>999999999}'.format(1) }}",
    "a bare format": "{{ '%999999999s' | format('x') }}",
}  # fmt: skip


def stopped_at_once(source):
    """Checks that a template is refused in one line before it has done much."""
    with bounded_work(), pytest.raises(kvq.ChatTemplateError) as caught:
        ChatTemplate(source).render([USER])
    assert str(caught.value).startswith("the chat template ")
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_without_end_is_stopped_by_name_at_once(name):
    stopped_at_once(BOMBS[name])


@pytest.mark.slow
def test_templates_without_end_take_no_memory():
    """All of them in one process, as the system counts its memory."""
    command = "from tests.attacks.test_templates import peak; print(peak())"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after - before < MOST_NBYTES


def peak() -> str:
    """Most bytes that this process has had before and after all templates that fill memory in ways of their own."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    for name, source in BOMBS.items():
        if not name.startswith("a list in itself"):
            with contextlib.suppress(kvq.ChatTemplateError):
                ChatTemplate(source).render([USER])
    return f"{before} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}"


SOURCES = {
    "too long": "x" * (MOST_TEMPLATE_BYTES + 1),
    "many expressions": "{{ a }}" * MOST_NODES,
    "a long list": "{{ [" + "1," * MOST_NODES + "] }}",
    "a long sum": "{{ " + "1+" * 30000 + "1 }}",
    "deep brackets": "{{ " + "(" * 60000,
    "deep lists": "{{ " + "[" * 30000 + "]" * 30000 + " }}",
    "deep conditions": "{% if a %}" * 5000,
    "many negations": "{{ " + "not " * 30000 + "a }}",
    "many brackets of a template": "{" * 100_000,
    "a block": "{% block a %}{% endblock %}",
    "inheritance": "{% extends 'a' %}",
    "an import": "{% from 'os' import path %}",
    "an autoescape": "{% autoescape true %}{% endautoescape %}",
    "a statement": "{% do 1 %}",
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_takes_long_to_compile_is_refused(name):
    with bounded_work(), pytest.raises(kvq.ChatTemplateError, match="export the bundle"):
        ChatTemplate(SOURCES[name])
