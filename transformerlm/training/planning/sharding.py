"""`parallel.shard`: how many ranks share one copy of weights, gradients and optimizer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from config.train import TrainConfig
from transformerlm.distributed.world import World
from transformerlm.training.build import sequences_per_pass
from transformerlm.training.planning.micro_batch import divisors, memory_by_part, memory_of_a_rank
from transformerlm.utils.device import device_memory_bytes
from transformerlm.utils.dtypes import Precision

# The share of a device's memory that "auto" fills: the estimate may be too low, and a wrong guess ends the run.
_TO_FILL = 0.9


def choose_shard_size(
    config: TrainConfig, *, world_size: int, local_world_size: int | None, fits: Callable[[int], bool]
) -> int:
    """Return how many of `world_size` ranks share one copy, as `parallel.shard` says.

    Args:
        config: the run; "auto" takes 1 if that fits, else the fewest whole machines that fit, else all.
        world_size: the ranks of the run. One rank alone shares with nobody, whatever the key says.
        local_world_size: the ranks of each machine; None: machines have different numbers of them. Where it does not
            divide all ranks, "auto" takes 1 or all.
        fits: whether the memory of a rank is enough if so many ranks share.

    Raises:
        ValueError: the number does not divide the ranks, or the machines of "node" have different numbers of ranks.
    """
    shard = config.parallel.shard
    if world_size == 1:
        return 1
    if isinstance(shard, int):
        if world_size % shard:
            possible = ", ".join(str(size) for size in reversed(divisors(world_size)))
            raise ValueError(
                f"parallel.shard = {shard}: expected a number that divides the {world_size} processes ({possible}); "
                'set one of these, or "auto"'
            )
        return shard
    if local_world_size is not None and world_size % local_world_size:
        local_world_size = None
    if shard == "node":
        if local_world_size is None:
            raise ValueError(
                f'parallel.shard = "node": expected the same number of processes on each machine, found others of '
                f'{world_size} in all; set parallel.shard = "all", or start as many on each machine'
            )
        return local_world_size
    if shard == "all":
        return world_size
    machines = divisors(world_size // local_world_size)[::-1] if local_world_size else []
    sizes = (1, *(number * (local_world_size or 0) for number in machines))
    return next((size for size in sizes if fits(size)), world_size)


def memory_check(
    config: TrainConfig, *, precision: Precision, device: torch.device, memory_bytes: int, world_size: int
) -> Callable[[int], bool]:
    """Return `fits` for `choose_shard_size`: whether the estimate for a rank leaves a tenth of `memory_bytes` free.

    `memory_bytes` is the memory of one rank. The micro-batch is the configuration's, or one sequence if it is still to
    be chosen.
    """
    is_open = config.training.micro_batch_size == "auto"
    sequences = 1 if is_open else sequences_per_pass(config.training, world_size)

    def fits(shard_size: int) -> bool:
        ranks = {"num_ranks": world_size, "shard_size": shard_size}
        parts = memory_by_part(config, micro_batch_size=sequences, precision=precision, device=device, **ranks)
        return parts["total"] <= _TO_FILL * memory_bytes

    return fits


def memory_check_here(
    config: TrainConfig, *, precision: Precision, device: torch.device, world: World
) -> Callable[[int], bool]:
    """Return `memory_check` for a rank of this machine, whose ranks share its memory if the device is a CPU."""
    memory = memory_of_a_rank(device_memory_bytes(device), device, world)
    return memory_check(config, precision=precision, device=device, memory_bytes=memory, world_size=world.world_size)
