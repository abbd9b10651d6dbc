"""Many steps of many sessions that are opened, trimmed, forked, saved and closed: what the process holds stays."""

from __future__ import annotations

import pytest

from tests.tools.endurance import Endurance


@pytest.mark.slow
def test_memory_descriptors_and_threads_stay(embedded, tmp_path):
    endurance = Endurance(embedded, tmp_path, seed=1)
    endurance.run(1200, samples=4)
    assert endurance.turns.keys() >= {"open", "read", "decode", "trim", "fork", "file", "close", "reply"}
    begun, end = endurance.samples[1], endurance.samples[-1]
    assert (end.descriptors, end.threads) == (begun.descriptors, begun.threads)
    assert end.resident_nbytes - begun.resident_nbytes < 64 << 20
