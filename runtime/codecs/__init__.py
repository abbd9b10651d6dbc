"""Codecs by bits per value. A new precision is one new module here with a ``CODECS`` dict."""

from __future__ import annotations

import sys

from kvq.runtime.codecs.base import Codec
from kvq.runtime.discovery import discover

CODECS: dict[int, Codec] = discover(sys.modules[__name__], "CODECS")

__all__ = ["CODECS", "Codec"]
