"""`training.micro_batch_size = "auto"`: the most sequences in a forward pass that fit into memory.

The batch stays as it is; only its cut changes. Only sizes that divide the largest share of a rank are considered. The
choice is made once: it is in the configuration that every checkpoint holds, and a resumed run takes it from there,
because another size would change the last bits of every sum.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar

import torch

from config.train import TrainConfig
from profiling import memory
from transformerlm.checkpoints.load import fine_tuning_of, load_config_of
from transformerlm.distributed.world import World, all_reduce_min
from transformerlm.models.estimates import estimate_training_memory
from transformerlm.models.lora import fine_tune, num_lora_keys
from transformerlm.models.settings import ModelSettings
from transformerlm.models.transformer import TransformerLM
from transformerlm.training.build import largest_share
from transformerlm.training.dropout_keys import dropout_keys
from transformerlm.training.loop import batch_loss
from transformerlm.training.planning.machine import Machine
from transformerlm.training.reading import Reading
from transformerlm.utils.device import available_memory_bytes, device_memory_bytes, synchronize
from transformerlm.utils.dtypes import Precision, autocast

# The share of the free memory to use: the estimate may be too low (docs/usage.md), other programs need some, and
# nothing must be swapped.
_BY_ESTIMATE = 0.6
# The share of a device's memory to use: a single pass does not show how the free memory is broken up later.
_BY_TRIAL = 0.9


def memory_by_part(
    config: TrainConfig,
    *,
    micro_batch_size: int,
    precision: Precision,
    device: torch.device,
    num_ranks: int = 1,
    shard_size: int = 1,
) -> dict[str, int]:
    """Return the estimated bytes of a training step on one of `num_ranks` ranks by part, and their total.

    `shard_size` of the ranks share one copy of weights, gradients and optimizer.
    """
    return estimate_training_memory(
        ModelSettings(**config.model.model_dump()),
        micro_batch_size=micro_batch_size,
        precision=precision,
        optimizer=config.optimizer.name,
        device_type=device.type,
        num_ranks=num_ranks,
        shard_size=shard_size,
        fine_tuning=fine_tuning_of(config),
    )


Config = TypeVar("Config", bound=TrainConfig)


def resolve(
    config: Config,
    *,
    device: torch.device,
    precision: Precision,
    world: World,
    resumed: Path | None = None,
    shard_size: int = 1,
) -> Config:
    """Return the configuration with a number in place of `micro_batch_size = "auto"`, the same on every rank.

    `resumed` is the checkpoint from which the run goes on: its number is used again if it divides a rank's share.
    Otherwise, on CUDA a forward and backward pass is tried with fewer and fewer sequences; the estimate decides
    elsewhere, and where ranks share a model, which none of them could try alone.
    """
    if config.training.micro_batch_size != "auto":
        return config
    share = largest_share(config.training.batch_size, world.world_size)
    before = load_config_of(resumed).training.micro_batch_size if resumed else None
    if not isinstance(before, int) or share % before:
        ranks = {"num_ranks": world.world_size, "shard_size": shard_size}
        if device.type == "cuda" and shard_size == 1:
            chosen = _largest_that_runs(config, divisors(share), device, precision, world.world_size)
        else:
            free = memory_of_a_rank(available_memory_bytes(device), device, world)
            chosen = _largest_within(config, divisors(share), device, precision, free, **ranks)
        before = all_reduce_min(chosen, world)
    return _with_size(config, before)


def resolve_elsewhere(config: Config, machine: Machine, *, precision: Precision, shard_size: int = 1) -> Config:
    """Return what `resolve` would return on a machine that is not here, as far as the estimate can tell."""
    if config.training.micro_batch_size != "auto":
        return config
    sizes = divisors(largest_share(config.training.batch_size, machine.num_processes))
    ranks = {"num_ranks": machine.num_processes, "shard_size": shard_size}
    chosen = _largest_within(config, sizes, machine.device, precision, machine.available_bytes, **ranks)
    return _with_size(config, chosen)


def memory_of_a_rank(num_bytes: int, device: torch.device, world: World) -> int:
    """Return how much of `num_bytes` of a device's memory one rank may use; the ranks of a machine share its CPU's."""
    return num_bytes if device.type == "cuda" else num_bytes // world.local_world_size


def _with_size(config: Config, size: int) -> Config:
    training = config.training.model_copy(update={"micro_batch_size": size})
    return config.model_copy(update={"training": training})


def divisors(number: int) -> list[int]:
    """Return all divisors of a number, the largest first."""
    low = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*low, *(number // divisor for divisor in low)}, reverse=True)


def _largest_within(
    config: TrainConfig, sizes: list[int], device: torch.device, precision: Precision, available: int, **ranks: int
) -> int:
    def total(size: int) -> int:
        return memory_by_part(config, micro_batch_size=size, precision=precision, device=device, **ranks)["total"]

    return next((size for size in sizes if total(size) <= _BY_ESTIMATE * available), 1)


def _largest_that_runs(
    config: TrainConfig, sizes: list[int], device: torch.device, precision: Precision, num_ranks: int = 1
) -> int:
    """Try one size after another, while a block takes the memory of what does not exist yet: the optimizer's state.

    With several ranks it also takes that of what a rank gathers.
    The model is not compiled: compiled it needs less memory, and it would be compiled once for each size. A size that
    the preflight would refuse is not tried, and where it would refuse all, no model is made.
    """
    room = device_memory_bytes(device)
    place: dict[str, Any] = {"precision": precision, "device": device, "num_ranks": num_ranks}
    parts = {size: memory_by_part(config, micro_batch_size=size, **place) for size in sizes}
    if parts[1]["total"] > room:
        return 1
    model = TransformerLM(**config.model.model_dump(), device=device)
    fine_tune(model, fine_tuning_of(config))
    held = parts[1]["optimizer"] + parts[1]["gathered"] + int((1 - _BY_TRIAL) * room)
    likely = (size for size in sizes if parts[size]["total"] <= room)
    chosen = next((size for size in likely if _runs(model, size, held, device, precision)), 1)
    del model
    memory.reset_peaks(device)  # the peak that a run logs is its own
    return chosen


def _runs(model: TransformerLM, size: int, held: int, device: torch.device, precision: Precision) -> bool:
    try:
        block = torch.empty(held, dtype=torch.uint8, device=device)
        # (size, context_length): any ids do, each below vocab_size.
        ids = torch.arange(size * model.context_length, device=device).view(size, -1) % model.vocab_size
        more = num_lora_keys(model)
        keys = dropout_keys(model.settings, range(size), seed=0, step=1, num_more=more, device=device)
        reading = Reading(0 if model.settings.document_mask else None)
        with autocast(device, precision):
            _, loss = batch_loss(model, ids, ids, dropout_keys=keys, reading=reading)
        loss.backward()  # type: ignore[no-untyped-call]
        synchronize(device)
        del block
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    return True
