"""The settings by which the next token is chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; raises ValueError when a parameter is out of range.

    A `temperature` of 0 takes the most likely token. `top_k` = None, `top_p` = 1 and `min_p` = 0 drop nothing.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"sampling: temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"sampling: top_k must be at least 1, got {self.top_k}")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"sampling: {name} must lie between 0 and 1, got {value}")
        if self.top_p == 0.0 and self.top_k is not None:
            raise ValueError(
                f"sampling: top_p = 0 keeps the most likely token alone, so top_k = {self.top_k} would do nothing; "
                "top_p = 1 keeps all, temperature = 0 takes the most likely token"
            )
