"""Vectors that are hard on codecs: of any magnitude, of one or of many, and what a codec makes of them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvq.runtime.precision.codecs import CODECS
from kvq.runtime.precision.codecs.base import HALF_MAX
from tests.tools.kvdata import HEAD_DIMS, ODD_COUNTS, seeds

HALF_STEP = 2.0**-24  # distance of IEEE halves below 2^-14, and so the coarsest rounding of a tiny scale


def scaled(seed, shape, low, high):
    """Gaussian vectors, each at its own magnitude 10^low .. 10^high, clipped to the half range."""
    rng = np.random.default_rng(seed)
    magnitude = 10.0 ** rng.uniform(low, high, (*shape[:-1], 1))
    return np.clip(rng.standard_normal(shape) * magnitude, -HALF_MAX, HALF_MAX).astype(np.float32)


def mixed(seed, shape):
    """Every value at its own magnitude 1e-44 .. 65504: subnormals beside the largest half."""
    rng = np.random.default_rng(seed)
    return (rng.choice([-1, 1], shape) * 10.0 ** rng.uniform(-44, np.log10(HALF_MAX), shape)).astype(np.float32)


def large(seed, shape):
    """Every value between 32752 and 65504, either sign."""
    rng = np.random.default_rng(seed)
    return (rng.choice([-1, 1], shape) * rng.uniform(HALF_MAX / 2, HALF_MAX, shape)).astype(np.float32)


def constant(seed, shape):
    """One magnitude, random signs, zeros between: the extremes exactly."""
    rng = np.random.default_rng(seed)
    magnitude = rng.choice(np.array([0, 1e-45, 1e-44, 1e-38, 1e-30, 2.0**-25, 6e-8, 6.1e-5, 1, 65504], np.float32))
    return magnitude * rng.integers(-1, 2, shape).astype(np.float32)


@st.composite
def vectors(draw):
    """float32 [heads, tokens, head_dim] of finite halves' range."""
    if draw(st.integers(0, 3)) == 0:
        values = st.floats(-HALF_MAX, HALF_MAX, width=32)
        return draw(hnp.arrays(np.float32, (1, draw(st.integers(0, 3)), 8), elements=values))
    shape = (draw(st.integers(1, 2)), draw(st.sampled_from(ODD_COUNTS)), draw(st.sampled_from(HEAD_DIMS)))
    seed = draw(seeds)
    kinds = {
        "ordinary": lambda: scaled(seed, shape, -3, 3),
        "any magnitude": lambda: scaled(seed, shape, -40, 4),
        "clipped to the largest half": lambda: scaled(seed, shape, 4, 5),
        "close to the largest half": lambda: large(seed, shape),
        "mixed magnitudes": lambda: mixed(seed, shape),
        "one magnitude": lambda: constant(seed, shape),
    }
    return kinds[draw(st.sampled_from(sorted(kinds)))]()


def encoded(bits, x):
    """Codes, scales and the decoded vectors as float64."""
    codes, scales = CODECS[bits].encode(x)
    out = np.full(x.shape, np.nan, np.float32)
    CODECS[bits].decode(codes, scales, out)
    return codes, scales, out.astype(np.float64)
