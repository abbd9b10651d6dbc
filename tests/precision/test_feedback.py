"""Error feedback of codebooks: an independent reference, what it is good for, and what a hostile matrix can do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq.exporter.key_feedback import DAMPING, feedback_of
from kvq.runtime.precision.codecs import CODECS
from kvq.runtime.precision.codecs.codebook import CodebookCodec, feeds_back_little
from kvq.runtime.precision.table import Geometry
from tests.tools.kvdata import WIDTHS, examples, random_feedback, seeds
from tests.tools.vectors import vectors

BOOKS = [id_ for id_ in WIDTHS if isinstance(CODECS[id_], CodebookCodec)]


def decoded(codec, x, feedback):
    return codec.roundtrip(x, feedback)


@pytest.mark.parametrize("book", BOOKS)
@given(seed=seeds, head_dim=st.sampled_from((8, 24, 64)))
@examples(12)
def test_each_channel_takes_over_what_those_before_it_did_wrong(book, seed, head_dim):
    """The nearest level of what is left, channel by channel, written for one vector and in float64."""
    codec, rng = CODECS[book], np.random.default_rng(seed)
    x = rng.standard_normal((1, head_dim)).astype(np.float32)
    feedback = np.triu(rng.normal(0, 0.3, (head_dim, head_dim)), 1).astype(np.float16)
    codes, _ = codec.fit(x, feedback)
    # The codes are those of one scale, which is not stored: of all that could be, one has to explain them.
    _, plain = codec.fit(x)
    scale = float(plain[0, 0])
    wrong = []
    for factor in 1 - np.linspace(0, 2**-10, 33):  # the stored half was rounded up
        rest, found = x[0].astype(np.float64), []
        for i in range(head_dim):
            nearest = int(np.abs(codec.levels.astype(np.float64) * scale * factor - rest[i]).argmin())
            found.append(nearest)
            rest[i + 1 :] -= (rest[i] - codec.levels[nearest] * scale * factor) * feedback[i, i + 1 :]
        wrong.append(np.flatnonzero(np.array(found) != codes[0]))
    # Once a value on a border falls to the other side, those behind it differ too: they agree up to there.
    assert max(len(codes[0]) if not len(w) else w[0] for w in wrong) >= head_dim // 4


@pytest.mark.parametrize("bits", [2, 3])
def test_what_correlated_queries_see_of_an_error_is_much_less(bits):
    rng = np.random.default_rng(bits)
    mixing = rng.standard_normal((64, 64)) * np.exp(rng.uniform(-1.5, 1.5, 64))
    moments = mixing @ mixing.T
    x = rng.standard_normal((2000, 64), np.float32)
    feedback = feedback_of(moments)
    seen = [
        np.einsum("ti,ij,tj->t", e, moments, e).mean()
        for e in (x - decoded(CODECS[bits], x, f) for f in (None, feedback))
    ]
    assert seen[1] < 0.8 * seen[0]
    # Vectors keep their length along themselves, as without: what many tokens add up must not shrink.
    kept = [(x * decoded(CODECS[bits], x, f)).sum() / np.square(x).sum() for f in (None, feedback)]
    np.testing.assert_allclose(kept[1], kept[0], atol=0.02)


@given(seed=seeds, dim=st.sampled_from([2, 8, 40]))
@examples(30)
def test_shares_are_those_of_the_least_error(seed, dim):
    """Given the error of channel i, the errors of those behind it that queries see least of: a linear regression."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((dim, dim + 3))
    moments = mixing @ mixing.T
    damped = moments / (np.trace(moments) / dim) + DAMPING * np.eye(dim)
    shares = feedback_of(moments).astype(np.float64)
    for i in range(dim - 1):
        best = -np.linalg.solve(damped[i + 1 :, i + 1 :], damped[i + 1 :, i])
        np.testing.assert_allclose(shares[i, i + 1 :], best, atol=2e-3)
    assert not np.tril(shares).any()


def test_nothing_is_fed_back_where_nothing_was_asked():
    assert not feedback_of(np.zeros((2, 8, 8))).any()


@pytest.mark.parametrize("precision", WIDTHS)
@given(x=vectors(), size=st.sampled_from([0.0, 1.0, 8.0, 60000.0]), seed=seeds)
@examples(25)
def test_any_matrix_gives_finite_vectors(precision, x, size, seed):
    codec, head_dim = CODECS[precision], x.shape[-1]
    feedback = np.random.default_rng(seed).uniform(-size, size, (head_dim, head_dim)).astype(np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        found = codec.roundtrip(x.reshape(-1, head_dim), feedback)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("precision", sorted(set(WIDTHS) - set(BOOKS)))
def test_codecs_of_many_bits_leave_it_out(precision):
    x = np.random.default_rng(0).standard_normal((2, 5, 64), np.float32)
    for plain, fed in zip(
        CODECS[precision].encode(x), CODECS[precision].encode(x, np.ones((2, 64, 64), np.float16)), strict=True
    ):
        np.testing.assert_array_equal(plain, fed)


def test_what_could_grow_without_bound_is_told_apart():
    honest = random_feedback(1, Geometry(2, 2, 128))
    assert feeds_back_little(honest)
    assert feeds_back_little(feedback_of(np.diag(np.arange(1.0, 257))))
    for wrong in (np.full((1, 64, 64), 60.0), np.full((1, 8, 8), np.nan)):
        assert not feeds_back_little(wrong.astype(np.float16))
