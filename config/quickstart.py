"""Schema of `transformerlm-quickstart`."""

from __future__ import annotations

from pydantic import Field

from config.schemas import Device, Duration, FilePath, InputName, Prompt, Section


class QuickstartConfig(Section):
    """From raw text to generated text: runs train-tokenizer, make-data, train and infer with their shipped TOMLs."""

    text: list[InputName] = Field(
        [], description="text files to train on; none: the docstrings of the installed Python, torch and numpy"
    )
    time: Duration = Field("90s", description='training budget, e.g. "90s" or "10m"')
    dir: FilePath = Field(
        "runs/quickstart",
        validate_default=True,
        description="directory for everything; a number is added if it is taken",
    )
    prompt: list[Prompt] = Field(
        [], max_length=3, description="prompts of the samples at the end; none: chosen to suit the text"
    )
    device: Device = "auto"
