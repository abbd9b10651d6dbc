"""Codecs: packing is lossless, round trips stay within the error their scale allows, bad values are refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvq.runtime.errors import NonFiniteError
from kvq.runtime.precision.codecs import CODECS
from kvq.runtime.precision.codecs.base import HALF_MAX, pack, unpack
from kvq.runtime.precision.codecs.uniform import WindowCodec, pack4, quantize, unpack4
from tests.tools.kvdata import HEAD_DIMS, ODD_COUNTS, WIDTHS, examples
from tests.tools.vectors import HALF_STEP, encoded, scaled, vectors


def test_every_codec_stands_under_the_id_of_its_precision():
    assert {id_: codec.precision.id for id_, codec in CODECS.items()} == {id_: id_ for id_ in WIDTHS}
    named = {codec.precision.name: codec.bits for codec in CODECS.values()}
    assert named.items() >= {"2": 2, "3": 3, "4": 4, "u4": 4, "8": 8, "16": 16}.items()


def test_every_pair_of_4_bit_codes_survives_packing():
    low, high = np.divmod(np.arange(256), 16)
    codes = (np.stack([low, high], axis=-1) - 8).astype(np.int8)
    packed = pack4(codes)
    assert len(np.unique(packed)) == 256
    np.testing.assert_array_equal(unpack4(packed), codes)


def test_4_bit_packing_puts_the_even_channel_low_with_offset_8():
    assert pack4(np.array([-8, 7], np.int8)).tolist() == [0xF0]


def test_every_quadruple_of_2_bit_codes_survives_packing():
    codes = np.stack(np.meshgrid(*[np.arange(4, dtype=np.uint8)] * 4), axis=-1).reshape(256, 4)
    packed = pack(codes, 2)
    assert len(np.unique(packed)) == 256
    np.testing.assert_array_equal(unpack(packed, 2), codes)


def test_2_bit_packing_puts_channel_0_lowest():
    assert pack(np.array([3, 2, 1, 0], np.uint8), 2).tolist() == [0b00_01_10_11]


@given(hnp.arrays(np.int8, hnp.array_shapes(max_dims=3).map(lambda s: (*s, 8)), elements=st.integers(-8, 7)))
@examples(100)
def test_4_bit_packing_is_lossless_in_any_shape(codes):
    packed = pack4(codes)
    assert packed.shape == (*codes.shape[:-1], 4)
    np.testing.assert_array_equal(unpack4(packed), codes)


@given(hnp.arrays(np.uint8, hnp.array_shapes(max_dims=3).map(lambda s: (*s, 8)), elements=st.integers(0, 3)))
@examples(100)
def test_2_bit_packing_is_lossless_in_any_shape(codes):
    packed = pack(codes, 2)
    assert packed.shape == (*codes.shape[:-1], 2)
    np.testing.assert_array_equal(unpack(packed, 2), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", ODD_COUNTS)
def test_encoded_arrays_have_the_stated_shapes_and_bytes(bits, head_dim, tokens):
    codec = CODECS[bits]
    codes, scales = codec.encode(np.ones((3, 2, tokens, head_dim), np.float32))
    assert codes.dtype == np.uint8
    assert codes.shape == (3, 2, tokens, codec.code_bytes(head_dim))
    assert codec.code_bytes(head_dim) % 4 == 0  # whole words
    words_of_two = -(-head_dim // 16)  # at 3 bits, beside which half as many words hold the third ones
    most = 4 * (words_of_two + -(-words_of_two // 2)) if bits == 3 else -(-head_dim * codec.bits // 32) * 4
    assert codec.code_bytes(head_dim) == most
    assert scales.dtype == np.float16
    assert scales.shape == (3, 2, tokens, int(codec.has_scale))
    assert codes.nbytes + scales.nbytes == 6 * tokens * codec.vector_bytes(head_dim)


@pytest.mark.parametrize("bits", [8, 4])
@given(x=vectors())
@examples(240)
def test_uniform_round_trip_errs_by_half_a_scale_at_most(bits, x):
    _, scales, decoded = encoded(bits, x)
    # The float32 quotient of a value just past a tie may land on it (2^-24 of at most 127 steps);
    # a scale below the smallest float32 is zero, and so are the values then.
    bound = scales.astype(np.float64) * (0.5 + 127 * 2.0**-24) + 2.0**-142
    assert (np.abs(x - decoded) <= bound).all()


@pytest.mark.parametrize(("bits", "top"), [(8, 127), (4, 7)])
@given(x=vectors())
@examples(160)
def test_uniform_scale_is_the_range_rounded_up_to_half_precision(bits, top, x):
    _, scales, _ = encoded(bits, x)
    exact = np.abs(x.astype(np.float64)).max(axis=-1, keepdims=True) / top
    assert (scales >= exact * (1 - 2.0**-23) - 2.0**-149).all()
    assert (scales <= exact * (1 + 2.0**-10) * (1 + 2.0**-23) + HALF_STEP).all()


@given(x=vectors())
@examples(160)
def test_half_round_trip_is_the_nearest_half(x):
    _, _, decoded = encoded(16, x)
    assert (np.abs(x - decoded) <= np.maximum(np.abs(x.astype(np.float64)) * 2.0**-11, 2.0**-25)).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_zeros_come_back_as_zeros(bits, head_dim):
    _, _, decoded = encoded(bits, np.zeros((2, 3, head_dim), np.float32))
    assert (decoded == 0).all()


@pytest.mark.parametrize("bits", WIDTHS)
@given(x=vectors())
@examples(60)
def test_every_codec_takes_what_half_precision_holds(bits, x):
    # The 16-bit window takes any such value and must be able to hand it to any codec later.
    _, _, decoded = encoded(bits, x)
    assert np.isfinite(decoded).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_codec_takes_a_vector_close_to_the_largest_half(bits):
    x = np.array([HALF_MAX] + [0.72 * HALF_MAX] * 7, np.float32)
    assert np.isfinite(encoded(bits, x)[2]).all()


@pytest.mark.parametrize("bits", WIDTHS)
@given(x=vectors())
@examples(50)
def test_encoding_is_deterministic_and_leaves_its_input_alone(bits, x):
    before = x.copy()
    first, second = CODECS[bits].encode(x), CODECS[bits].encode(before)
    np.testing.assert_array_equal(x, before)
    for a, b in zip(first, second, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_vector_is_encoded_alike_alone_and_among_others(bits, head_dim):
    x = scaled(1, (2, 5, head_dim), -2, 2)
    codes, scales = CODECS[bits].encode(x)
    for head, token in np.ndindex(2, 5):
        alone = CODECS[bits].encode(x[head, token])
        np.testing.assert_array_equal(alone[0], codes[head, token])
        np.testing.assert_array_equal(alone[1], scales[head, token])


@pytest.mark.parametrize("bits", WIDTHS)
def test_strided_input_is_encoded_like_contiguous_input(bits):
    x = scaled(2, (16, 7, 3), -1, 1)
    codes, scales = CODECS[bits].encode(x.T)
    expected_codes, expected_scales = CODECS[bits].encode(np.ascontiguousarray(x.T))
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scales, expected_scales)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", ODD_COUNTS)
def test_decoding_into_a_slice_writes_the_slice_and_nothing_else(bits, head_dim, tokens):
    x = scaled(tokens, (3, tokens, head_dim), -2, 2)
    codes, scales, expected = encoded(bits, x)
    whole = np.full((3, tokens + 5, head_dim), np.nan, np.float32)
    CODECS[bits].decode(codes, scales, whole[:, 2 : 2 + tokens])
    np.testing.assert_array_equal(whole[:, 2 : 2 + tokens], expected)
    assert np.isnan(whole[:, :2]).all()
    assert np.isnan(whole[:, 2 + tokens :]).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_decoding_into_every_second_channel_leaves_the_others(bits):
    x = scaled(5, (2, 9, 16), -2, 2)
    codes, scales, expected = encoded(bits, x)
    whole = np.full((2, 9, 32), np.nan, np.float32)
    CODECS[bits].decode(codes, scales, whole[..., ::2])
    np.testing.assert_array_equal(whole[..., ::2], expected)
    assert np.isnan(whole[..., 1::2]).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_decoding_reads_slices_of_a_page(bits):
    x = scaled(6, (2, 20, 24), -2, 2)
    codes, scales, expected = encoded(bits, x)
    out = np.empty((2, 6, 24), np.float32)
    CODECS[bits].decode(codes[:, 7:13], scales[:, 7:13], out)
    np.testing.assert_array_equal(out, expected[:, 7:13])


@pytest.mark.parametrize("bits", WIDTHS)
def test_roundtrip_is_decode_of_encode(bits):
    x = scaled(7, (3, 17, 64), -2, 2)
    np.testing.assert_array_equal(CODECS[bits].roundtrip(x), encoded(bits, x)[2])


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@given(place=st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(0, 15)))
@examples(30)
def test_a_value_that_is_not_finite_is_refused_wherever_it_stands(bits, bad, place):
    x = scaled(8, (2, 7, 16), -2, 2)
    x[place] = bad
    with pytest.raises(NonFiniteError) as error:
        CODECS[bits].encode(x)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_half_codec_refuses_the_first_value_above_its_range(sign):
    x = np.zeros((1, 8), np.float32)
    x[0, 3] = sign * np.nextafter(np.float32(HALF_MAX), np.float32(np.inf))
    with pytest.raises(NonFiniteError, match="half precision"):
        CODECS[16].encode(x)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_half_codec_takes_the_last_value_of_its_range(sign):
    x = np.full((1, 8), sign * HALF_MAX, np.float32)
    np.testing.assert_array_equal(CODECS[16].roundtrip(x), x)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_uniform_codecs_take_values_above_the_half_range(bits):
    x = np.linspace(-4e5, 4e5, 16, dtype=np.float32)
    _, scales, decoded = encoded(bits, x)
    assert (np.abs(x - decoded) <= scales * np.float64(0.5001)).all()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_scale_above_the_half_range_is_refused(bits):
    with pytest.raises(NonFiniteError, match="half precision"):
        CODECS[bits].encode(np.linspace(-1e9, 1e9, 16, dtype=np.float32))


def test_the_largest_scale_gives_no_numpy_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CODECS[8].encode(np.full((1, 8), 127 * HALF_MAX, np.float32))


@pytest.mark.parametrize("bits", [8, 4])
def test_quantizing_rounds_ties_to_even_and_clamps(bits):
    top = 2 ** (bits - 1) - 1
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, top + 0.5, -top - 1.5, 1e6, -1e6], np.float32)
    expected = [0, 2, 2, 0, -2, -2, top, -top - 1, top, -top - 1]
    assert quantize(x * 0.25, np.float32(0.25), bits).tolist() == expected


def test_quantizing_with_a_zero_scale_gives_zeros():
    assert quantize(np.ones((2, 3), np.float32), np.zeros((2, 1), np.float32), 8).tolist() == [[0] * 3] * 2


@given(x=vectors())
@examples(120)
def test_the_window_rounds_to_a_65536th_of_the_range(x):
    codec = WindowCodec()
    if np.abs(x).max(initial=0) > HALF_MAX:
        with pytest.raises(NonFiniteError):
            codec.encode(x)
        return
    _, scales = codec.encode(x)
    # Half a code, and what quotient and product are rounded by: half a unit in the last place of 32767 codes each.
    bound = scales.astype(np.float64) * (0.5 + 2 * 32767 * 2.0**-24)
    assert (np.abs(codec.roundtrip(x) - x) <= bound + 2.0**-142).all()
    peak = np.abs(x).max(axis=-1, keepdims=True, initial=0)
    assert (scales <= peak / 32767 * (1 + 2.0**-10) + 6e-8).all()


def test_the_window_is_finer_than_half_precision_on_gaussian_vectors():
    x = np.random.default_rng(0).standard_normal((1000, 64)).astype(np.float32)
    window, half = (np.square(codec.roundtrip(x) - x).mean() for codec in (WindowCodec(), CODECS[16]))
    assert window < half / 40  # about nine times in the error, eighty in its square
