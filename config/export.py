"""Schema of `transformerlm-export`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from config.schemas import FilePath, Section

License = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9][a-z0-9.+-]{0,63}$",
        json_schema_extra={"takes": 'an identifier of the Hub, such as "mit", "apache-2.0" or "cc-by-4.0"'},
    ),
]
Language = Annotated[
    str,
    Field(
        pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]{1,8}){0,3}$",
        json_schema_extra={"takes": 'a code of ISO 639, such as "en" or "de"'},
    ),
]


class ExportConfig(Section):
    """Write a checkpoint, or only its tokenizer, in the format of other tools."""

    checkpoint: FilePath = Field(
        description="a run directory RUN (its newest checkpoint), RUN/best, or one checkpoint; for a tokenizer, "
        "also its own directory"
    )
    format: Literal["hf", "gguf", "html", "tokenizer_json", "tiktoken"] = Field(
        "hf",
        description="hf: a directory for transformers, vLLM and others; gguf: a file for llama.cpp and others; "
        "html: one page with the model in it, for a browser without a network; "
        "tokenizer_json: Hugging Face's tokenizer.json; tiktoken: a file of ranks",
    )
    output: FilePath = Field(description="the directory (hf) or the file to write")
    dtype: Literal["fp32", "bf16", "fp16", "q8_0"] = Field(
        "fp32",
        description="hf, gguf: precision of the weights; q8_0 (gguf only): 8 bits each, and a scale for every 32; "
        "html has 8 bits in any case",
    )
    max_shard_mb: int = Field(5000, ge=1, le=10**6, description="hf: weights are split into files of this size at most")
    license: License | None = Field(
        None,
        description="hf, html: the license that the model card names, by the Hub's identifier; none: it names none",
    )
    language: list[Language] = Field(
        [],
        max_length=100,
        description='hf, html: the languages that the model card names, such as "en"; none: it names none',
    )
    verify: bool = Field(True, description="open the result with the tool it is for, if installed, and compare")
    overwrite: bool = Field(False, description="replace an existing output")

    @model_validator(mode="after")
    def _check_dtype(self) -> Self:
        if self.dtype == "q8_0" and self.format != "gguf":
            raise ValueError(f'dtype: expected fp32, bf16 or fp16 for format "{self.format}", found q8_0')
        if self.format in ("tokenizer_json", "tiktoken") and self.dtype != "fp32":
            raise ValueError(
                f'dtype: expected none for format "{self.format}", which has no weights, found {self.dtype}'
            )
        if self.format == "html" and self.dtype != "fp32":
            raise ValueError(f'dtype: expected none for format "html", whose weights have 8 bits, found {self.dtype}')
        if self.format != "hf" and self.is_changed("max_shard_mb"):
            raise ValueError(f'max_shard_mb does nothing with format = "{self.format}", which is one file')
        for name in ("license", "language"):
            if self.format not in ("hf", "html") and (found := getattr(self, name)):
                raise ValueError(f'{name}: expected none for format "{self.format}", which has no card, found {found}')
        return self
