"""Statistics: they add up to the arrays and tell what ran."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kvq.controller.policies import POLICIES
from kvq.runtime.compute.backends import BACKENDS
from kvq.runtime.errors import PolicyError
from kvq.runtime.kv.records import stored_tokens
from kvq.runtime.machine.threads import configure
from kvq.runtime.policy.base import Policy
from tests.tools.kvdata import arrays_in
from tests.tools.sessions import CONTEXT, IDS


class OfTheCallersOwn(Policy):
    name = "caller's"

    def choose(self, features):
        return np.full((len(features.positions), 2), 2, np.uint8)


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


@pytest.mark.parametrize(
    ("policy", "asked", "bits"),
    [("int2", None, 8), ("int2", 16, 16), ("int8", None, 16), ("int8", 8, 8), ("k4v8", None, 16), ("fp16", None, 16),
     ("fp16", 8, 8), ("k16v4", None, 16),
     ("mixed", None, 8), (OfTheCallersOwn(), None, 16)],
)  # fmt: skip
def test_protected_tokens_are_at_the_bits_asked_for_or_at_those_of_the_policy_s_kind(tiny_model, policy, asked, bits):
    session = tiny_model.session(policy, recent=3, sink=5, protect_bits=asked)
    session.append(IDS[:30])
    stats, geometry = session.stats(), session.store.geometry
    assert stats.protect_bits == bits
    assert (stored_tokens(session.store).bits[[*range(5), *range(27, 30)]] == bits).all()
    window = 16 * 2 * geometry.layers * geometry.kv_heads * (geometry.head_dim * bits // 8 + 2) + 2 * 3
    assert stats.precisions["recent"]["nbytes"] == window  # measured from a ring of one tile


@pytest.mark.parametrize("bits", [0, 4, 7, 32, "8", 8.0, True])
def test_other_bits_are_refused(tiny_model, bits):
    with pytest.raises(PolicyError, match="protect_bits must be 8 or 16"):
        tiny_model.session("int4", protect_bits=bits)


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
