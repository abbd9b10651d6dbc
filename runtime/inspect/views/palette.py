"""Shades of precision: more bits, further along a ramp whose lightness runs one way only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from kvq.runtime.inspect.records import InspectedToken
from kvq.runtime.precision.table import Pair

Color = tuple[int, int, int]  # sRGB, 0 to 255

# Both ramps can be told apart with any colour vision and in grey.
# viridis (van der Walt and Smith, matplotlib): few bits sink into a dark ground, many glow.
ON_DARK: list[Color] = [(68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37)]
# YlGnBu (Brewer): few bits are pale on a light ground, many are dark.
ON_LIGHT: list[Color] = [(255, 255, 204), (199, 233, 180), (127, 205, 187), (65, 182, 196), (44, 127, 184), (8, 29, 88)]


def level(bits: Pair) -> float:
    """Place of a pair between all 2 bits or fewer, 0.0, and all 16 bits, 1.0, by its mean bits.

    Logarithmic, bent so that 2 to 4 bits, where most tokens are, take nearly half of the range.
    """
    return (max(0, math.log2(sum(bits.bits) / 2) - 1) / 3) ** 0.75


def shade(bits: Pair, ramp: Sequence[Color]) -> Color:
    """Colour of a pair on a ramp."""
    at = level(bits) * (len(ramp) - 1)
    low = min(int(at), len(ramp) - 2)
    return tuple(round(a + (b - a) * (at - low)) for a, b in zip(ramp[low], ramp[low + 1], strict=True))  # type: ignore[return-value]


def ink(ground: Color) -> Color:
    """Black or white, whichever reads better on the ground; a contrast of at least 4.58 (WCAG 2.1)."""
    black, white = (0, 0, 0), (255, 255, 255)
    return max(black, white, key=lambda color: contrast(color, ground))


def contrast(a: Color, b: Color) -> float:
    """Contrast ratio of two colours after WCAG 2.1, from 1 to 21."""
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: Color) -> float:
    linear = [c / 12.92 if (c := part / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for part in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def shown_bits(cell: Sequence[InspectedToken]) -> Pair:
    """The pair a cell is shown at: a character is only as good as the worst token it is spread over."""
    return lowest(token.chosen for token in cell)


def lowest(pairs: Iterable[Pair]) -> Pair:
    """The one of fewest bits."""
    return min(pairs, key=lambda bits: (sum(bits.bits), bits.bits))
