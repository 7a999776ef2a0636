"""A small model and documents of random ids."""

from __future__ import annotations

import numpy as np
import torch

from transformerlm.evaluation.documents import Documents
from transformerlm.models.transformer import TransformerLM

VOCAB_SIZE = 23
CONTEXT = 8


def tiny_model(*, seed: int = 0, vocab_size: int = VOCAB_SIZE, document_mask: bool = False) -> TransformerLM:
    """Return an untrained model in fp64, so that the order of its sums does not show."""
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 32}
    choices = {"context_length": CONTEXT, "document_mask": document_mask}
    return TransformerLM(vocab_size=vocab_size, **choices, **sizes).double().eval()


def random_documents(*lengths: int, separator_id: int | None = 0, seed: int = 0) -> Documents:
    """Return documents of these lengths without the separator; each token has three bytes."""
    ids = np.random.default_rng(seed).integers(1, VOCAB_SIZE, size=sum(lengths)).astype(np.uint16)
    id_bytes = np.full(VOCAB_SIZE, 3)
    return Documents(ids, np.cumsum(lengths), 3 * np.array(lengths), separator_id, id_bytes=id_bytes)
