"""Schema of `transformerlm-runs report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from config.schemas import FilePath, Section, Text


class RunsReportConfig(Section):
    """Write runs as one HTML file with curves, samples and settings, which opens without a network."""

    runs: Annotated[list[FilePath], Field(min_length=1, max_length=100)] = Field(
        description="directories of runs, each with a metrics.jsonl, finished or not"
    )
    output: FilePath = Field(Path("report.html"), description="the file to write; an older report there is replaced")
    title: Text | None = Field(
        None, min_length=1, max_length=200, description="heading of the report; without one, the name of the run"
    )
