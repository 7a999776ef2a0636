"""The ranks that `torchrun` or `srun` starts, our place among them, and what they tell each other.

In a world of one, every call returns at once and changes nothing.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from transformerlm.distributed.launcher import Launch, read_launch
from transformerlm.distributed.rendezvous import connect, meet
from transformerlm.distributed.watch import Progress, Watch
from transformerlm.utils.strings import in_words

TIMEOUT = 600.0
# The watch names the missing rank first; the backend's own timeout is for what the watch cannot see.
_BACKEND_MARGIN = 15.0
# What gloo and nccl say when a rank has gone.
_LOST = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "refused",
    "Timed out",
    "timed out",
    "gloo/",
    "NCCL",
    "Store",
)


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
        hosts: the machine of each rank.
        watch: what ends this process when another rank does not come; None: nothing does.
        holds_store: whether the others need this process until they have left.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = field(default=1, repr=False)
    timeout: float = field(default=TIMEOUT, repr=False)
    progress: Progress = field(default_factory=Progress, repr=False, compare=False)
    hosts: tuple[str, ...] = field(default=(), repr=False, compare=False)
    watch: Watch | None = field(default=None, repr=False, compare=False)
    holds_store: bool = field(default=False, repr=False, compare=False)

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


def init_from_env(
    *, device: str = "auto", timeout: float = TIMEOUT, end: Callable[[str | None], object] | None = None
) -> World:
    """Join the ranks that `torchrun` or `srun` describes in the environment; without them, return a world of one.

    On CUDA machines each rank uses the device of its local rank, and nccl for tensors on it; otherwise gloo.

    Args:
        device: "auto" or "cuda" for CUDA where there is some, or another kind for ranks without it.
        timeout: how long this rank waits for another, in seconds: now, and later.
        end: ends the process when another rank has been missing for that long; it gets the line that names it, or None
            if another rank has said it. None: nothing watches, and only the backend's own timeout applies.

    Raises:
        ValueError: the environment describes the ranks only in part, or there is no such device.
        TimeoutError: a rank did not come; the line names it.
    """
    launch = read_launch()
    if launch.world_size == 1:
        return World()
    own_device = _own_device(launch, device)
    meeting = meet(launch, timeout=timeout)
    progress, watch = Progress(), None
    progress.arrive("the start")
    if end is not None:
        store = PrefixStore(f"watch/{meeting.name}", connect(launch, timeout=timeout))
        watch = Watch(progress, store, rank=launch.rank, hosts=meeting.hosts, timeout=timeout, end=end)
        watch.start()
    if not dist.is_initialized():
        dist.init_process_group(
            # Numbers on the host go through gloo even with CUDA, so that they wait for no device.
            "cpu:gloo,cuda:nccl" if own_device else "gloo",
            store=PrefixStore(f"group/{meeting.name}", meeting.store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=timeout + _BACKEND_MARGIN),
            device_id=own_device,
        )
    sizes = (launch.rank, launch.local_rank, launch.world_size, launch.local_world_size)
    return World(*sizes, timeout, progress, meeting.hosts, watch, launch.holds_store)


def _own_device(launch: Launch, device: str) -> torch.device | None:
    """Take the CUDA device of our local rank; None on a machine without, or for another kind of device."""
    if device.startswith("cuda:"):
        raise ValueError(
            f'training.device: expected "cuda", of which each of the {launch.world_size} processes takes one, '
            f'found "{device}"; CUDA_VISIBLE_DEVICES chooses the GPUs'
        )
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return None
    found = torch.cuda.device_count()
    # srun --gpus-per-task=1 shows each task its own GPU alone.
    number = 0 if found == 1 and os.environ.get("SLURM_GPUS_PER_TASK") else launch.local_rank
    if number >= found:
        raise ValueError(
            f"LOCAL_RANK: expected one of the {found} CUDA devices of this machine, got {launch.local_rank}; "
            f"start torchrun with --nproc-per-node={found}"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


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
    encoded = text.encode("utf-8", "backslashreplace")  # a path of odd bytes must not stop a rank here
    data = torch.frombuffer(bytearray(encoded or b"\0"), dtype=torch.uint8)
    lengths = [torch.zeros((), dtype=torch.int64) for _ in range(world.world_size)]
    dist.all_gather(lengths, torch.tensor(len(encoded)))
    longest = max(1, *(int(length) for length in lengths))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(data)] = data
    received = [torch.empty(longest, dtype=torch.uint8) for _ in range(world.world_size)]
    dist.all_gather(received, padded)
    return [bytes(one[:length].tolist()).decode() for one, length in zip(received, lengths, strict=True)]


@contextmanager
def together(world: World) -> Iterator[None]:
    """Let a ValueError or OSError of one rank end the block on all ranks, so that none waits for the one that failed.

    The rank with the error raises its own; the others raise one of its kind that names the rank and quotes it.
    """
    error: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as found:
        error = found
    kinds = (kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _KINDS)  # the nearest that others know
    messages = gather_text("" if error is None else f"{next(kinds, 'ValueError')} {in_words(error)}", world)
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message:
            kind, _, words = message.partition(" ")
            raise _KINDS.get(kind, ValueError)(f"rank {rank} of {world.world_size}: {words}")


_KINDS = {kind.__name__: kind for kind in (OSError, FileNotFoundError, FileExistsError, PermissionError)}


def set_timeout(group: dist.ProcessGroup, world: World) -> None:
    """Let a group of some ranks wait as long as the group of all."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=world.timeout + _BACKEND_MARGIN), group)


def shutdown(world: World, *, has_failed: bool = False) -> None:
    """Leave the group; call it last, and on every rank.

    A rank that has failed alone leaves others that wait for it on their GPUs. NCCL would wait for them, here and while
    Python ends; so what is left to be said is said, and then the process ends at once.
    """
    if world.watch is not None:
        world.watch.stop(lingers=world.holds_store)
    if not world.is_distributed or not dist.is_initialized():
        return
    if has_failed and "nccl" in dist.get_backend_config():
        atexit.register(_end_at_once)
    else:
        dist.destroy_process_group()


def _end_at_once() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)


@contextmanager
def without_tracebacks(world: World) -> Iterator[None]:
    """Turn what the backend raises when another rank has gone into one line.

    Raises:
        ConnectionError: a collective failed, because another rank ended or the network broke.
    """
    try:
        yield
    except RuntimeError as error:
        if not world.is_distributed or not any(words in str(error) for words in _LOST):
            raise
        said = str(error).splitlines()[0]
        said = said.partition("] ")[2] if said.startswith("[") else said  # without the place in gloo's source
        raise ConnectionError(
            f'rank {world.rank} of {world.world_size} on {world.hosts[world.rank]}: lost another rank at "'
            f'{world.progress.where}", and ends, too ({said.partition(". ")[0]})'
        ) from error
