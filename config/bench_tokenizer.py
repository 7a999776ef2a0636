"""Schema of `python -m benchmarking.bench_tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from config.measure import MeasureConfig
from config.schemas import Engine, FilePath, InputName, Section, SpecialToken
from config.special_tokens import END_OF_TEXT

Peer = Literal["reference", "tokenizers", "tiktoken", "rustbpe", "gigabpe", "gigatoken"]
Task = Literal[
    "train", "train_memory", "train_tokenizer", "encode_file", "encode_documents", "decode", "make_data"
]  # fmt: skip
Kind = Literal[
    "chinese", "japanese", "korean", "thai", "european", "russian", "code", "tables", "json_logs", "indented"
]  # fmt: skip


class BenchTokenizerConfig(Section):
    """Measure training, encoding and decoding of the tokenizer against other libraries."""

    text: list[InputName] = Field(
        [], description="text files or globs; none: the docstrings of the installed Python, torch and numpy"
    )
    kinds: list[Kind] = Field(
        [], description="kinds of text to build from installed packages, each measured by itself; none: `text`"
    )
    debian_root: FilePath = Field(
        Path("/"), description="where files of Debian packages are, for kinds of languages: / if they are installed"
    )
    sizes_mb: list[Annotated[float, Field(gt=0, le=10**6)]] = Field(
        [3], description="megabytes of that text to measure on; a size larger than the text is skipped; none: all of it"
    )
    vocab_sizes: list[Annotated[int, Field(ge=257, le=2**24)]] = Field(
        [8192], min_length=1, description="vocabulary sizes to train; the largest is used to encode and decode"
    )
    threads: list[Annotated[int, Field(ge=1, le=1024)]] = Field(
        [1, 2], min_length=1, description="numbers of threads, ours and the peers'; decoding uses one"
    )
    separator: SpecialToken = Field(END_OF_TEXT, description="special token between documents")
    engine: Engine = Field("auto", description="our engine; auto: compiled if numba is installed")
    tasks: list[Task] = Field(
        ["train", "train_memory", "train_tokenizer", "encode_file", "encode_documents", "decode", "make_data"],
        min_length=1,
        description="what to measure",
    )
    peers: list[Peer] = Field(
        ["reference", "tokenizers", "tiktoken", "rustbpe", "gigabpe", "gigatoken"],
        description="what to compare with: our reference engine and libraries; one that is not installed is skipped",
    )
    measure: MeasureConfig = MeasureConfig()

    @model_validator(mode="after")
    def _check_lists(self) -> Self:
        if self.text and self.kinds:
            raise ValueError("kinds: expected no `text` beside it, found both (measure one after the other)")
        for name in ("kinds", "sizes_mb", "vocab_sizes", "threads", "tasks", "peers"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: expected each value once, found {values}")
        return self
