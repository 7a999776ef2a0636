"""Schema of `transformerlm-quickstart`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from config.schemas import Device, Duration, FilePath, InputName, Prompt, Section


class QuickstartConfig(Section):
    """From raw text to generated text: plan, train-tokenizer, make-data, train (a short run first) and infer."""

    text: list[InputName] = Field(
        [], description="text files, folders or globs to train on; none: the corpus that `corpus` names"
    )
    corpus: Literal["stories", "docstrings"] = Field(
        "stories",
        description="without text: stories (children's stories from our own grammar) or docstrings (those of the "
        "installed Python, torch and numpy)",
    )
    time: Duration = Field("90s", description='training budget, e.g. "90s" or "10m"')
    dir: FilePath = Field(
        "runs/quickstart",
        validate_default=True,
        description="directory for everything; if it is taken, a number is added",
    )
    prompt: list[Prompt] = Field(
        [], max_length=3, description="prompts of the samples at the end; none: chosen to suit the text"
    )
    device: Device = "auto"
