"""A curve as a few characters of a line: `█▆▅▄▃▂▂▁▁`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-=+*%#"
NOT_FINITE = "x"


def sparkline(values: Sequence[float], *, width: int, blocks: str = BLOCKS) -> str:
    """Return at most `width` characters, each the mean of a part of the values, from the lowest block to the highest.

    The scale is logarithmic where all values are positive: a loss falls most in its first steps, and what comes later
    would be a flat line. A part with a value that is not finite is an `x`.
    """
    parts = _means(values, width)
    finite = [value for value in parts if math.isfinite(value)]
    if not finite:
        return NOT_FINITE * len(parts)
    scale = math.log if min(finite) > 0 else float
    low, high = scale(min(finite)), scale(max(finite))
    step = (high - low) / len(blocks) or 1.0

    def block(value: float) -> str:
        if not math.isfinite(value):
            return NOT_FINITE
        return blocks[min(len(blocks) - 1, int((scale(value) - low) / step))]

    return "".join(map(block, parts))


def _means(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of each of `width` equal parts; the values themselves where they are fewer."""
    if len(values) <= width:
        return list(values)
    cuts = [round(part * len(values) / width) for part in range(width + 1)]
    return [sum(values[begin:end]) / (end - begin) for begin, end in itertools.pairwise(cuts)]


def blocks_for(encoding: str | None) -> str:
    """Return the blocks that a stream's encoding has: those of Unicode, or else letters of ASCII."""
    try:
        BLOCKS.encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return ASCII_BLOCKS
    return BLOCKS
