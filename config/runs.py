"""What the schemas of `transformerlm-runs` share: each of its words has one of its own, in `runs_<word>.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from config.schemas import Section


class RunsOutputConfig(Section):
    """The form of the answer on stdout."""

    format: Literal["auto", "json", "text"] = Field(
        "auto", description="JSON lines, or a table for people; auto: text on a terminal, elsewhere json"
    )
