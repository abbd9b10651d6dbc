"""Our 8- and 4-bit codes are the bytes onnxruntime's GroupQueryAttention writes into its quantized cache."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from kvq.runtime.machine.threads import session_options
from kvq.runtime.precision.codecs.uniform import pack4, quantize

HEADS, KV_HEADS = 4, 2


def ort_cache(bits, key, value, key_scale, value_scale, past=None):
    """The present_key and present_value that onnxruntime writes.

    Args:
        key, value: float32 [tokens, KV_HEADS, head_dim].
        key_scale, value_scale: float32 [KV_HEADS, head_dim].
        past: past_key, past_value, each [1, KV_HEADS, past tokens, packed]; None is an empty cache.
    """
    tokens, _, head_dim = key.shape
    packed = head_dim if bits == 8 else head_dim // 2
    kind = TensorProto.INT8 if bits == 8 else TensorProto.UINT8
    if past is None:
        past = [np.zeros((1, KV_HEADS, 0, packed), helper.tensor_dtype_to_np_dtype(kind))] * 2
    total = past[0].shape[2] + tokens
    feeds = {
        "query": np.zeros((1, tokens, HEADS * head_dim), np.float32),
        "key": key.reshape(1, tokens, -1),
        "value": value.reshape(1, tokens, -1),
        "past_key": past[0],
        "past_value": past[1],
        "seqlens_k": np.array([total - 1], np.int32),
        "total_sequence_length": np.array(total, np.int32),
        "k_scale": key_scale.reshape(-1),
        "v_scale": value_scale.reshape(-1),
    }
    names = list(feeds)
    node = helper.make_node(
        "GroupQueryAttention",
        [*names[:7], "", "", "", "", "", *names[7:]],
        ["out", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        kv_cache_bit_width=bits,
        k_quant_type="PER_CHANNEL",
        v_quant_type="PER_CHANNEL",
    )
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for name, x in feeds.items()
    ]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)] + [
        helper.make_tensor_value_info(name, kind, None) for name in ("present_key", "present_value")
    ]
    model = helper.make_model(
        helper.make_graph([node], "cache", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(), providers=["CPUExecutionProvider"]
    )
    return session.run(["present_key", "present_value"], feeds)


def our_cache(bits, x, scale):
    """The same bytes from our quantizer: [1, KV_HEADS, tokens, packed]."""
    codes = quantize(x, scale, bits).transpose(1, 0, 2)[None]
    return codes if bits == 8 else pack4(codes)


def assert_equal_bytes(bits, key, value, key_scale, value_scale):
    theirs = ort_cache(bits, key, value, key_scale, value_scale)
    for cache, x, scale in zip(theirs, (key, value), (key_scale, value_scale), strict=True):
        ours = our_cache(bits, x, scale)
        assert cache.dtype == ours.dtype
        np.testing.assert_array_equal(cache, ours)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_codes_of_random_vectors_under_random_channel_scales(bits, head_dim, tokens):
    rng = np.random.default_rng(bits * head_dim + tokens)
    key, value = rng.standard_normal((2, tokens, KV_HEADS, head_dim), np.float32)
    scales = rng.uniform(0.5, 1.5, (2, KV_HEADS, head_dim)).astype(np.float32) * np.float32(3 / 2 ** (bits - 1))
    assert_equal_bytes(bits, key, value, *scales)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_of_exact_ties_and_of_every_code(bits):
    rng = np.random.default_rng(bits)
    steps = np.arange(-(2**bits), 2**bits + 1) / 2.0  # all codes and all ties between them, both clamps exceeded
    steps = np.resize(steps, (-(-len(steps) * 3 // (KV_HEADS * 16)), KV_HEADS, 16)).astype(np.float32)
    key_scale, value_scale = (2.0 ** rng.integers(-12, 6, (2, KV_HEADS, 16))).astype(np.float32)
    assert_equal_bytes(bits, steps * key_scale, steps[::-1] * value_scale, key_scale, value_scale)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_of_values_far_out_of_range_are_clamped_alike(bits):
    rng = np.random.default_rng(bits)
    key, value = (rng.standard_normal((2, 9, KV_HEADS, 32)) * 100).astype(np.float32)
    scale = np.full((KV_HEADS, 32), 0.5, np.float32)
    assert np.abs(key / scale).max() > 2 ** (bits - 1)
    assert_equal_bytes(bits, key, value, scale, scale)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_token_added_to_a_cache_of_our_bytes_leaves_them_alone(bits):
    rng = np.random.default_rng(bits)
    key, value = rng.standard_normal((2, 6, KV_HEADS, 32), np.float32)
    scale = rng.uniform(0.1, 0.4, (KV_HEADS, 32)).astype(np.float32)
    past = [our_cache(bits, x[:5], scale) for x in (key, value)]
    present = ort_cache(bits, key[5:], value[5:], scale, scale, past)
    for cache, x in zip(present, (key, value), strict=True):
        np.testing.assert_array_equal(cache, our_cache(bits, x, scale))
