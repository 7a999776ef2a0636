"""Schema of `transformerlm-eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_serializer, model_validator

from config.schemas import (
    ChatConfig,
    Device,
    Duration,
    FilePath,
    InputName,
    InvalidUtf8,
    PositiveInt,
    Precision,
    Section,
    SpecialToken,
    TextField,
)


def is_token_file(name: str) -> bool:
    """Return whether an input is a token file or a folder of shards, rather than text: its name says so."""
    return Path(name).suffix in (".npy", ".shards")


class EvalConfig(Section):
    """Measure loss, perplexity and bits per byte, or right answers, of one checkpoint, or of two on the same text."""

    checkpoint: FilePath | None = Field(
        None, description="a run directory RUN (its newest checkpoint), RUN/best, or one checkpoint's directory"
    )
    compare: list[FilePath] = Field(
        [], max_length=2, description="two checkpoints to evaluate and compare, instead of checkpoint"
    )
    input: list[InputName] = Field(
        min_length=1,
        description="texts, folders, globs (.txt, .jsonl, .parquet, .gz, .zst), or one token file (.npy, .shards)",
    )
    text_field: TextField = Field("text", description=".jsonl, .parquet: the field that holds a document's text")
    allow_special: bool = Field(
        False, description=".jsonl, .parquet: read special tokens in a document's text as tokens, not as plain text"
    )
    invalid_utf8: InvalidUtf8 = Field(
        "replace", description="what to do with invalid UTF-8: replace (read as U+FFFD, counted) or refuse"
    )
    separator: SpecialToken | None = Field(
        None,
        description="token between documents in text files; none: the token that ends the model's documents; a token "
        "file names its own",
    )
    mode: Literal["documents", "sliding", "answers"] = Field(
        "documents",
        description="documents: each document by itself; sliding: all of them as one stream; answers: of conversations "
        "(.jsonl), the share of the assistant's messages that the model gives exactly, by its most likely tokens",
    )
    kind_field: TextField = Field(
        "kind", description="answers: the field that names a conversation's kind; kinds are counted apart, too"
    )
    max_new_tokens: PositiveInt = Field(
        64, description="answers: most tokens of an answer; one that has not ended by then is wrong"
    )
    chat: ChatConfig | None = Field(
        None, description="answers: strings around messages; none: the checkpoint's own, or else ChatML"
    )
    context_length: PositiveInt | None = Field(None, description="tokens in a window; none: the model's")
    stride: PositiveInt | None = Field(
        None, description="tokens between the starts of two windows; none: half the context"
    )
    batch_size: int = Field(
        8, ge=1, le=2**20, description="windows, or answers, computed at once; the result does not depend on it"
    )
    device: Device = "auto"
    precision: Precision = Field(
        "fp32", description="fp32, or bf16 autocast over fp32 weights; auto: bf16 if the hardware has it"
    )
    resamples: int = Field(
        1000, ge=0, le=10**6, description="resamples of the documents for the 95 % intervals; 0: no intervals"
    )
    seed: int = Field(
        0, ge=0, le=2**63 - 1, description="seed of the resampling, of the documents drawn, and of their order"
    )
    max_documents: PositiveInt | None = Field(
        None, description="evaluate this many documents, drawn by seed, the same for both checkpoints; none: all"
    )
    time: Duration | None = Field(
        None,
        description='stop scoring after this time, e.g. "60s", and report what is done by then; none: go to the end',
    )

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoint to evaluate, or the two to compare."""
        return self.compare or [path for path in (self.checkpoint,) if path]

    @field_serializer("chat")
    def _given(self, chat: ChatConfig | None) -> dict[str, Any] | None:
        """Write what was given alone: with any string given, the rest of the format is ChatML, not the checkpoint's."""
        return None if chat is None else chat.model_dump(mode="json", exclude_unset=True)

    @model_validator(mode="after")
    def _check_checkpoints(self) -> Self:
        if len(self.compare) == 1:
            raise ValueError(f"compare: expected two checkpoints, found one ({self.compare[0]})")
        if not self.checkpoints:
            raise ValueError("expected checkpoint, or compare with two checkpoints, found neither")
        if self.stride is not None and self.context_length is not None and self.stride > self.context_length:
            raise ValueError(f"stride ({self.stride}) exceeds context_length ({self.context_length})")
        return self

    @model_validator(mode="after")
    def _check_token_file(self) -> Self:
        if self.mode != "answers" and len(self.input) > 1 and any(map(is_token_file, self.input)):
            ending = next(Path(name).suffix for name in self.input if is_token_file(name))
            raise ValueError(f"input: expected text files or one token file, found {len(self.input)} with a {ending}")
        if is_token_file(self.input[0]):
            for name in ("text_field", "allow_special", "invalid_utf8", "separator"):
                if self.is_changed(name):
                    raise ValueError(f"{name} is for text, found the token file {self.input[0]}")
        return self

    @model_validator(mode="after")
    def _check_answers(self) -> Self:
        if self.mode != "answers":
            for name in ("chat", "kind_field", "max_new_tokens"):
                if self.is_changed(name):
                    raise ValueError(f'{name} is for mode = "answers", found mode = "{self.mode}"')
            return self
        given = {"context_length": self.context_length, "stride": self.stride, "separator": self.separator}
        if unused := [name for name, value in given.items() if value is not None]:
            raise ValueError(f'{unused[0]} is not for mode = "answers", found {unused[0]} = {given[unused[0]]}')
        if self.allow_special:
            raise ValueError('allow_special is not for mode = "answers": what a message says is plain text')
        if self.is_changed("text_field"):
            raise ValueError(
                f'text_field is not for mode = "answers": chat.messages_field is, found {self.text_field!r}'
            )
        return self
