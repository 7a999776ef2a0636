"""Schema of `transformerlm-chat`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from config.infer import OutputConfig
from config.schemas import ChatStrings, Device, FilePath, InferSamplingConfig, Prompt, Section


class ChatCommandConfig(Section):
    """Talk to a model that was trained on conversations."""

    checkpoint: FilePath = Field(
        description="a run directory RUN (its newest checkpoint), RUN/best, or one checkpoint's directory"
    )
    system: Prompt | None = Field(
        None, max_length=65536, description="what the model is told before all messages; none: nothing"
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed of each answer; /seed changes it")
    device: Device = "auto"
    precision: Literal["auto", "fp32", "bf16", "int8"] = Field(
        "fp32", description="precision of the weights; auto: bf16 if the hardware has it, else fp32"
    )
    reproducible: bool = Field(
        True,
        description="give the same messages and seed the text that transformerlm-serve gives; where steps are not "
        "compiled (docs/batching.md), it takes up to half as long again",
    )
    chat: ChatStrings | None = None
    sampling: InferSamplingConfig = InferSamplingConfig()
    output: OutputConfig = OutputConfig()
