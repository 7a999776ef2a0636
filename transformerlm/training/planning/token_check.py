"""The ids of a run's data, read once before it starts: are they those that were written, and does the model know them?

The files are dealt out to the ranks, so that over all ranks each byte is read once: of a thousand shards on a hundred
ranks, each rank reads ten.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from config.train import TrainConfig
from transformerlm.distributed.world import World, all_reduce_sum, together
from transformerlm.token_files.dataset import TokenDataset, TokenFile
from transformerlm.tokenizer.tokenizer import Tokenizer

# The ranks meet again after this share of the time that they wait for each other, however long a file takes to read.
_ROUND = 0.1


def check_tokens(
    datasets: Mapping[str, TokenDataset], *, config: TrainConfig, tokenizer: Tokenizer, world: World
) -> None:
    """Read each file of the datasets on one rank; what one rank finds wrong ends all of them.

    `datasets` has the name of each in the TOML. Call it on every rank, with the same files.

    Raises:
        ValueError: a file is not the one that was written, or holds an id beyond the model's vocabulary.
    """
    files = {file.path: (key, file) for key, dataset in list(datasets.items())[::-1] for file in dataset.files()}
    in_order = list(files.values())  # not by path: machines may have their copies elsewhere
    mine = deal([file.tokens for _, file in in_order], world.world_size)[world.rank]
    reading = _checked([in_order[index] for index in mine], config.model.vocab_size, tokenizer)
    with together(world):
        _read_in_rounds(reading, world)


def deal(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Return which files, by their numbers, each rank reads: the largest first, each to the rank with the least so far.

    It is the same on every rank.
    """
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        load, rank = heapq.heappop(loads)
        dealt[rank].append(index)
        heapq.heappush(loads, (load + sizes[index], rank))
    return dealt


def _checked(files: Sequence[tuple[str, TokenFile]], vocab_size: int, tokenizer: Tokenizer) -> Iterator[None]:
    """Check some files, and come back after every block that has been read."""
    for key, file in files:
        largest = -1
        for so_far in file.check_blocks():
            largest = so_far
            yield
        if largest >= vocab_size:
            raise ValueError(
                f"{key}: {file.path} holds the id {largest}, but model.vocab_size is {vocab_size}; "
                f"set model.vocab_size to at least {tokenizer.vocab_size}"
            )


def _read_in_rounds(reading: Iterator[None], world: World) -> None:
    """Read to the end on all ranks, which meet now and then, so that none takes a rank for lost that reads for long."""
    error: Exception | None = None
    reads = True
    while True:
        try:
            reads = reads and _reads_on(reading, _ROUND * world.timeout if world.is_distributed else float("inf"))
        except (ValueError, OSError) as found:
            error, reads = found, False
        if not all_reduce_sum(torch.tensor(int(reads)), world):
            break
    if error:
        raise error


def _reads_on(reading: Iterator[None], seconds: float) -> bool:
    """Read for some seconds, and return whether there is more."""
    end = time.monotonic() + seconds
    return any(time.monotonic() > end for _ in reading)
