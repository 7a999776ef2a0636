"""Schema of `python -m benchmarking.bench_train`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from config.measure import MeasureConfig
from config.schemas import Device, ModelConfig, PositiveInt, Section


class BenchTrainConfig(Section):
    """Measure the training step: tokens per second, FLOPs utilisation, time to the first step, memory."""

    model: ModelConfig
    batch_size: PositiveInt = Field(16, description="sequences of context_length tokens in a step")
    steps_per_round: PositiveInt = Field(1, description="steps that one measurement times")
    precision: list[Literal["fp32", "bf16"]] = Field(
        ["fp32", "bf16"], min_length=1, description="precisions to measure; bf16 is autocast over fp32 weights"
    )
    compile: list[bool] = Field([False], min_length=1, description="measure without compile, with it, or both")
    device: Device = "auto"
    threads: int | None = Field(None, ge=1, le=4096, description="CPU threads of torch; none: torch's choice")
    peers: list[Literal["huggingface", "litgpt", "nanogpt_style"]] = Field(
        ["huggingface", "litgpt", "nanogpt_style"],
        description="transformers' Llama, litgpt, and a plain torch.nn GPT; one that is not installed is skipped",
    )
    measure: MeasureConfig = MeasureConfig()

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if self.model.document_mask:
            raise ValueError("model.document_mask: expected false, found true; random tokens have no documents")
        if self.model.dropout is not None:
            raise ValueError("model.dropout: expected no such table; no peer that is measured drops as ours does")
        return self
