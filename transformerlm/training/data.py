"""The data of a run, and the batches that are cut from a token file.

A training batch is a pure function of (seed, step). Its windows depend neither on the number of ranks and micro-batches
that share it, nor on what was drawn before, so a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transformerlm.token_files.dataset import TokenDataset, Tokens
from transformerlm.token_files.loss_mask import LossMask
from transformerlm.token_files.shards import ShardedTokens
from transformerlm.training.document_rows import DocumentRows
from transformerlm.training.epoch_order import epoch_starts
from transformerlm.training.reading import IGNORED, Reading

if TYPE_CHECKING:  # batches need none of its libraries
    from config.train import TrainConfig
    from transformerlm.tokenizer.tokenizer import Tokenizer


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
    a length of their own. `batch_size` counts the windows of the
    whole batch. It is cut into `num_micro_batches * world_size` contiguous parts whose sizes differ by one at most;
    part `rank * num_micro_batches + micro_batch` is returned. An empty part comes as one window without targets. Raises
    ValueError when a rank would have no window at all, or the data is shorter than a window. Its eleven parameters are
    all that a batch depends on.
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


class Prefetcher:
    """Makes the batches of the next step in a thread, while the device computes those of this one.

    `make` is a pure function of the step, so batches made early are the same as batches made late. Those of a step that
    was not foreseen, as after a rollback, are made on request.
    """

    def __init__(self, make: Callable[[int], list[Batch]]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, "prefetch", initializer=_take_device, initargs=(_current_device(),))
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def __call__(self, step: int) -> list[Batch]:
        """Return the batches of `step`, and begin to make those of the step after it."""
        ahead, self._ahead = self._ahead, None
        batches = ahead[1].result() if ahead and ahead[0] == step else self._make(step)
        self._ahead = (step + 1, self._thread.submit(self._make, step + 1))
        return batches


def made_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches of an iterator, each made in a thread while the device computes the one before it."""
    with ThreadPoolExecutor(1, "batches", initializer=_take_device, initargs=(_current_device(),)) as thread:
        following = thread.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = thread.submit(next, batches, None)
            yield batch


def _current_device() -> int | None:
    is_used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # a run on the CPU begins no GPU
    return torch.cuda.current_device() if is_used else None


def _take_device(index: int | None) -> None:
    if index is not None:  # a new thread begins with the machine's first CUDA device
        torch.cuda.set_device(index)


def random_batch(
    dataset: Tokens,
    batch_size: int,
    context_length: int,
    device: torch.device | str,
    *,
    rng: np.random.Generator | None = None,
) -> Batch:
    """Return a batch of random windows: inputs and targets, int64, `(batch_size, context_length)`.

    `rng` defaults to a fresh generator seeded by the operating system. Training uses `get_batch` instead.
    """
    rng = np.random.default_rng() if rng is None else rng
    starts = rng.integers(0, _num_starts(len(dataset), context_length), size=batch_size)
    return _windows(dataset, starts, context_length, device)


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
        inputs, targets = _on(device, tokens.read(starts))
        return inputs, targets
    if isinstance(tokens, MaskedTokens):
        inputs, targets = _windows(tokens.tokens, starts, context_length, "cpu")
        learnt = np.stack([tokens.mask.read(start + 1, start + 1 + context_length) for start in starts.tolist()])
        inputs, targets = _on(device, torch.stack([inputs, targets.where(torch.from_numpy(learnt), IGNORED)]).numpy())
        return inputs, targets
    if isinstance(tokens, ShardedTokens):
        # A GPU gets the ids as they are in the file: a quarter of the bytes, for uint16.
        ids = tokens.windows(starts, context_length + 1, dtype=None if device.type == "cuda" else np.int64)
    else:
        positions = starts[:, None] + np.arange(context_length + 1)  # (windows, context_length + 1)
        ids = np.asarray(tokens[positions])
    windows = _on(device, ids)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _on(device: torch.device, ids: npt.NDArray[np.integer[Any]]) -> Tensor:
    if device.type == "cuda":
        return _sent(ids, device)
    return torch.from_numpy(ids.astype(np.int64, copy=False)).to(device)


def _sent(ids: npt.NDArray[np.integer[Any]], device: torch.device) -> Tensor:
    """Return `ids` as int64 on a device to which they travel with as few bytes as they have."""
    signed, bits = as_signed(ids)
    if torch.cuda.is_available():
        signed = signed.pin_memory()  # lets the copy run while the device computes
    return widened(signed.to(device, non_blocking=True), bits)


def as_signed(ids: npt.NDArray[np.integer[Any]]) -> tuple[Tensor, int | None]:
    """Return the bytes of `ids` as signed numbers of their size, and how many bits unsigned ones have; else None.

    PyTorch does not compute with all unsigned numbers on every device. The bytes are copied only where their order is
    another machine's.
    """
    native = np.ascontiguousarray(ids, dtype=ids.dtype.newbyteorder("="))
    size = native.dtype.itemsize
    bits = 8 * size if native.dtype.kind == "u" and size < 8 else None
    return torch.from_numpy(native.view(f"i{size}")), bits


def widened(signed: Tensor, bits: int | None) -> Tensor:
    """Return the ids that `as_signed` gave, as int64, on the device where they are now."""
    wide = signed.to(torch.int64)
    return wide if bits is None else wide.bitwise_and_((1 << bits) - 1)
