"""Schema of `python -m benchmarking.bench_tokenizer`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from config.schemas import InputName, PositiveInt, Section, SpecialToken


class MeasureConfig(Section):
    """Paired rounds: each round runs every candidate once, ours first, so that a busy machine slows all of them."""

    warmup: int = Field(1, ge=0, le=10**6, description="rounds that are run and not counted")
    repeats: int = Field(5, ge=1, le=10**6, description="rounds that are counted")
    clock: Literal["wall", "cpu"] = Field(
        "wall", description="wall: real seconds; cpu: this process's, for one thread on the CPU of a busy machine"
    )


class BenchTokenizerConfig(Section):
    """Measure training and encoding speed of the tokenizer against other libraries."""

    text: list[InputName] = Field(
        [], description="text files or globs; none: the docstrings of the installed Python, torch and numpy"
    )
    max_bytes: PositiveInt = Field(2_000_000, description="bytes of text to use at most")
    vocab_size: int = Field(4096, ge=257, le=2**31 - 1, description="number of token ids to train")
    separator: SpecialToken = Field("<|endoftext|>", description="special token that stands between documents")
    workers: int = Field(
        1,
        ge=1,
        le=1024,
        description="our processes, the peers' threads; above 1, batches are encoded in parallel too",
    )
    peers: list[Literal["tokenizers", "tiktoken"]] = Field(
        ["tokenizers", "tiktoken"], description="libraries to compare with; one that is not installed is skipped"
    )
    measure: MeasureConfig = MeasureConfig()
