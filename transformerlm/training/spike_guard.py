"""Steps to skip: a loss or gradient that is not finite, a loss that jumps, and a batch in which nothing is learnt.

Pure rules, the little memory that they need, and a file for each batch that was refused. The memory is in every
checkpoint, so a resumed run judges each step as the uninterrupted one does. The numbers that are judged are the same on
all ranks, and so are the verdicts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformerlm.token_files.dataset import TokenDataset
from transformerlm.utils.files import write_whole

Trouble = Literal["not_finite", "spike", "nothing_learnt"]
"""Why a step is not made. The last is a fact of the data, not of the model: the guard does not count it."""

# How many losses it takes to tell a jump from an ordinary loss, and the weight of a new loss in the average.
NUM_LOSSES_BEFORE_SPIKES = 20
NEW_LOSS_WEIGHT = 0.02
MAX_BATCH_FILES = 20


def trouble_with(loss: float, grad_norm: float, *, max_loss: float) -> Trouble | None:
    """Return why a step with this loss and gradient norm must not be made; None: it may."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return "not_finite"
    return "spike" if loss > max_loss else None


@dataclass
class GuardState:
    """What the guard remembers.

    Args:
        skipped_steps: all steps that were skipped.
        skipped_in_a_row: steps that were skipped since the last one that was made.
        data_offset: step s trains on batch s + data_offset; a rollback raises it, so that no batch comes twice.
        num_losses: number of losses in `loss_average`.
        loss_average: running mean of the losses of the steps made; it follows the last fifty or so.
    """

    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    data_offset: int = 0
    num_losses: int = 0
    loss_average: float = 0.0

    def max_loss(self, spike_factor: float | None) -> float:
        """Return above what loss the next step is a spike: so many times the average; None: no loss is one."""
        if spike_factor is None or self.num_losses < NUM_LOSSES_BEFORE_SPIKES:
            return math.inf
        return spike_factor * self.loss_average

    def made(self, loss: float) -> None:
        """Count a step that was made, and let the average follow its loss."""
        self.skipped_in_a_row = 0
        self.num_losses += 1
        self.loss_average += (loss - self.loss_average) * max(1 / self.num_losses, NEW_LOSS_WEIGHT)

    def skipped(self) -> None:
        """Count a step that was skipped."""
        self.skipped_steps += 1
        self.skipped_in_a_row += 1


def write_batch(
    folder: Path, step: int, *, data: TokenDataset, starts: Sequence[int], context_length: int, facts: Mapping[str, Any]
) -> Path | None:
    """Write a refused step's batch to a file of `folder`, and return its path: `facts`, starts and ids of its windows.

    Where `folder` holds `MAX_BATCH_FILES` already, nothing is written and None is returned: the first ones tell most.

    Raises:
        OSError: the file cannot be written.
    """
    folder.mkdir(exist_ok=True)
    if len(list(folder.glob("step-*.json"))) >= MAX_BATCH_FILES:
        return None
    record = {
        "step": step,
        **{key: str(value) if isinstance(value, float) else value for key, value in facts.items()},  # JSON knows no nan
        "data": str(data.path),
        "data_sha256": data.sha256,
        "starts": list(starts),
        "token_ids": [data.tokens[start : start + context_length + 1].tolist() for start in starts],
    }
    path = folder / f"step-{step:08d}.json"
    write_whole(path, json.dumps(record, allow_nan=False) + "\n")
    return path
