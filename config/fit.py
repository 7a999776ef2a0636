"""Schema of `transformerlm-fit`."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from config.schemas import Device, Duration, FilePath, InputName, Prompt, Section


class FitConfig(Section):
    """Train the best model that a text and a time can give: settings chosen, result predicted, run and judged."""

    text: list[InputName] = Field(
        [], description="text files, folders or globs to train on: .txt, .jsonl, .parquet, .gz, .zst"
    )
    time: Duration = Field(
        "30m",
        description="time of the training, short runs before it included; reading the text comes before it",
    )
    dir: FilePath = Field(
        "runs/fit",
        validate_default=True,
        description="directory for everything; if it is taken, a number is added",
    )
    dry_run: bool = Field(
        False,
        description="stop before the training: choose, predict and say how to begin it",
        json_schema_extra={"short": "dry-run"},
    )
    resume: FilePath | None = Field(
        None,
        description="directory of a fit whose training was stopped, or has not begun: train, and judge the prediction",
    )
    device: Device = "auto"
    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed of the initial weights and of the data order")
    prompt: list[Prompt] = Field(
        [""], min_length=1, max_length=100, description='prompts of the samples during the training; "" begins a text'
    )
    past_runs: FilePath | None = Field(
        None,
        description="JSON file of past runs to predict from, as benchmarking.fit_rows writes it; none: the shipped one",
    )

    @model_validator(mode="after")
    def _check_resume(self) -> Self:
        others = sorted(key for key in type(self).model_fields if key != "resume" and self.is_changed(key))
        if self.resume is not None and others:
            raise ValueError(
                f"resume: expected no other key, for everything has been chosen in {self.resume}, found "
                f"{', '.join(others)}"
            )
        if self.resume is None and not self.text:
            raise ValueError("text: expected files or folders to train on, found none")
        return self
