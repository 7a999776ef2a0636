"""Schema of `transformerlm-adopt`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from config.schemas import FilePath, Section, SpecialToken
from config.special_tokens import END_OF_TEXT


class AdoptConfig(Section):
    """Check and describe a file of ids that another program wrote, so that it can be trained on."""

    input: FilePath = Field(
        description="file of ids: .npy, a row of uint16 or uint32; or .bin, ids without a header, as from nanoGPT"
    )
    tokenizer: FilePath = Field(description="directory of the tokenizer that encoded it")
    separator: SpecialToken = Field(END_OF_TEXT, description="special token that ends a document in it")
    output: FilePath | None = Field(
        None,
        description="token file to write (.npy), a copy; none: describe a .npy where it is, in a .json beside it",
    )
    dtype: Literal["uint16", "uint32"] = Field("uint16", description=".bin: the type of its ids, which it does not say")

    @model_validator(mode="after")
    def _check_output(self) -> Self:
        if self.input.suffix not in (".npy", ".bin"):
            raise ValueError(f'input must end in .npy or .bin, found "{self.input}"')
        if self.input.suffix == ".npy" and self.dtype != "uint16":
            raise ValueError(f"dtype = {self.dtype} does nothing for a .npy, which says its own")
        if self.output is None and self.input.suffix == ".bin":
            raise ValueError("output is required for a .bin, which is copied: expected a name that ends in .npy")
        if self.output is not None and self.output.suffix != ".npy":
            raise ValueError(f'output must end in .npy, found "{self.output}"')
        return self
