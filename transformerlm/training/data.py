"""The batches that are cut from a token file.

A training batch is a pure function of (seed, step). Its windows depend neither on the number of ranks and micro-batches
that share it, nor on what was drawn before, so a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transformerlm.token_files.dataset import Tokens
from transformerlm.token_files.loss_mask import LossMask
from transformerlm.token_files.shards import ShardedTokens
from transformerlm.training.document_rows import DocumentRows
from transformerlm.training.epoch_order import epoch_starts
from transformerlm.training.reading import IGNORED
from transformerlm.training.to_device import to_device


@dataclass(frozen=True)
class MaskedTokens:
    """Ids of which only those that a mask names are learnt; windows of them have targets that are `IGNORED`."""

    tokens: Tokens
    mask: LossMask

    def __len__(self) -> int:
        return len(self.tokens)


Batch = tuple[Tensor, Tensor]
TrainingRows = Tokens | MaskedTokens | DocumentRows
"""What batches are cut from."""
Order = Literal["draw", "epoch"]


def sample_starts(
    num_tokens: int, *, batch_size: int, context_length: int, seed: int, step: int
) -> npt.NDArray[np.int64]:
    """Return the first positions of the `batch_size` windows of batch (seed, step), each equally likely.

    The numbers are the raw 64-bit words of numpy's Philox generator keyed with (seed, step), modulo the number of
    starts. numpy promises that this stream never changes, which it does not for `Generator.integers`; the modulo
    favours small starts by less than num_tokens / 2^64. Raises ValueError when there are fewer than context_length + 1
    tokens.
    """
    num_starts = _num_starts(num_tokens, context_length)
    if seed < 0 or step < 0:
        raise ValueError(f"data: seed and step must be at least 0, got seed {seed} and step {step}")
    words = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(batch_size)
    return (words % np.uint64(num_starts)).astype(np.int64)


ORDERS: dict[Order, Callable[..., npt.NDArray[np.int64]]] = {"draw": sample_starts, "epoch": epoch_starts}
"""Which windows are a batch, for each value of `data.order`."""


def get_batch(
    tokens: TrainingRows,
    *,
    batch_size: int,
    context_length: int,
    seed: int,
    step: int,
    order: Order = "draw",
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    micro_batch: int = 0,
    num_micro_batches: int = 1,
) -> Batch:
    """Return one part of batch (seed, step): inputs and targets, int64, `(windows, context_length)`.

    `order` says which windows: those of `sample_starts` or of `epoch_starts`. `DocumentRows` have an order, a seed and
    a length of their own. `batch_size` counts the windows of the whole batch. It is cut into `num_micro_batches *
    world_size` contiguous parts whose sizes differ by one at most; part `rank * num_micro_batches + micro_batch` is
    returned. An empty part comes as one window without targets. Raises ValueError when a rank would have no window at
    all, or the data is shorter than a window. Its eleven parameters are all that a batch depends on.
    """
    place = {"rank": rank, "world_size": world_size, "micro_batch": micro_batch, "num_micro_batches": num_micro_batches}
    if not (0 <= rank < world_size and 0 <= micro_batch < num_micro_batches):
        raise ValueError(
            f"data: rank {rank} of {world_size}, micro_batch {micro_batch} of {num_micro_batches}: counted from 0"
        )
    if batch_size < world_size:
        raise ValueError(
            f"data: a batch of {batch_size} windows cannot be cut into {world_size} ranks; use a larger batch_size"
        )
    if isinstance(tokens, DocumentRows):
        starts = tokens.places(batch_size=batch_size, step=step)
    else:
        _num_starts(len(tokens), context_length)
        window = {"context_length": context_length, "seed": seed}
        starts = ORDERS[order](len(tokens), batch_size=batch_size, step=step, **window)
    rows = rows_of_part(batch_size, **place)
    own = starts[rows.start : rows.stop]
    inputs, targets = _windows(tokens, own if len(own) else starts[:1], context_length, device)
    return inputs, targets[: len(own)]


def rows_of_part(batch_size: int, *, rank: int, world_size: int, micro_batch: int, num_micro_batches: int) -> range:
    """Return which rows of a batch are one part of it, in the order of `get_batch`; a part may be empty."""
    # One rank after the other, so that each has its share even if some micro-batches are empty.
    num_parts, part = num_micro_batches * world_size, rank * num_micro_batches + micro_batch
    return range(part * batch_size // num_parts, (part + 1) * batch_size // num_parts)


def sequential_batches(
    tokens: TrainingRows,
    *,
    batch_size: int,
    context_length: int,
    max_windows: int | None = None,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield the data in order as windows that do not overlap, for evaluation; the last batch may be smaller.

    Every token but the first is a target once, except for a rest shorter than a window. Of several ranks each gets
    every `world_size`-th batch, and all get equally many of one size: where windows run out, the first one fills up the
    inputs, without targets. `DocumentRows` come in the order of their first epoch. Raises ValueError when the data is
    shorter than context_length + 1 tokens.
    """
    if isinstance(tokens, DocumentRows):
        starts = np.arange(len(tokens), dtype=np.int64)[:max_windows]
    else:
        _num_starts(len(tokens), context_length)
        starts = (np.arange((len(tokens) - 1) // context_length, dtype=np.int64) * context_length)[:max_windows]
    per_round = world_size * batch_size
    for first in range(0, len(starts), per_round):
        own = starts[first + rank * batch_size :][:batch_size]
        fill = starts[:1].repeat(batch_size - len(own) if world_size > 1 else 0)
        inputs, targets = _windows(tokens, np.concatenate([own, fill]), context_length, device)
        yield inputs, targets[: len(own)]


def _num_starts(num_tokens: int, context_length: int) -> int:
    if num_tokens < context_length + 1:
        raise ValueError(
            f"data: {num_tokens} tokens are too few for a window of context_length + 1 = {context_length + 1}; "
            "use more text or a smaller context_length"
        )
    return num_tokens - context_length


def _windows(
    tokens: TrainingRows, starts: npt.NDArray[np.int64], context_length: int, device: torch.device | str
) -> Batch:
    device = torch.device(device)
    if isinstance(tokens, DocumentRows):
        inputs, targets = to_device(tokens.read(starts), device)
        return inputs, targets
    if isinstance(tokens, MaskedTokens):
        inputs, targets = _windows(tokens.tokens, starts, context_length, device)
        learnt = np.stack([tokens.mask.read(start + 1, start + 1 + context_length) for start in starts.tolist()])
        return inputs, targets.where(to_device(learnt.view(np.uint8), device) != 0, IGNORED)
    if isinstance(tokens, ShardedTokens):
        # A GPU gets the ids as they are in the file: a quarter of the bytes, for uint16.
        ids = tokens.windows(starts, context_length + 1, dtype=None if device.type == "cuda" else np.int64)
    else:
        positions = starts[:, None] + np.arange(context_length + 1)  # (windows, context_length + 1)
        ids = np.asarray(tokens[positions])
    windows = to_device(ids, device)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
