"""Schema of `transformerlm-train-tokenizer`."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from config.schemas import (
    ClusterConfig,
    Engine,
    FilePath,
    LoggingConfig,
    Pattern,
    Section,
    SpecialToken,
    TextInput,
    WandbConfig,
    Workers,
)
from config.special_tokens import END_OF_TEXT

NUM_BYTES = 256


class TokenizerConfig(Section):
    """The vocabulary to train."""

    vocab_size: int = Field(ge=NUM_BYTES, le=2**24, description="256 bytes + merges + special tokens")
    special_tokens: list[SpecialToken] = Field(
        [END_OF_TEXT],
        max_length=1000,
        description="never split and never merged across; the first one separates documents",
    )

    pattern: Pattern = Field(
        "gpt2",
        description="how text is split before merging: by the rules of GPT-2, GPT-4 (cl100k), Llama 3, Qwen2 or SmolLM",
    )
    engine: Engine = Field(
        "auto",
        description="auto: compiled (numba) for large inputs; both give the same result; smollm has only reference",
    )

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if self.engine == "compiled" and self.pattern == "smollm":
            raise ValueError('engine: expected auto or reference with pattern = "smollm", found "compiled"')
        return self

    @model_validator(mode="after")
    def _check_special_tokens(self) -> Self:
        if len(set(self.special_tokens)) != len(self.special_tokens):
            raise ValueError(f"special_tokens holds a token twice: {self.special_tokens}")
        smallest = NUM_BYTES + len(self.special_tokens)
        if self.vocab_size < smallest:
            raise ValueError(
                f"vocab_size ({self.vocab_size}) is below 256 bytes + {len(self.special_tokens)} special tokens"
            )
        return self


class TrainTokenizerConfig(TextInput):
    """Train a byte-level BPE tokenizer on text files."""

    output_dir: FilePath = Field(description="directory for vocab.json, merges.txt and special_tokens.json")
    overwrite: bool = Field(False, description="replace an existing tokenizer")
    workers: Workers = Field(0, description="worker processes or threads; 0: one for each core")
    memory_limit_mb: int | None = Field(
        None,
        ge=1,
        le=2**30,
        description="MB of memory for the distinct words; beyond it, the compiled engine continues in temporary "
        "files (in TMPDIR) and the reference refuses; none: no limit",
    )
    sample: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="train on this fraction of the documents, chosen by what they say: fewer distinct words to hold, "
        "and merges that differ a little; none: all text",
    )
    tokenizer: TokenizerConfig
    cluster: ClusterConfig = ClusterConfig()
    logging: LoggingConfig = LoggingConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="after")
    def _check_overwrite(self) -> Self:
        if self.overwrite and self.cluster.on == "share":
            raise ValueError(
                'overwrite: expected false with cluster.on = "share", where a share that comes late would begin anew '
                "(remove the old tokenizer first)"
            )
        return self
