"""Schema of `transformerlm-runs tail`."""

from __future__ import annotations

from pydantic import Field

from config.runs import RunsOutputConfig
from config.schemas import FilePath, Section


class RunsTailConfig(Section):
    """Show the last lines of a run, and those that follow, until it ends."""

    run: FilePath = Field(description="the run's directory")
    lines: int = Field(10, ge=0, le=10**6, description="how many of the lines that are already there to show")
    follow: bool = Field(True, description="wait for more lines while the run trains; false: show and end")
    output: RunsOutputConfig = RunsOutputConfig()
