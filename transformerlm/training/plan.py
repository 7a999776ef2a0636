"""What a training run will take, by arithmetic: parameters, FLOPs, tokens, memory and disk. Nothing is built."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from config.train import TrainConfig
from transformerlm.models.estimates import flops_per_token, parameters_by_part
from transformerlm.training.micro_batch import divisors, memory_by_part, sequences_per_pass
from transformerlm.training.preflight import existing_parent
from transformerlm.utils.device import available_memory_bytes, device_memory_bytes
from transformerlm.utils.dtypes import Precision

CHINCHILLA = 20  # tokens per parameter that train the best model for a given compute (Hoffmann et al. 2022)

Facts = dict[str, Any]


def arithmetic(config: TrainConfig, *, run_dir: Path, device: torch.device, precision: Precision) -> Facts:
    """Return what can be known of a run on one device without running it, under flat dotted keys with units.

    `config` has a number for its micro-batch. The matrices of a tied head count in its FLOPs, not in its parameters.
    """
    training, model = config.training, config.model.model_dump()
    parts = parameters_by_part(model)
    parameters, tokens_per_step = sum(parts.values()), training.batch_size * config.model.context_length
    flops, tokens = flops_per_token(model, config.model.context_length), tokens_per_step * training.max_steps
    memory = _memory(config, device, precision)
    checkpoint = 4 * parameters + memory["optimizer"]
    room = device_memory_bytes(device)
    return {
        "device": str(device),
        "precision": precision,
        **{f"parameters.{name}": count for name, count in parts.items()},
        "parameters.total": parameters,
        "flops.per_token": flops,
        "flops.total": flops * tokens,
        "steps": training.max_steps,
        "tokens.per_step": tokens_per_step,
        "tokens.total": tokens,
        "tokens.per_parameter": tokens / parameters,
        "batch_size": training.batch_size,
        "micro_batch_size": sequences_per_pass(training, 1),
        **{f"memory.{name}_bytes": size for name, size in memory.items()},
        "memory.device_bytes": room,
        "memory.available_bytes": available_memory_bytes(device),
        "memory.fits": memory["total"] <= room,
        "checkpoint.bytes": checkpoint,
        # Those that are kept, the best one, and the one that is being written.
        "disk.needed_bytes": checkpoint * (config.checkpoint.keep + 2),
        "disk.free_bytes": shutil.disk_usage(existing_parent(run_dir)).free,
    }


def remedies(config: TrainConfig, *, device: torch.device, precision: Precision) -> list[tuple[str, int]]:
    """Return what saves memory: each change, as it stands in the TOML, with the total of bytes after it.

    Each change comes on top of those before it; the list ends with the first that makes the run fit, if one does.
    """
    room, found = device_memory_bytes(device), list[tuple[str, int]]()
    smaller = [size for size in divisors(config.training.batch_size) if size < sequences_per_pass(config.training, 1)]
    if smaller:
        fitting = (size for size in smaller if _memory(config, device, precision, size)["total"] <= room)
        size = next(fitting, 1)
        training = config.training.model_copy(update={"micro_batch_size": size})
        config = config.model_copy(update={"training": training})
        found.append((f"training.micro_batch_size = {size}", _memory(config, device, precision)["total"]))
    if not config.model.activation_checkpointing and (not found or found[-1][1] > room):
        config = config.model_copy(update={"model": config.model.model_copy(update={"activation_checkpointing": True})})
        found.append(("model.activation_checkpointing = true", _memory(config, device, precision)["total"]))
    if precision == "fp32" and (not found or found[-1][1] > room):
        found.append(('training.precision = "bf16"', _memory(config, device, "bf16")["total"]))
    return found


def _memory(config: TrainConfig, device: torch.device, precision: Precision, size: int | None = None) -> dict[str, int]:
    size = size or sequences_per_pass(config.training, 1)
    return memory_by_part(config, micro_batch_size=size, precision=precision, device=device)
