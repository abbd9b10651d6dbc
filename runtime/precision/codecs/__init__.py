"""Codecs by bits per value. A new precision is one new module here with a ``CODECS`` dict."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from kvq.runtime.discovery import discover
from kvq.runtime.precision.codecs.base import Codec
from kvq.runtime.precision.codecs.uniform import WindowCodec

CODECS: dict[int, Codec] = discover(sys.modules[__name__], "CODECS")


class CodecSet(NamedTuple):
    """The codecs a store encodes with; every set gives the same bytes.

    by_bits: bits per value -> codec.
    window: the recent window's.
    mover: takes tokens through the window in a single call, or None; see `kvq.runtime.kv.store.Mover`.
    """

    by_bits: dict[int, Codec]
    window: Codec
    mover: Any = None


NUMPY = CodecSet(CODECS, WindowCodec())

__all__ = ["CODECS", "NUMPY", "Codec", "CodecSet"]
