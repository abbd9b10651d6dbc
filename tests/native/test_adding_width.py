"""A precision is added to the native library by a line in its list and two functions: done here to a copy of it."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest

from kvq.runtime.native import library
from kvq.runtime.native.codecs import NativeCodec, native_codecs
from kvq.runtime.precision.codecs import CODECS
from kvq.runtime.precision.codecs.base import Codec, absmax, from_words, half_scale, to_words
from kvq.runtime.precision.precision import Precision
from kvq.runtime.precision.table import Geometry
from tests.native.test_native import assert_equals_numpy, native, new_tokens
from tests.tools.kvdata import filled_store, random_tokens
from tests.tools.native_build import CC, NATIVE, lacking, leave_out, need, objects

pytestmark = pytest.mark.slow

# NF4 (Dettmers et al., arXiv 2305.14314): quantiles of a normal variable.
LEVELS = np.array(
    [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
     0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0], np.float32,
)  # fmt: skip
BORDERS = (LEVELS[1:] + LEVELS[:-1]) / 2


class NormalFloat(Codec):
    precision = Precision(7, "nf4", 4)
    has_scale = True

    def encode(self, x, feedback=None):
        scales = half_scale(absmax(x))
        unit = np.divide(x, scales.astype(np.float32), out=np.zeros(x.shape, np.float32), where=scales > 0)
        codes = to_words(np.searchsorted(BORDERS, unit).astype(np.uint8), 8)
        return codes[..., 0::2] | codes[..., 1::2] << 4, scales

    def decode(self, codes, scales, out):
        levels = LEVELS[np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], codes.shape[-1] * 2)]
        np.multiply(from_words(levels, 8, out.shape[-1]), scales.astype(np.float32), out=out)


def c_array(values):
    """Numbers as C writes them, exactly."""
    return "{" + ", ".join(float(value).hex() + "f" for value in values) + "}"


LINE = " \\\n    X(NF4, 7, 4, SCALED, FLOATS, with)\n\n"
LEVEL = f"""
INLINE vf level_NF4(vw word, int i) {{
    static const float levels[16] = {c_array(LEVELS)};
    uint32_t lanes[LANES];
    float x[LANES];
    memcpy(lanes, &word.low, sizeof lanes);
    for (int l = 0; l < LANES; l++) x[l] = levels[lanes[l] >> (4 * i) & 15];
    return load_f(x);
}}
"""
ENCODE = f"""
INLINE int encode_NF4(const float *x, const float *feedback, int padded, int head_dim, float peak, uint32_t *code,
                      uint16_t *scale_out) {{
    (void)feedback;
    static const float borders[15] = {c_array(BORDERS)};
    const int half = half_above(peak);
    if (half < 0) return KVQ_REFUSED_VALUE;
    *scale_out = (uint16_t)half;
    const float scale = float_of_half(half);
    for (int c = 0; c < padded; c++) {{
        code[c] = 0;
        for (int b = 0; b < 15; b++) code[c] += (scale > 0 ? x[c] / scale : 0) > borders[b];
    }}
    return (void)head_dim, 0;
}}
"""


def insert(file, before, text):
    """Put text into a file, before what occurs in it once."""
    source = file.read_text()
    assert source.count(before) == 1, f"{file.name}: {before}"
    file.write_text(source.replace(before, text + before))


@pytest.fixture(scope="module")
def wider_library(tmp_path_factory):
    """The library with one precision more, hardly optimized."""
    need(CC)
    folder = tmp_path_factory.mktemp("wider")
    tree = shutil.copytree(NATIVE, folder / "native", ignore=shutil.ignore_patterns("*.so", "*.py", "__pycache__"))
    insert(tree / "widths.h", "\n\n#define KVQ_SCALE_UNSCALED", LINE.rstrip("\n"))
    insert(tree / "templates" / "vector.h", "\n/* The same by its id.", LEVEL)
    insert(tree / "templates" / "encode.h", "\n/* One vector to its words and scale", ENCODE)
    # Of a kernel that this machine cannot run the compiler says no more than that it is right.
    objects(folder, "-fsyntax-only", tree=tree, files=lacking())
    leave_out(tree, lacking())
    linked = objects(folder, "-O1", tree=tree)
    subprocess.run([CC, "-shared", *linked, "-o", folder / "libkvq.so", "-lm"], check=True)
    return folder / "libkvq.so"


@pytest.fixture
def nf4(wider_library, monkeypatch):
    """The precision in numpy's registry, and the library that knows it."""
    monkeypatch.setitem(CODECS, 7, NormalFloat())
    assert library.known_precisions() == {16, 8, 5, 4, 3, 2}  # the one that is installed does not
    monkeypatch.setattr(library, "FILE", wider_library)
    library.load.cache_clear()
    yield CODECS[7]
    library.load.cache_clear()


def test_every_kernel_encodes_and_attends(nf4):
    assert library.known_precisions() == {16, 8, 7, 5, 4, 3, 2}
    rng = np.random.default_rng(0)
    for name, kernel in library.kernels().items():
        codec = native_codecs(kernel).by_id[7]
        assert isinstance(codec, NativeCodec)
        for head_dim in (8, 24, 64, 128):
            x = rng.standard_normal((3, 50, head_dim), np.float32) * np.float32(10) ** rng.integers(-6, 4, (3, 50, 1))
            x[0, 0] = 0
            for found, expected in zip(codec.encode(x), nf4.encode(x), strict=True):
                np.testing.assert_array_equal(found, expected)
            geometry = Geometry(2, 2, head_dim)
            store = filled_store(geometry, random_tokens(head_dim, geometry, 150, (7, 4, 16)), recent=16)
            for tokens in (1, 5):
                backend = native(name)
                assert_equals_numpy(backend, store, *new_tokens(1, tokens, 6, geometry), layer=1)
                assert backend.detail == name  # numpy was not asked
