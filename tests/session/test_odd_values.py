"""Arguments of types that arrays and files bring with them: they mean their number, or are refused by name."""

from __future__ import annotations

import decimal
import fractions
import warnings

import numpy as np
import pytest

from kvq.runtime.errors import KvqError

PROMPT = list(range(1, 40))
SMALL = [np.uint8, np.int8, np.uint16, np.int64, np.uint64]
NUMBERS = [np.uint8(8), np.int16(8), np.float16(8), np.float32(8), np.longdouble(8), fractions.Fraction(8), 8.0]
# Of no option the value, each a trap of its own: infinite and NaN of small types, seconds, which numpy takes for whole
# numbers, arrays that call themselves iterable, numbers beyond floats.
TRAPS = {
    "half infinity": np.float16("inf"),
    "half NaN": np.float16("nan"),
    "infinity of 80 bits": np.longdouble("inf"),
    "a complex number": np.complex64(1),
    "seconds": np.timedelta64(3, "s"),
    "a day": np.datetime64("2020-01-01"),
    "an array without a dimension": np.array(8),
    "a matrix": np.zeros((2, 2)),
    "no numbers": np.zeros(0),
    "objects": np.array([1, "a", None], object),
    "structures": np.zeros(2, [("a", int)]),
    "a decimal": decimal.Decimal(8),
    "a signalling NaN": decimal.Decimal("sNaN"),
    "a huge fraction": fractions.Fraction(10**400),
    "a huge number": 10**400,
    "a number far below nought": -(10**400),
    "bytes": b"8",
    "half a surrogate pair": "\ud800",
    "a long text": "x" * 100_000,
    "a function": None.__init__,
}
SESSION = ("policy", "recent", "sink", "prefill_chunk", "prefill", "backend", "kv_bits", "kv_memory", "protect_bits")
GENERATION = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "seed", "stop", "stop_tokens", "draft", "choice", "top_logprobs",
    "context_shift",
)  # fmt: skip
ACCEPTED = {
    ("a huge number", "seed"), ("a huge number", "top_k"), ("a huge number", "max_tokens"), ("no numbers", "stop"),
    ("no numbers", "stop_tokens"), ("no numbers", "logits_processor"), ("a function", "context_shift"),
    ("half infinity", "temperature"), ("infinity of 80 bits", "temperature"),
    ("half a surrogate pair", "stop"), ("a long text", "stop"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def said(model, settings, **options):
    session = model.session(**settings)
    session.append(PROMPT)
    return [each.token for each in session.generate(**{"max_tokens": 6, "seed": 3, "ignore_eos": True} | options)]


@pytest.mark.parametrize("backend", ["native", "numpy"])
@pytest.mark.parametrize("kind", SMALL)
def test_whole_numbers_of_few_bits_mean_what_they_say(kind, backend, tiny_model):
    expected = said(tiny_model, {"policy": "int4", "backend": backend, "recent": 12, "sink": 3}, top_k=17)
    settings = {"policy": "int4", "backend": backend, "recent": kind(12), "sink": kind(3), "prefill_chunk": kind(100)}
    options = {"top_k": kind(17), "seed": kind(3), "max_tokens": kind(6), "draft": kind(0), "stop_tokens": [kind(3)]}
    assert said(tiny_model, settings, **options)[:3] == expected[:3]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: type(number).__name__)
def test_a_budget_of_any_kind_of_number_is_that_number(number, tiny_model):
    found, wanted = tiny_model.session("rule", kv_bits=number), tiny_model.session("rule", kv_bits=8)
    np.testing.assert_array_equal(found.append(PROMPT), wanted.append(PROMPT))
    assert found.budget.kv_bits == 8


@pytest.mark.parametrize("trap", TRAPS)
def test_what_is_no_value_of_an_option_is_refused_by_name(trap, tiny_model):
    for name in (*SESSION, *GENERATION):
        settings = {name: TRAPS[trap]} if name in SESSION else {}
        options = {name: TRAPS[trap]} if name in GENERATION else {}
        if name in ("kv_bits", "kv_memory"):
            settings["policy"] = "rule"
        if (trap, name) in ACCEPTED:
            continue
        with pytest.raises(KvqError) as caught:
            said(tiny_model, settings, **options)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500
