"""The section [measure], which the four benchmarks share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from config.schemas import Section


class MeasureConfig(Section):
    """Paired rounds: each round runs every candidate once, ours first, so that a busy machine slows all of them."""

    warmup: int = Field(1, ge=0, le=10**6, description="rounds that are run but not counted")
    repeats: int = Field(5, ge=1, le=10**6, description="rounds that are counted")
    clock: Literal["wall", "cpu"] = Field(
        "wall", description="wall: elapsed seconds; cpu: this process's CPU seconds, for one thread on a busy machine"
    )
