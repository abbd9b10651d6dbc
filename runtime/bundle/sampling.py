"""What the makers of a model recommend for drawing its tokens: names of options, and their ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvq.runtime.bundle.fields import integer, number

TEMPERATURE = 100.0  # far above any that gives text
MOST = {"temperature": TEMPERATURE, "top_p": 1.0, "min_p": 1.0, "repetition_penalty": 100.0}
LEAST = {"repetition_penalty": 0.01}  # of the others 0
TOP_K = 1 << 31
NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def recommended(found: Mapping[str, Any], what: str = "sampling") -> dict[str, float]:
    """What of these options a mapping holds, all else left out; null and 0 for top-p are as good as nothing.

    Args:
        found: name -> value, as files have them.
        what: names it in an error.

    Raises:
        ValueError: a value of one of these options is no number of its range.
    """
    options: dict[str, float] = {}
    for name in NAMES:
        value = found.get(name)
        if value is None or (name == "top_p" and value == 0):
            continue
        said = f"{name} of {what}"
        if name == "top_k":
            options[name] = max(0, integer(value, said, -1, TOP_K))  # -1 is all, to some
            continue
        options[name] = number(value, said, MOST[name])
        if value < LEAST.get(name, 0.0):
            raise ValueError(f"{said} is {value!r:.60}")
    return options
