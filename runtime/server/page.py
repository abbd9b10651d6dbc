"""The page at /: a conversation in a browser, each token shaded by its bits. One file that loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.responses import HTMLResponse, Response

from kvq.runtime.inspect.views.report import shades
from kvq.runtime.precision.table import pairs

STYLE = re.compile(r"<style>(.*?)</style>", re.S)
SCRIPT = re.compile(r"<script>(.*?)</script>", re.S)


@cache
def _made() -> tuple[str, str]:
    """The page and its Content-Security-Policy: its own style and script by their digests, this server, no more."""
    text = files("kvq.runtime.server").joinpath("page.html").read_text(encoding="utf-8")
    text = text.replace("/* shades */", shades(pairs()))
    (style,), (script,) = STYLE.findall(text), SCRIPT.findall(text)
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        " require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return text, policy


def _digest(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def page() -> Response:
    """The page as a response."""
    text, policy = _made()
    headers = {
        "content-security-policy": policy,
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
        "vary": "accept",
    }
    return HTMLResponse(text, headers=headers)
