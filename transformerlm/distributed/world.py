"""The ranks that `torchrun` starts, our place among them, and what they tell each other.

In a world of one, every call returns at once and changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from transformerlm.distributed.watch import Progress

TIMEOUT = 600.0
# The watch names the missing rank first; the backend's own timeout is for what the watch cannot see.
_BACKEND_MARGIN = 15.0


@dataclass(frozen=True)
class World:
    """The ranks of a run and our place among them.

    Args:
        rank: our number among all ranks.
        local_rank: our number among those of this machine, which is also that of our device.
        world_size: how many ranks there are.
        local_world_size: how many of them are on this machine.
        timeout: the seconds that a rank waits for another.
        progress: how far this rank has come; `arrive` moves it.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = field(default=1, repr=False)
    timeout: float = field(default=TIMEOUT, repr=False)
    progress: Progress = field(default_factory=Progress, repr=False, compare=False)

    @property
    def is_distributed(self) -> bool:
        """Whether the run has more than one rank."""
        return self.world_size > 1

    def arrive(self, where: str | None = None) -> None:
        """Say that we come to a place where all ranks meet, such as "step 12" or "saving step 12".

        The time that a rank waits for the others counts from here. Call it on all ranks alike, before something in
        which they wait for each other: all that this module offers does so itself, under the name that was given last.
        It costs next to nothing, and does nothing else.
        """
        self.progress.arrive(where)


def init_from_env(*, timeout: float = TIMEOUT) -> World:
    """Join the ranks that `torchrun` describes in the environment; without RANK, return a world of one.

    On CUDA machines each rank uses the device of its LOCAL_RANK, and nccl for tensors on it; otherwise gloo. Raises
    ValueError if the environment describes the ranks only in part, or if there is no such device. `timeout` is that of
    `World`.
    """
    if "RANK" not in os.environ:
        return World()
    rank, local_rank, world_size = (_integer(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if world_size == 1:
        return World()
    cuda = torch.cuda.is_available()
    if cuda:
        found = torch.cuda.device_count()
        if local_rank >= found:
            raise ValueError(
                f"LOCAL_RANK: expected one of the {found} CUDA devices of this machine, got {local_rank}; "
                f"start torchrun with --nproc-per-node={found}"
            )
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        # Numbers on the host go through gloo even then, so that they wait for no device.
        backend, device = ("cpu:gloo,cuda:nccl", torch.device("cuda", local_rank)) if cuda else ("gloo", None)
        dist.init_process_group(backend, device_id=device, timeout=timedelta(seconds=timeout + _BACKEND_MARGIN))
    local_world_size = _integer("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else world_size
    return World(rank, local_rank, world_size, local_world_size, timeout)


def is_main(world: World) -> bool:
    """Return whether this rank is the one that logs and saves."""
    return world.rank == 0


def all_reduce_sum(tensor: Tensor, world: World) -> Tensor:
    """Return the sum of the tensor over the ranks; the argument is not changed."""
    if not world.is_distributed:
        return tensor
    world.arrive()
    summed = tensor.detach().clone()
    dist.all_reduce(summed)
    return summed


def all_reduce_min(number: int, world: World) -> int:
    """Return the smallest of the ranks' numbers."""
    if not world.is_distributed:
        return number
    world.arrive()
    least = torch.tensor(number)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)


def gather_text(text: str, world: World) -> list[str]:
    """Return the texts of all ranks, in the order of the ranks; they travel as bytes, without pickle."""
    if not world.is_distributed:
        return [text]
    world.arrive()
    data = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
    lengths = [torch.zeros((), dtype=torch.int64) for _ in range(world.world_size)]
    dist.all_gather(lengths, torch.tensor(len(text.encode())))
    longest = max(1, *(int(length) for length in lengths))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(data)] = data
    received = [torch.empty(longest, dtype=torch.uint8) for _ in range(world.world_size)]
    dist.all_gather(received, padded)
    return [bytes(one[:length].tolist()).decode() for one, length in zip(received, lengths, strict=True)]


@contextmanager
def together(world: World) -> Iterator[None]:
    """Let a ValueError or OSError of one rank end the block on all ranks, so that none waits for the one that failed.

    The rank with the error raises its own; the others raise a ValueError that names the rank and quotes it.
    """
    error: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as found:
        error = found
    messages = gather_text("" if error is None else str(error) or type(error).__name__, world)
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message:
            raise ValueError(f"rank {rank} of {world.world_size}: {message}")


def barrier(world: World) -> None:
    """Wait until every rank gets here."""
    if world.is_distributed:
        world.arrive()
        dist.barrier()


def shutdown(world: World) -> None:
    """Leave the group; call it last, and on every rank."""
    if world.is_distributed and dist.is_initialized():
        dist.destroy_process_group()


def _integer(name: str) -> int:
    value = os.environ.get(name)
    if value is None or not value.isdecimal():
        found = "nothing" if value is None else repr(value)
        raise ValueError(f"{name}: expected a whole number beside RANK, found {found}; start the run with torchrun")
    return int(value)
