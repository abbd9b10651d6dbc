"""Reading through the quantized cache in one differentiable pass: the engine of labels and training.

Decoding step by step, a query sees itself and the newest tokens in full precision and every
earlier token as its codec returns it. One pass over a whole text does the same: the scores of
column j in row i come from the window's keys where i - j <= recent and from the decoded ones
elsewhere. It agrees with the runtime's step-by-step logits to rounding
(`tests/controller/test_parallel.py`); weights are the bundle's own, so what is learned here holds there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvq.exporter.reference import Twin, effective_model
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.bundle.manifest import Architecture
from kvq.runtime.compute.backends import make_backend
from kvq.runtime.precision.codecs import Codec, CodecSet
from kvq.runtime.precision.key_turns import KeyTurns

# read(layer, keys, values) -> what later tokens see of them; all float32 [batch, kv_heads, tokens, head_dim],
# rotated and centred as the store holds them.
Reader = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
ROWS = 128  # of attention at a time: what they do not see is not computed


class Pass(NamedTuple):
    """What one pass over texts yields.

    logits: [batch, tokens, vocab].
    attention_variance: of the last layer's rows, mean over heads, [batch, tokens].
    residual: [batch, tokens, hidden], what the head takes.
    keys, values: [batch, layers, kv_heads, tokens, head_dim], exact, rotated, keys centred.
    """

    logits: Tensor
    attention_variance: Tensor
    residual: Tensor
    keys: Tensor
    values: Tensor


@dataclass
class ParallelModel:
    """A bundle's torch twin, with the cache between its layers laid open.

    Attributes:
        twin: the bundle's graphs with its dequantized, un-rotated weights.
        recent: newest tokens, besides the query's own, that are read as the window keeps them.
        protect_bits: at which it does.
        feedback, turns: of the codecs of keys, see `kvq.runtime.bundle.bundle.Bundle.key_feedback` and `key_turns`.
    """

    twin: Twin
    recent: int = 16
    protect_bits: int = 8
    feedback: np.ndarray | None = None
    turns: KeyTurns | None = None

    @classmethod
    def load(cls, bundle: Bundle, recent: int = 16, device: str = "cpu") -> ParallelModel:
        """The twin of a bundle."""
        twin = effective_model(bundle).to(device)
        return cls(twin, recent, feedback=bundle.key_feedback, turns=bundle.key_turns)

    @property
    def shape(self) -> Architecture:
        """Shape of the model."""
        return self.twin.shape

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.twin.rotation.device

    def _as_kept(self, x: Tensor) -> Tensor:
        """x as the window rounds it, if there is one."""
        return _straight(x, _codecs().windows[self.protect_bits]) if self.recent else x

    def stored(self, layer: int, side: int, x: Tensor, bits: int, start: int = 0) -> Tensor:
        """What readers see of a layer's keys (side 0) or values (1), [..., kv_heads, tokens, head_dim].

        start: position of the first token.
        """
        codecs = _codecs()._replace(feedback=self.feedback, turns=self.turns)
        positions = np.arange(start, start + x.shape[-2])
        return _seen(x, codecs.reread(bits, _plain(x), None if side else layer, positions))

    def run(self, ids: Tensor, read: Reader | None = None) -> Pass:
        """One pass over int64 ids [batch, tokens], all tokens scored.

        Args:
            ids: the texts.
            read: what later tokens see of a layer's keys and values; None is the exact cache.
        """
        shape, rotation, tokens = self.shape, self.twin.rotation, ids.shape[1]
        windows = shape.windows or (0,) * shape.layers
        blocks = {
            window: [_Block.of(at, min(at + ROWS, tokens), self.recent, ids, window) for at in range(0, tokens, ROWS)]
            for window in set(windows)
        }
        keys, values, squares = [], [], []

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key = self.twin.to_cache(layer, query, key)
            value = value @ rotation
            keys.append(key)
            values.append(value)
            if read is None:
                window = seen = (key, value)
            else:
                # A query's own key and value are exact; the window's, and what passes through it on its
                # way to a codec, are rounded as the window does.
                window = (self._as_kept(key), self._as_kept(value))
                seen = read(layer, *window)
            scaled = query * shape.head_dim**-0.5
            mixed, row_squares = _attention(scaled, (key, value), window, seen, blocks[windows[layer]])
            squares.append(row_squares)
            return mixed.view(len(ids), -1, tokens, shape.head_dim) @ rotation.T

        residual = self.twin.residual(ids, attend)
        length = torch.arange(tokens, device=ids.device) + 1.0
        if windows[-1]:
            length = length.clamp(max=windows[-1])
        variance = squares[-1].mean(1) / length - 1 / length**2
        return Pass(self.twin.logits(residual), variance, residual, torch.stack(keys, 1), torch.stack(values, 1))


class _Block(NamedTuple):
    """Rows [start, stop) and the columns they see: decoded ones [0, far), the window's and their own [near, stop).

    far_bias, near_bias: 0 where a row reads the column from there, else -inf; [rows, columns].
    own: where a column is the row's own token, bool [rows, columns from near].
    """

    start: int
    stop: int
    far: int
    near: int
    far_bias: Tensor
    near_bias: Tensor
    own: Tensor

    @classmethod
    def of(cls, start: int, stop: int, recent: int, like: Tensor, window: int = 0) -> _Block:
        far, near = max(0, stop - 1 - recent), max(0, start - recent)
        row = torch.arange(start, stop, device=like.device)[:, None]
        behind = row - torch.arange(far, device=like.device)
        decoded = (behind > recent) & (behind < window) if window else behind > recent
        most = min(recent, window - 1) if window else recent
        distance = row - torch.arange(near, stop, device=like.device)
        zero = torch.zeros((), device=like.device)
        return cls(
            start, stop, far, near, torch.where(decoded, zero, -torch.inf),
            torch.where((distance >= 0) & (distance <= most), zero, -torch.inf), distance == 0,
        )  # fmt: skip


def _attention(
    query: Tensor,
    exact: tuple[Tensor, ...],
    window: tuple[Tensor, ...],
    seen: tuple[Tensor, ...],
    blocks: list[_Block],
) -> tuple[Tensor, Tensor]:
    """Causal attention in which a row reads its own token exactly, the window's as kept, older ones as decoded.

    Args:
        query: scaled, float32 [batch, heads, tokens, head_dim].
        exact, window, seen: keys and values, float32 [batch, kv_heads, tokens, head_dim] each.
        blocks: of rows, covering all tokens.

    Returns:
        float32 [batch, heads, tokens, head_dim], and each row's sum of squares [batch, heads, tokens], detached.
    """
    batch, kv_heads, _, head_dim = exact[0].shape
    mixed, squares = [], []
    for block in blocks:
        part, near = slice(block.start, block.stop), slice(block.near, block.stop)
        rows = query[:, :, part].reshape(batch, kv_heads, -1, head_dim)  # [batch, kv_heads, group * rows, head_dim]
        shape = (batch, kv_heads, query.shape[1] // kv_heads, block.stop - block.start)
        far = (rows @ seen[0][:, :, : block.far].transpose(-1, -2)).view(*shape, -1)
        close = (rows @ window[0][:, :, near].transpose(-1, -2)).view(*shape, -1)
        own = (rows.view(*shape, head_dim) * exact[0][:, :, None, part]).sum(-1, keepdim=True)
        close = torch.where(block.own, own, close)
        weights = torch.softmax(torch.cat([far + block.far_bias, close + block.near_bias], -1), -1)
        squares.append(weights.detach().square().sum(-1).flatten(1, 2))
        flat = weights.view(batch, kv_heads, rows.shape[2], -1)
        out = flat[..., : block.far] @ seen[1][:, :, : block.far] + flat[..., block.far :] @ window[1][:, :, near]
        share = weights[..., block.far :].diagonal(block.start - block.near, -2, -1)[..., None]
        out = out.view(*shape, head_dim) + share * (exact[1] - window[1])[:, :, None, part]
        mixed.append(out.flatten(1, 2))
    return torch.cat(mixed, 2), torch.cat(squares, 2)


def roundtrip(x: Tensor, bits: int, feedback: np.ndarray | None = None) -> Tensor:
    """What a codec returns of x, with the gradient of the identity (straight-through).

    The codec itself runs, on the CPU: what is learned is learned about the bytes that are stored.
    """
    return _straight(x, _codecs().by_id[bits], feedback)


@functools.cache
def _codecs() -> CodecSet:
    """The fastest there are; all give the same bytes."""
    return make_backend().codecs


def _straight(x: Tensor, codec: Codec, feedback: np.ndarray | None = None) -> Tensor:
    return _seen(x, codec.roundtrip(_plain(x), feedback))


def _plain(x: Tensor) -> np.ndarray:
    found: np.ndarray = x.detach().float().cpu().numpy()
    return found


def _seen(x: Tensor, stored: np.ndarray) -> Tensor:
    """What is read in place of x, with its gradient."""
    seen = torch.from_numpy(stored).to(x.device)
    return x + (seen - x).detach() if x.requires_grad else seen
