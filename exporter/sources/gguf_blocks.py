"""Blocks of a GGUF file whose types are multiplied as they are: codes, scales and minima out of their bytes."""

from __future__ import annotations

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import Q4_K

from kvq.exporter.sources.base import BlockForm, Blocks

# What MatMulNBits multiplies, in part beside a product of minima.
EXACT = {
    Type.Q4_0: BlockForm(4, 32), Type.Q5_0: BlockForm(8, 32), Type.Q8_0: BlockForm(8, 32), Type.Q6_K: BlockForm(8, 16),
    Type.Q4_1: BlockForm(4, 32, minima=True), Type.Q4_K: BlockForm(4, 32, minima=True),
}  # fmt: skip


def decoded_blocks(raw: np.ndarray, type_: Type, values: np.ndarray) -> Blocks | None:
    """A matrix of an exact type in blocks, which say bit for bit what the gguf package decodes.

    Args:
        raw: its bytes, uint8 [bytes].
        type_: a key of `EXACT`.
        values: the matrix as it was decoded, float32 [n, k].

    Returns:
        None where scales or minima are no numbers, which whoever reads the values refuses.
    """
    form, (n, k) = EXACT[type_], values.shape
    shape = n, k // form.block
    parts = raw.reshape(-1, GGML_QUANT_SIZES[type_][1])
    with np.errstate(all="ignore"):
        if form.minima:
            codes, scales, minima = (_of_q4_1 if type_ is Type.Q4_1 else _of_q4_k)(parts)
            found = Blocks(codes.reshape(n, k), scales.reshape(shape), form.bits, form.block, minima.reshape(shape))
            return found if np.isfinite(values).all() and np.array_equal(found.dequantize(), values) else None
        scales, middle = _scales(parts, type_).reshape(shape), 1 << (form.bits - 1)
        by_block = values.reshape(*shape, form.block)
        codes = np.where(scales[..., None] == 0, 0, np.rint(by_block / scales[..., None]))
        exact = codes * scales[..., None] == by_block
        if not exact.all() or codes.min() < -middle or codes.max() >= middle:
            return None
    return Blocks((codes + middle).astype(np.uint8).reshape(n, k), scales, form.bits, form.block)


def _halves(parts: np.ndarray, at: int) -> np.ndarray:
    """The half-precision number at a byte of every block, float32 [blocks]."""
    return np.ascontiguousarray(parts[:, at : at + 2]).view("<f2").astype(np.float32).ravel()


def _scales(parts: np.ndarray, type_: Type) -> np.ndarray:
    """Scales of blocks uint8 [blocks, bytes] without minima, float32, as `dequantize` multiplies with them."""
    if type_ is Type.Q6_K:  # 16 scales of 8 bits and a half that all of them are multiplied with
        of_parts = np.ascontiguousarray(parts[:, 192:208]).view(np.int8).astype(np.float32)
        return (_halves(parts, 208)[:, None] * of_parts).ravel()
    return _halves(parts, 0)


def _of_q4_1(parts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes uint8 [blocks, 32], scales and minima float32 [blocks]: the low halves of 16 bytes come first."""
    return _nibbles(parts[:, 4:]), _halves(parts, 0), _halves(parts, 2)


def _of_q4_k(parts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes uint8 [blocks, 256], scales and minima float32 [blocks, 8], which are 6 bits times a half of the block."""
    scales, minima = Q4_K.get_scale_min(np.ascontiguousarray(parts[:, 4:16]))
    scales, minima = scales.astype(np.float32), minima.astype(np.float32)
    codes = _nibbles(parts[:, 16:].reshape(-1, 32)).reshape(len(parts), 256)
    return codes, _halves(parts, 0)[:, None] * scales, -(_halves(parts, 2)[:, None] * minima)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Codes of 4 bits, uint8 [blocks, 2 * bytes], of uint8 [blocks, bytes]: all low halves, then all high ones."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=1)
