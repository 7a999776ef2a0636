"""Schema of `transformerlm-runs show`."""

from __future__ import annotations

from pydantic import Field

from config.runs import RunsOutputConfig
from config.schemas import FilePath, Section


class RunsShowConfig(Section):
    """Show what one run is, what it has reached, and what it came from."""

    run: FilePath = Field(description="the run's directory")
    output: RunsOutputConfig = RunsOutputConfig()
