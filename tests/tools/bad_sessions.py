"""Session files that were changed before they were written, and how loading has to refuse them."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from kvq.runtime.errors import SessionError

IDS = np.random.default_rng(3).integers(1, 512, 60).tolist()
# Loading a good file of 60 tokens of the tiny model takes 0.3 MB beside the model (tracemalloc sees numpy's arrays).
MOST_NBYTES = 2_000_000


def saved(model, path, change=None, pending=False):
    """Save a session, changed in memory before."""
    session = model.session("mixed", recent=5, protect_bits=16)
    session.append(IDS)
    if pending:
        session.pending = [7]
    if change:
        change(session)
    session.save(path)
    return session


def refused(model, path, *words, most=MOST_NBYTES):
    """Load a bad file: a one-line SessionError with the words, and no more memory than it is worth, `most` bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(SessionError) as caught:
            model.load_session(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))
    for word in words:
        assert word in message
    assert peak < most
