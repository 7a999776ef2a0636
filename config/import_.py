"""Schema of `transformerlm-import`; no module can be called `import`, which is a Python keyword."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from config.schemas import FilePath, Pattern, Section, SpecialToken
from config.special_tokens import END_OF_TEXT


class ImportConfig(Section):
    """Make a checkpoint, or only a tokenizer, from the files of other tools."""

    source: FilePath = Field(
        description="what to import: a directory (hf, gpt2) or a file (tokenizer_json, tiktoken) on this machine"
    )
    format: Literal["hf", "tokenizer_json", "gpt2", "tiktoken"] = Field(
        "hf",
        description="hf: a directory with a Llama or Qwen3 model in safetensors; only a tokenizer from "
        "tokenizer_json (a tokenizer.json), gpt2 (vocab.json and merges.txt) or tiktoken (a file of ranks)",
    )
    output: FilePath = Field(description="directory to write: a run with one checkpoint (hf), or a tokenizer's")
    tokenizer: bool = Field(True, description="hf: import the tokenizer, too; false: only the model")
    pattern: Pattern | None = Field(
        None, description="tiktoken (required) and gpt2 (none: gpt2): how text is split, which their files do not say"
    )
    special_tokens: list[SpecialToken] = Field(
        [END_OF_TEXT],
        max_length=10_000,
        description="gpt2 and tiktoken: special tokens; one without an id gets the next free one",
    )
    verify: bool = Field(True, description="compare with the tool that the files come from, if it is installed")
    overwrite: bool = Field(False, description="replace an existing output")

    @model_validator(mode="after")
    def _check_pattern(self) -> Self:
        if self.format == "tiktoken" and self.pattern is None:
            raise ValueError(
                f"pattern: expected {', '.join(get_args(Pattern))}, found none: a file of ranks does not say how text "
                "is cut, and the wrong one gives other ids (gpt2: r50k_base, p50k_base; cl100k: cl100k_base)"
            )
        asks_for_tokens = self.special_tokens != [END_OF_TEXT]
        if self.format in ("hf", "tokenizer_json") and (self.pattern is not None or asks_for_tokens):
            name = "special_tokens" if asks_for_tokens else "pattern"
            raise ValueError(f'{name} does nothing with format = "{self.format}", whose files say it')
        if self.format != "hf" and not self.tokenizer:
            raise ValueError(f'tokenizer = false does nothing with format = "{self.format}", which is a tokenizer')
        return self
