"""Schema of `transformerlm-add-tokens`."""

from __future__ import annotations

from pydantic import Field

from config.schemas import FilePath, Section, SpecialToken


class AddTokensConfig(Section):
    """Add special tokens to a tokenizer, or to a checkpoint and its model; old ids stay, and the old files too."""

    source: FilePath = Field(
        description="a run directory RUN (its newest checkpoint), RUN/best, or the directory of one checkpoint or of a "
        "tokenizer"
    )
    special_tokens: list[SpecialToken] = Field(
        ["<|im_start|>", "<|im_end|>"],
        min_length=1,
        max_length=1000,
        description="tokens to add, in the order of their ids; the default is what ChatML needs",
    )
    output: FilePath = Field(
        description="directory to write: a run with one checkpoint and its tokenizer beside it, or a tokenizer's"
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed of the noise in new rows of embedding and output head")
    overwrite: bool = Field(False, description="replace an existing output")
