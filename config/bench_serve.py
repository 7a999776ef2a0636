"""Schema of `python -m benchmarking.bench_serve`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from config.measure import MeasureConfig
from config.schemas import FilePath, PositiveInt, Probability, Section


class BenchServeConfig(Section):
    """Measure serving: tokens per second, time to the first token and between tokens, at several numbers of clients."""

    checkpoint: FilePath = Field(description="a run or checkpoint directory to serve")
    streams: list[PositiveInt] = Field(
        [1, 8, 16, 32], min_length=1, max_length=100, description="clients that ask at the same time"
    )
    texts_per_stream: PositiveInt = Field(2, description="texts that each client asks for, one after the other")
    prompt_length: PositiveInt = Field(16, description="tokens in a prompt; ids are random, and new ones in each round")
    max_new_tokens: int = Field(64, ge=2, le=2**31 - 1, description="tokens of each text; none ends before")
    mixed: bool = Field(
        True, description="also, at the most clients: prompts of 8 tokens up to nearly the context, and texts to fit"
    )
    burst: bool = Field(
        True,
        description="also, prompts of 8 to 120 tokens: one client alone, and the most at the same instant or apart",
    )
    temperature: float = Field(0.8, ge=0, le=100, description="divides the logits; 0 takes the most likely token")
    top_p: Probability = Field(1.0, description="keep the most likely tokens that together have this probability")
    precision: Literal["fp32", "bf16", "int8"] = Field(
        "fp32", description="precision of the weights; for int8, llama.cpp uses q8_0"
    )
    reproducible: bool = Field(True, description="ours: the same prompt and seed give the same text at any load")
    threads: int = Field(2, ge=1, le=4096, description="CPU threads of each candidate")
    peers: list[Literal["llama_cpp", "sequential"]] = Field(
        ["llama_cpp", "sequential"],
        description="llama.cpp's server with the same weights (skipped if not installed); transformerlm-infer's "
        "predictor, one text after the other, without a server",
    )
    measure: MeasureConfig = MeasureConfig()

    @model_validator(mode="after")
    def _has_a_wall_clock(self) -> Self:
        if self.measure.clock != "wall":
            raise ValueError(
                'measure.clock: expected "wall", found "cpu"; the CPU time of servers is the quantity cpu_ms_per_token'
            )
        return self
