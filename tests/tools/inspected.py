"""Texts to inspect, friendly and hostile, and what a terminal makes of them."""

from __future__ import annotations

import re

from hypothesis import strategies as st

from kvq.runtime.precision.codecs import CODECS
from kvq.runtime.precision.table import Pair

TEXT = "The captain looked at the sea — naïve 漢字 😀, and then\nhe said: it was late. " * 3
HOSTILE = (
    '<script>alert(1)</script> <img src=x onerror="alert(2)"> \' " & &lt; </span></style> ]]> --> {} \x00\x07\x1b[31m'
    "\x1b]0;title\x07 \x7f \x9b31m \u202eevil\u202c \u2066x\u2069 \u200e \ufeff \u2028 \U000e0041 $\\frac$ \u00ad end"
)
EVERY_PAIR = [Pair(k, v) for k in CODECS for v in CODECS]
SGR = re.compile(r"\x1b\[[0-9;]*m")
any_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


def plain(text: str) -> str:
    """Coloured text without its own colours; there must be no other escape."""
    stripped = SGR.sub("", text)
    assert "\x1b" not in stripped
    return stripped
