"""Schema of `transformerlm-infer`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from config.schemas import Device, FilePath, InferSamplingConfig, LoggingConfig, Prompt, Section, WandbConfig


class OutputConfig(Section):
    """The form of the answer on stdout."""

    format: Literal["auto", "json", "text"] = Field(
        "auto",
        description="one JSON line a sample, or the text itself, streamed; auto: text on a terminal, elsewhere json",
    )


class InferConfig(Section):
    """Generate text from a trained model."""

    checkpoint: FilePath = Field(
        description="a run directory RUN (its newest checkpoint), RUN/best, or one checkpoint's directory"
    )
    prompt: list[Prompt] = Field(
        [], description='prompts; "" starts a new document; none: one prompt a line from stdin'
    )
    prompt_file: list[FilePath] = Field(
        [], description="text files, each one prompt, without its last line end; they follow those of prompt"
    )
    allow_special: bool = Field(False, description="read special tokens spelled out in a prompt as tokens, not as text")
    num_samples: int = Field(1, ge=1, le=10**6, description="samples of each prompt")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed of the sampling")
    device: Device = "auto"
    precision: Literal["auto", "fp32", "bf16", "int8"] = Field(
        "fp32", description="precision of the weights; auto: bf16 if the hardware has it, else fp32"
    )
    batch_size: int = Field(
        8,
        ge=1,
        le=4096,
        description="samples generated together; format text, speculative and lines of stdin: one at a time",
    )
    speculative: int = Field(
        0,
        ge=0,
        le=64,
        description="tokens to draft from the text so far and check together in each step; samples come one at a time",
    )
    reproducible: bool = Field(
        False,
        description="on a CPU: give a prompt and a seed the same text alone, with any batch_size and from "
        "transformerlm-serve; where steps are not compiled (docs/batching.md), one text at a time takes up to half as "
        "long again",
    )
    sampling: InferSamplingConfig = InferSamplingConfig()
    output: OutputConfig = OutputConfig()
    logging: LoggingConfig = LoggingConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="after")
    def _check_speculative(self) -> Self:
        if self.speculative and self.reproducible:
            raise ValueError(
                f"speculative: expected 0 with reproducible = true, found {self.speculative}: drafts are drawn in "
                "another way than single tokens"
            )
        if self.speculative and self.sampling.is_penalised:
            raise ValueError(
                f"speculative: expected 0 with penalties or min_tokens, found {self.speculative}: drafts know neither"
            )
        return self
