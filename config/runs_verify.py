"""Schema of `transformerlm-runs verify`."""

from __future__ import annotations

from pydantic import Field

from config.runs import RunsOutputConfig
from config.schemas import FilePath, Section


class RunsVerifyConfig(Section):
    """Check that a run is what it says: its files, and parts of it that are trained once more and compared."""

    run: FilePath = Field(description="directory of the run; nothing is written there")
    share: float = Field(
        0.05, gt=0, le=1, description="share of the steps to train once more, drawn by chance, and at least one segment"
    )
    seed: int | None = Field(
        None, ge=0, le=2**63 - 1, description="draws the segments, from one checkpoint to the next; none: a new one"
    )
    output: RunsOutputConfig = RunsOutputConfig()
