"""Schema of `python -m benchmarking.bench_infer_latency`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from config.measure import MeasureConfig
from config.schemas import Device, FilePath, ModelConfig, PositiveInt, Section


class BenchInferConfig(Section):
    """Measure generation: time to the first token, tokens per second, and the most that memory bandwidth allows."""

    checkpoint: FilePath | None = Field(
        None, description="a run or checkpoint directory to measure; none: random weights of [model]"
    )
    model: ModelConfig | None = None
    batch_size: list[PositiveInt] = Field(
        [1, 8, 64], min_length=1, max_length=100, description="sequences generated together"
    )
    prompt_length: list[PositiveInt] = Field([64], min_length=1, max_length=100, description="tokens in the prompt")
    max_new_tokens: int = Field(64, ge=2, le=2**31 - 1, description="tokens to generate, greedily")
    precision: list[Literal["fp32", "bf16", "int8"]] = Field(
        ["fp32"],
        min_length=1,
        description="precisions of the weights; for int8, llama.cpp uses q8_0 and the other peers bf16",
    )
    device: Device = "auto"
    threads: int | None = Field(None, ge=1, le=4096, description="CPU threads of torch; none: torch's choice")
    peers: list[Literal["huggingface", "nanochat_style", "llama_cpp"]] = Field(
        ["huggingface", "nanochat_style"],
        description="with the same weights: transformers' generate, a plain cache, llama.cpp (batch 1); a peer that is "
        "not installed is skipped",
    )
    measure: MeasureConfig = MeasureConfig()

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if self.checkpoint is None and self.model is None:
            raise ValueError("expected a [model] table or a checkpoint, found neither")
        longest = max(self.prompt_length) + self.max_new_tokens
        if self.checkpoint is None and self.model is not None and longest > self.model.context_length:
            raise ValueError(
                f"prompt_length + max_new_tokens ({longest}) exceeds model.context_length ({self.model.context_length})"
            )
        return self
