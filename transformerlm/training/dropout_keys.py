"""The keys of dropout: for each sequence of a batch and each place in the model, a function of seed and step.

They are those of the sequence's row in the whole batch, so ranks and micro-batches that share a batch drop the numbers
that one process would drop.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transformerlm.models.dropout import num_keys
from transformerlm.models.settings import ModelSettings
from transformerlm.training.epoch_order import hashed


def dropout_keys(
    settings: ModelSettings,
    rows: range,
    *,
    seed: int,
    step: int,
    num_more: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor | None:
    """Return the keys of these rows of batch (seed, step), `(num_keys, rows, 2)` in int32; None for no dropout.

    `num_more` keys follow those of the model's own places: those of `lora.num_lora_keys`.
    """
    if not settings.drops and not num_more:
        return None
    places = np.arange(num_keys(settings.num_layers) + num_more, dtype=np.uint64)[:, None]  # (num_keys, 1)
    words = hashed(seed, step, np.asarray(rows, dtype=np.uint64), places)  # (num_keys, rows)
    keys = torch.from_numpy(words.view(np.int32).reshape(len(places), len(rows), 2))
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        keys = keys.pin_memory()  # the copy then waits for nothing that the device computes
    return keys.to(device, non_blocking=True)
