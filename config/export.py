"""Schema of `transformerlm-export`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from config.schemas import FilePath, Section


class ExportConfig(Section):
    """Write a checkpoint, or its tokenizer alone, in the format of other tools."""

    checkpoint: FilePath = Field(
        description="a run directory (its newest checkpoint), or one checkpoint; for a tokenizer also its directory"
    )
    format: Literal["hf", "tokenizer_json", "tiktoken"] = Field(
        "hf",
        description="hf: a directory for transformers, vLLM and others; tokenizer_json: Hugging Face's tokenizer.json; "
        "tiktoken: a file of ranks",
    )
    output: FilePath = Field(description="the directory (hf) or the file to write")
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="hf: of the weights")
    max_shard_mb: int = Field(5000, ge=1, le=10**6, description="hf: weights are split into files of this size at most")
    verify: bool = Field(True, description="open what was written with the tool it is for, if installed, and compare")
    overwrite: bool = Field(False, description="replace an output that is there already")
