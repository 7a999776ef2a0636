"""Choosing a fraction of many things by their numbers: the same ones in every run, with no random generator."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)  # its fractional part, in units of 2^-64


def are_chosen(indexes: Array, fraction: float) -> Array:
    """Return which documents belong to an evenly spread `fraction`, bool `(documents,)`, by their numbers from 0 on.

    Document i is chosen if the fractional part of i times the golden ratio is below the fraction: these parts fill the
    unit interval evenly (Weyl). Numbers of 64 bits wrap around, which leaves just that part.
    """
    chosen: Array = indexes.astype(np.uint64) * _GOLDEN_RATIO < np.uint64(math.ceil(fraction * (1 << 64)))
    return chosen
