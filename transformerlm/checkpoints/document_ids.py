"""The ids at which a model's documents begin and end: a fact of its data, which its checkpoint keeps.

make-data writes its separator into a token file's sidecar, a run copies it from there into `state.json`, and an import
takes it from the files of the model. Code that generates, evaluates or exports asks `ids_of_checkpoint`, which guesses
only if the checkpoint is of an older version, which recorded none.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.special_tokens import END_OF_TEXT
from transformerlm.checkpoints.validation import CheckpointError, read_state
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.tokenizer.tokenizer import Tokenizer

KEY = "document_ids"
"""Its place in `state.json`."""


@dataclass(frozen=True)
class DocumentIds:
    """The id before a document, the ids that end one, and the id that pads a batch; None: there is none.

    Data made by transformerlm-make-data has one id for the first two: the separator between documents. With
    `starts_texts` the model never saw text, not even a part of one, without `bos_token_id` before it.
    """

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    starts_texts: bool = False

    @classmethod
    def of_separator(cls, separator_id: int | None) -> DocumentIds:
        """Return the ids of data with this separator, or with none."""
        return cls(separator_id, () if separator_id is None else (separator_id,))

    @property
    def eos_token_id(self) -> int | None:
        """The first id that ends a document, for formats with room for only one."""
        return next(iter(self.eos_token_ids), None)

    @property
    def start_id(self) -> int | None:
        """The id before a document: without one that begins it, the id that ends the document before it will do."""
        return self.eos_token_id if self.bos_token_id is None else self.bos_token_id

    def started(self, ids: list[int]) -> list[int]:
        """Return the ids of a text after the one with which texts start, where they do and these do not yet."""
        start_id = self.start_id
        if not self.starts_texts or start_id is None or ids[:1] == [start_id]:
            return ids
        return [start_id, *ids]

    def separator(self, tokenizer: Tokenizer) -> str | None:
        """Return the text of the special token that ends a document; None: there is none."""
        return next((text for text, one in tokenizer.special_token_ids.items() if one == self.eos_token_id), None)

    def to_state(self) -> dict[str, Any]:
        """Return what `state.json` keeps under `KEY`."""
        return {
            "bos_token_id": self.bos_token_id,
            "eos_token_ids": list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
            "starts_texts": self.starts_texts,
        }


def ids_of_checkpoint(directory: Path, tokenizer: Tokenizer) -> DocumentIds:
    """Return the ids that the checkpoint records, or else those that `guess_ids` guesses.

    Raises:
        CheckpointError: `state.json` is missing or damaged, or what it holds is not ids of the tokenizer.
    """
    return recorded_ids(directory, tokenizer) or guess_ids(tokenizer, where=f"{directory}: ")


def recorded_ids(directory: Path, tokenizer: Tokenizer) -> DocumentIds | None:
    """Return the ids that the checkpoint records; None: none, as in older versions. Raises as `ids_of_checkpoint`."""
    found = read_state(directory).get(KEY)
    if found is None:
        return None
    try:
        bos, ends, pad = found["bos_token_id"], found["eos_token_ids"], found["pad_token_id"]
        said = [*ends, *(one for one in (bos, pad) if one is not None)]
        starts_texts = found["starts_texts"]
        known = range(tokenizer.vocab_size)
        if not all(type(one) is int and one in known for one in said) or type(starts_texts) is not bool:
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{directory}: expected ids below {tokenizer.vocab_size} in {KEY} of state.json, found {str(found)[:80]}"
        ) from None
    return DocumentIds(bos, tuple(ends), pad, starts_texts)


def ids_of_data(dataset: TokenDataset, tokenizer: Tokenizer) -> DocumentIds | None:
    """Return the ids of the separator that a token file's sidecar names; None: it names none, as the first ones did.

    Raises:
        ValueError: its separator is not a special token of the tokenizer.
    """
    facts = dataset.metadata
    if "separator" not in facts:
        return None
    separator = str(facts["separator"])
    separator_id = facts.get("separator_id", tokenizer.special_token_ids.get(separator, -1))
    if separator_id is not None and separator_id not in tokenizer.special_token_ids.values():
        raise ValueError(
            f"{dataset.path}: expected a special token as the sidecar's separator, found {separator[:60]!r}"
        )
    return DocumentIds.of_separator(separator_id)


def state_of_data(dataset: TokenDataset, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what the `state.json` of a run on this data holds."""
    known = ids_of_data(dataset, tokenizer)
    return {KEY: known.to_state() if known else None}


def guess_ids(tokenizer: Tokenizer, *, where: str = "") -> DocumentIds:
    """Return the ids of `<|endoftext|>`, or else of the first special token, with a warning where there are several."""
    specials = tokenizer.special_token_ids
    guess = END_OF_TEXT if END_OF_TEXT in specials else next(iter(tokenizer.special_tokens), None)
    if guess is None:
        return DocumentIds()
    if guess != END_OF_TEXT and len(specials) > 1:
        warnings.warn(
            f"{where}nothing says which special token ends a document: taking the first of {len(specials)}, {guess!r}; "
            "a checkpoint that this version saves says it",
            stacklevel=3,
        )
    return DocumentIds.of_separator(specials[guess])
