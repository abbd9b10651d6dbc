"""Work of the library on onnxruntime's threads beside a pass: tokens on their way into the store."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from kvq.runtime.errors import BackendError
from kvq.runtime.native import mover, pool
from kvq.runtime.native.library import Moves


def stored(model, tokens):
    """All keys and values of a session that has read so many tokens."""
    session = model.session("int4", recent=8, backend="native")
    session.append(np.arange(tokens) % 500)
    blocks = [np.concatenate(pair) for layer in range(3) for pair in session.store.blocks(layer, 1000)]
    return np.concatenate([block.ravel() for block in blocks])


@pytest.mark.parametrize("tokens", [16, 17, 128, 200])
def test_tokens_move_alike_on_the_pool_and_in_one_thread(tiny_model, monkeypatch, tokens):
    shared = stored(tiny_model, tokens)
    monkeypatch.setattr(mover, "MANY", 1 << 30)
    np.testing.assert_array_equal(stored(tiny_model, tokens), shared)


def test_a_move_that_does_not_fit_is_refused_by_name():
    with pytest.raises(BackendError, match="do not fit"):
        pool.move_on_pool(Moves(tokens=-1))


def test_the_operator_says_that_there_is_no_move():
    pool._session()
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match="no move was set"):
        pool._session().run(None, {"x": pool.NOTHING})
