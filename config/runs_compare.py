"""Schema of `transformerlm-runs compare`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from config.schemas import FilePath, Section


class CompareOutputConfig(Section):
    """The form of the answer on stdout."""

    format: Literal["auto", "json", "markdown", "text"] = Field(
        "auto",
        description="a JSON line for each group, or tables for people or for a document; auto: text on a terminal, "
        "elsewhere json",
    )


class RunsCompareConfig(Section):
    """Compare runs: what differs in their settings, what they reached at equal places, and whether that is luck."""

    runs: list[FilePath] = Field(
        min_length=1, max_length=1000, description="directories of runs, the one to compare the others with first"
    )
    at: Literal["steps", "tokens", "flops", "seconds", "end", "lowest"] = Field(
        "tokens",
        description="what the runs have in common where they are compared; end: each run where it ended; lowest: each "
        "at its lowest validation loss",
    )
    place: float | None = Field(
        None, gt=0, description="where on that axis; none: the last place that all runs reached which did not diverge"
    )
    picture: FilePath | None = Field(
        None, description="also draw the validation losses to this file, as .png, .svg or .pdf (extra plot)"
    )
    output: CompareOutputConfig = CompareOutputConfig()

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if self.at in ("end", "lowest") and self.place is not None:
            raise ValueError(f'place = {self.place:g} does nothing with at = "{self.at}"')
        return self
