"""Schema of `transformerlm-make-data`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from config.schemas import (
    ChatConfig,
    ClusterConfig,
    Engine,
    FilePath,
    LoggingConfig,
    PositiveInt,
    Section,
    SpecialToken,
    TextField,
    TextFiles,
    TextInput,
    WandbConfig,
    Workers,
)
from config.special_tokens import END_OF_TEXT


class SourceConfig(Section):
    """One of several texts, and how much of it goes into the training file."""

    input: TextFiles = Field(min_length=1)
    text_field: TextField | None = Field(None, description="text_field for these files; none: the one above")
    weight: float = Field(
        1.0, gt=0, le=1000, description="how many times each document appears in train: 2 is twice, 0.5 every other one"
    )


class MakeDataConfig(TextInput):
    """Encode text files into a token file for training, and optionally one for validation."""

    input: TextFiles = Field([])  # the base requires some; here [[sources]] may replace it
    sources: list[SourceConfig] = Field(
        [], validate_default=True, description="several texts with weights, instead of input"
    )
    tokenizer: FilePath = Field(
        description="directory written by transformerlm-train-tokenizer; or data/gpt2 for data/gpt2-vocab.json"
    )
    separator: SpecialToken = Field(
        END_OF_TEXT, description="special token between documents in text files, and after each in the output"
    )
    train: FilePath = Field(
        description="token file to write (.npy), with its facts in a .json beside it, or a folder of several "
        "(.shards); a folder of token files if outputs = per-input"
    )
    valid: FilePath | None = Field(
        None, description="token file for validation, or a folder, like train; none: no validation split"
    )
    valid_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the documents that go to valid"
    )
    outputs: Literal["one", "per-input"] = Field(
        "one", description="one token file for all inputs, or one for each input, under its name in the folder train"
    )
    max_tokens: PositiveInt | None = Field(
        None,
        description="take whole documents until the next would pass this many tokens, train and valid together "
        "(per-input: for each input); none: all",
    )
    overwrite: bool = Field(False, description="replace existing outputs")
    workers: Workers = Field(0, description="worker processes or threads; 0: one for each core")
    engine: Engine = Field("auto", description="auto: compiled (numba) for large inputs; both give the same result")
    chat: ChatConfig | None = None
    cluster: ClusterConfig = ClusterConfig()
    logging: LoggingConfig = LoggingConfig()
    wandb: WandbConfig = WandbConfig()

    @field_validator("sources")
    @classmethod
    def _check_inputs(cls, sources: list[SourceConfig], info: ValidationInfo) -> list[SourceConfig]:
        if "input" in info.data and bool(info.data["input"]) == bool(sources):
            raise ValueError(
                "expected either input or sources, found both (input = [] or sources = [] takes one away; "
                "on the command line --toml 'input = []')"
                if sources
                else "input is required where there are no sources"
            )
        return sources

    @model_validator(mode="after")
    def _check_outputs(self) -> Self:
        for key, path in (("train", self.train), ("valid", self.valid)):
            if path is not None and (path.suffix in (".npy", ".shards")) != (self.outputs == "one"):
                expected = "must end in .npy" if self.outputs == "one" else 'is a folder with outputs = "per-input"'
                raise ValueError(f'{key} {expected}, found "{path}"')
        if self.outputs == "one" and self.valid is not None and self.valid.suffix != self.train.suffix:
            raise ValueError(f'valid must end as train does, in "{self.train.suffix}", found "{self.valid}"')
        if self.sources and (self.max_tokens is not None or self.outputs != "one"):
            raise ValueError('max_tokens and outputs = "per-input" are for input, found sources')
        if self.max_tokens is not None and self.train.suffix == ".shards":
            raise ValueError(f'max_tokens is for a token file (.npy), found train = "{self.train}"')
        if self.valid == self.train:
            raise ValueError(f'train and valid are the same file: "{self.train}"')
        if (self.valid is None) != (self.valid_fraction == 0):
            raise ValueError(
                "valid and valid_fraction go together, "
                f"found valid = {self.valid}, valid_fraction = {self.valid_fraction}"
            )
        return self

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.chat is not None and self.text_field != "text":
            raise ValueError(
                "text_field does nothing with [chat]: chat.messages_field names the field of conversations"
            )
        if self.chat is not None and self.allow_special:
            raise ValueError("allow_special is not for conversations: what a message says is plain text")
        return self

    @model_validator(mode="after")
    def _check_cluster(self) -> Self:
        on = self.cluster.on
        if on != "local" and (self.max_tokens is not None or self.outputs != "one"):
            raise ValueError(f'max_tokens and outputs = "per-input" are for cluster.on = "local", found "{on}"')
        if on == "share" and self.overwrite:
            raise ValueError(
                'overwrite is not for cluster.on = "share": a late share would begin anew; remove the output'
            )
        return self
