"""Statistics: they add up to the arrays and tell what ran."""

from __future__ import annotations

import json

import pytest

from kvq.controller.policies import POLICIES
from kvq.runtime.compute.backends import BACKENDS
from kvq.runtime.machine.threads import configure
from tests.tools.kvdata import arrays_in
from tests.tools.sessions import CONTEXT, IDS, rows


@pytest.mark.parametrize(("recent", "sink"), [(0, 0), (16, 0), (16, 4), (3, 30), (CONTEXT, 0), (1000, 1000)])
@pytest.mark.parametrize("policy", ["fp16", "k4v2", "mixed", "rule"])
def test_stats_add_up_to_the_arrays_and_the_tokens(tiny_model, policy, recent, sink):
    session = tiny_model.session(policy, recent=recent, sink=sink)
    for count in (1, 15, 16, 40):
        session.append(IDS[:count])
        stats = session.stats()
        assert (
            sum(row["nbytes"] for row in stats.precisions.values())
            == stats.kv_nbytes
            == sum(a.nbytes for a in arrays_in(session.store))
        )
        assert sum(row["tokens"] for row in stats.precisions.values()) == stats.tokens == len(session.tokens)
        assert all(0 <= row["slack_nbytes"] <= row["nbytes"] for row in stats.precisions.values())
        assert stats.kv_peak_nbytes >= stats.kv_nbytes
        assert stats.kv_bits == pytest.approx(8 * stats.kv_nbytes / (2 * 3 * 4 * 8 * stats.tokens))
    assert stats.precisions["recent"]["tokens"] == min(recent, CONTEXT, len(session.tokens))
    assert stats.decode_tokens + stats.prefill_tokens == len(session.tokens)
    assert stats.decode_tokens == 1


def test_sink_tokens_are_stored_at_16_bits(tiny_model):
    session = tiny_model.session("int2", recent=0, sink=5)
    session.append(IDS[:30])
    assert rows(session) == {"k16v16": 5, "k2v2": 25}


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize(
    "policy", sorted(POLICIES.keys() - {"adaptive", "paper", "auto"})
)  # need training, or are another
def test_stats_report_the_policy_and_backend_that_ran(tiny_model, policy, backend):
    session = tiny_model.session(policy, recent=4, sink=2, backend=backend)
    assert session.stats().kv_bits is None
    session.append(IDS[:30])
    session.append(IDS[30:31])
    stats = session.stats()
    assert (stats.policy, stats.backend, stats.recent, stats.sink) == (policy, backend, 4, 2)
    assert stats.threads == configure(None)
    assert stats.ms_per_token > 0
    assert stats.gb_per_s > 0
    assert stats.prefill_tokens_per_s > 0


@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_stats_are_json_and_one_line(tiny_model, tokens):
    session = tiny_model.session("mixed")
    if tokens:
        session.append(IDS[:tokens])
    stats = session.stats()
    assert json.loads(json.dumps(stats.as_dict(), allow_nan=False)) == stats.as_dict()
    line = stats.line()
    assert "\n" not in line
    assert f"{tokens} tokens cached" in line
    assert "policy mixed" in line


def test_the_peak_stays_when_tokens_are_forgotten(tiny_model):
    session = tiny_model.session("int8", recent=4)
    session.append(IDS)
    peak = session.stats().kv_nbytes
    session.trim(8)
    stats = session.stats()
    assert stats.kv_nbytes < peak
    assert stats.kv_peak_nbytes >= peak
