"""Keys stored less a mean that turns with the position, per layer and KV head.

The mean key before the rotary embedding is a large part of every key, but the embedding turns it with the position, so
that a constant mean has nothing of it in the pairs of channels that turn fast. A key of few bits is stored less

    t(b) = sum over pairs j of cos(w_j p) u_j + sin(w_j p) v_j

with p the middle of the position's block of 16, b = position // 16, and readers add it again: to decoded keys, or,
which is the same, to the scores of a query q all q . t(b), a number for each block. Tokens of the recent window, and of
8 or 16 bits, are stored as they are: their rounding is too small to matter.
"""

from __future__ import annotations

import functools

import numpy as np

BLOCK = 16  # positions that share a turn
MOST_BITS = 4  # of a code, where keys are turned
ROWS, BLOCKS = 16, 64  # the tables' axes are whole multiples of these, for native code
MOST_REACH = 16384.0  # of any entry of t: what the window holds less this is still within half precision
MOST_FREQUENCY = 4.0  # radians a token


class KeyTurns:
    """What `kvq.runtime.bundle.bundle.Bundle.key_turns` reads; shared and, to its users, without state.

    Args:
        frequencies: float32 [layers, pairs], radians a token.
        vectors: float32 [layers, kv_heads, pairs, 2, head_dim]: u and v of each pair. A layer whose vectors are all
            zero is left as it is.

    Attributes:
        rows: of the tables: twice the pairs, and zeros up to a multiple of `ROWS`.
        vectors: float32 [layers, kv_heads, rows, head_dim].
        across: the same as [layers, kv_heads, head_dim, rows].
        which: int32 [layers]: of which frequencies in `waves`; -1 of layers that are left as they are.
        reach: largest magnitude that an entry of t can have.
    """

    def __init__(self, frequencies: np.ndarray, vectors: np.ndarray) -> None:
        layers, kv_heads, pairs, _, head_dim = vectors.shape
        self.rows = -(-2 * pairs // ROWS) * ROWS
        self.vectors = np.zeros((layers, kv_heads, self.rows, head_dim), np.float32)
        self.vectors[:, :, : 2 * pairs] = vectors.reshape(layers, kv_heads, 2 * pairs, head_dim)
        self.across = np.ascontiguousarray(self.vectors.swapaxes(-1, -2))
        used = vectors.any(axis=(1, 2, 3, 4))
        kinds = dict.fromkeys(frequencies[layer].tobytes() for layer in np.flatnonzero(used))
        numbers = {kind: number for number, kind in enumerate(kinds)}
        self.which = np.full(layers, -1, np.int32)
        self.which[used] = [numbers[frequencies[layer].tobytes()] for layer in np.flatnonzero(used)]
        self._frequencies = np.array([np.frombuffer(kind, frequencies.dtype) for kind in kinds], np.float64)
        self._frequencies = self._frequencies.reshape(len(kinds), pairs)
        self.reach = float(np.abs(self.vectors).sum(axis=2, dtype=np.float64).max(initial=0.0))
        self._waves = self._made(1)
        self._at = functools.lru_cache(maxsize=32)(self._vector)

    def takes(self, bits: int) -> bool:
        """Whether keys with codes of so many bits are stored turned."""
        return bits <= MOST_BITS

    def waves(self, tokens: int) -> np.ndarray:
        """Factors of `vectors` in the first blocks of a text, at least those of so many tokens.

        Returns:
            float32 [sets, rows, blocks], read-only: cosine and sine of pair after pair.
        """
        waves = self._waves
        if waves.shape[-1] * BLOCK < tokens:
            blocks = -(-tokens // BLOCK)
            waves = self._waves = self._made(max(blocks, 2 * waves.shape[-1]))
        return waves

    def _made(self, blocks: int) -> np.ndarray:
        blocks = -(-blocks // BLOCKS) * BLOCKS
        sets, pairs = self._frequencies.shape
        angles = self._frequencies[..., None] * middle(np.arange(blocks))
        waves = np.zeros((sets, self.rows, blocks), np.float32)
        waves[:, 0 : 2 * pairs : 2], waves[:, 1 : 2 * pairs : 2] = np.cos(angles), np.sin(angles)
        waves.flags.writeable = False
        return waves

    def at(self, block: int) -> np.ndarray:
        """t of a block, float32 [layers, kv_heads, head_dim], read-only; to the bit the same at any time."""
        found: np.ndarray = self._at(int(block))
        return found

    def _vector(self, block: int) -> np.ndarray:
        waves = self.waves((block + 1) * BLOCK)[:, :, block]
        factors = np.zeros((len(self.which), self.rows), np.float32)
        if len(waves):
            factors[:] = waves[self.which]
        # Row after row, whatever the processor: what is stored depends on every bit. Unused layers have no vectors.
        turned = np.zeros(self.vectors[:, :, 0].shape, np.float32)
        for row in range(self.rows):
            turned += factors[:, row, None, None] * self.vectors[:, :, row]
        turned.flags.writeable = False
        return turned

    def of(self, positions: np.ndarray, layer: int | slice = slice(None)) -> np.ndarray:
        """t at positions [n]: float32 [layers, kv_heads, n, head_dim], or of one layer without the first axis."""
        blocks, places = np.unique(np.asarray(positions) // BLOCK, return_inverse=True)
        if not len(blocks):
            return np.zeros_like(self.vectors[layer, ..., :0, :])
        return np.stack([self.at(block)[layer] for block in blocks], axis=-2)[..., places, :]

    def seen(self, positions: np.ndarray, layer: int) -> np.ndarray:
        """`of` one layer for whoever reads: not to the bit the same, but of many blocks in a fraction of the time."""
        which = self.which[layer]
        if which < 0 or not len(positions):
            return np.zeros((self.vectors.shape[1], len(positions), self.vectors.shape[3]), np.float32)
        blocks, places = np.unique(np.asarray(positions) // BLOCK, return_inverse=True)
        factors = self.waves((int(blocks[-1]) + 1) * BLOCK)[which][:, blocks].T
        return (factors @ self.vectors[layer])[:, places]


def middle(blocks: np.ndarray) -> np.ndarray:
    """The position that stands for all of a block's, float64."""
    return BLOCK * np.asarray(blocks, np.float64) + (BLOCK - 1) / 2


def packed(frequencies: np.ndarray, vectors: np.ndarray) -> bytes:
    """A file of what `KeyTurns` takes: float32 frequencies, then half-precision vectors, little-endian."""
    return frequencies.astype("<f4").tobytes() + vectors.astype("<f2").tobytes()


def _pair_bytes(layers: int, kv_heads: int, head_dim: int) -> int:
    return layers * (4 + 2 * kv_heads * 2 * head_dim)


def most_bytes(layers: int, kv_heads: int, head_dim: int) -> int:
    """Of a file for a model of this shape: with all pairs of channels that there are."""
    return _pair_bytes(layers, kv_heads, head_dim) * (head_dim // 2)


def parsed(data: bytes, layers: int, kv_heads: int, head_dim: int) -> KeyTurns:
    """What `packed` made, of as many pairs as the bytes are.

    Raises:
        ValueError: what is wrong with it, behind the file's name.
    """
    pairs, rest = divmod(len(data), _pair_bytes(layers, kv_heads, head_dim))
    if rest or not 1 <= pairs <= head_dim // 2:
        raise ValueError(f"has {len(data)} bytes, which no number of pairs takes")
    frequencies = np.frombuffer(data, "<f4", layers * pairs).astype(np.float32).reshape(layers, pairs)
    halves = np.frombuffer(data, "<f2", offset=frequencies.nbytes)
    vectors = halves.astype(np.float32).reshape(layers, kv_heads, pairs, 2, head_dim)
    if not (np.isfinite(frequencies).all() and np.isfinite(vectors).all()):
        raise ValueError("holds what is no number")
    turns = KeyTurns(frequencies, vectors)
    if turns.reach > MOST_REACH or np.abs(frequencies).max() > MOST_FREQUENCY:
        raise ValueError("turns keys too far")
    return turns
