"""How the ids of a batch are read: which targets are learnt, and where documents begin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transformerlm.models.functional import document_positions

IGNORED = -1
"""The target of a place at which nothing is learnt: padding, or a token of a conversation that nobody should learn."""


@dataclass(frozen=True)
class Reading:
    """What a step must know of its batches besides their ids.

    Args:
        separator_id: the id at which documents begin, for a model with `document_mask`; None: a row is one text.
        some_ignored: whether targets may be `IGNORED`. The loss is then the mean over the others.
    """

    separator_id: int | None = None
    some_ignored: bool = False

    def places(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the keyword by which a model learns where the documents of `inputs` `(batch, seq)` are, if it must."""
        if self.separator_id is None:
            return {}
        return {"document_positions": document_positions(inputs, self.separator_id)}

    def num_learnt(self, targets: Tensor) -> Tensor:
        """Return how many of the targets are learnt, a scalar in fp32; no one waits for the device."""
        if not self.some_ignored:
            return torch.tensor(float(targets.numel()), device=targets.device)
        return (targets != IGNORED).sum(dtype=torch.float32)
