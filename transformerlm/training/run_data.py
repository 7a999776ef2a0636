"""The data of a run: its tokenizer and token files, what batches are cut from, and how these are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from transformerlm.token_files.dataset import TokenDataset
from transformerlm.token_files.loss_mask import LossMask
from transformerlm.training.data import MaskedTokens, TrainingRows
from transformerlm.training.document_rows import DocumentRows
from transformerlm.training.reading import Reading

if TYPE_CHECKING:
    from config.train import TrainConfig
    from transformerlm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class RunData:
    """The tokenizer of a run, the token file to train on, and the one to validate on, if there is one.

    `separator_id` is the id between their documents; None: nobody knows it.
    """

    tokenizer: Tokenizer
    train: TokenDataset
    valid: TokenDataset | None
    separator_id: int | None = None

    def fingerprints(self) -> dict[str, str]:
        """Return the sha256 of what a run must not change between two starts; a checkpoint keeps them."""
        mask = self.train.mask_sha256
        learnt = {} if mask is None else {"train_mask_sha256": mask}
        return {"train_sha256": self.train.sha256, **learnt, "tokenizer_sha256": self.tokenizer.fingerprint()}


def rows_of(dataset: TokenDataset, data: RunData, *, config: TrainConfig, seed: int = 0) -> TrainingRows:
    """Return what batches are cut from: the ids of a token file of the run, or rows of its documents.

    Raises:
        ValueError: `data.packing` asks for documents, and nothing says where they are.
    """
    mask = LossMask(dataset.mask) if dataset.has_mask and dataset.mask else None
    if config.data.packing == "windows":
        return dataset.tokens if mask is None else MaskedTokens(dataset.tokens, mask)
    offsets, separator_id = _documents_of(dataset, data)
    sizes = {"context_length": config.model.context_length, "separator_id": separator_id}
    return DocumentRows(dataset.tokens, offsets, seed=seed, mask=mask, **sizes)


def check_documents(data: RunData, config: TrainConfig) -> None:
    """Open what says where documents are, if the packing or the model's mask asks for it.

    Raises:
        FileNotFoundError, ValueError: it is missing or damaged, or the token file is of an earlier version.
    """
    reading_of(data, config=config)
    if config.data.packing == "documents":
        for dataset in filter(None, (data.train, data.valid)):
            _documents_of(dataset, data)


def _documents_of(dataset: TokenDataset, data: RunData) -> tuple[npt.NDArray[np.int64], int]:
    offsets = dataset.document_offsets
    if offsets is None or data.separator_id is None:
        raise ValueError(
            f'data.packing = "documents": expected a token file that says where documents are, found {dataset.path} '
            "of an earlier version; run transformerlm-make-data again"
        )
    return offsets, data.separator_id


def reading_of(data: RunData, *, config: TrainConfig) -> Reading:
    """Return how the batches of a run are read.

    Raises:
        ValueError: `model.document_mask` is set, and nothing says which id is between documents.
    """
    if config.model.document_mask and data.separator_id is None:
        raise ValueError(
            f"model.document_mask: expected a token file that names its separator, found {data.train.path} of an "
            "earlier version; run transformerlm-make-data again"
        )
    has_mask = any(one.has_mask for one in (data.train, data.valid) if one)
    return Reading(
        data.separator_id if config.model.document_mask else None,
        some_ignored=has_mask or config.data.packing == "documents",
    )
