"""What a training run will need, by arithmetic alone: parameters, FLOPs, tokens, memory and disk."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from config.plan import PlanConfig
from config.schemas import duration_seconds
from config.train import TrainConfig
from transformerlm.models.estimates import checkpoint_bytes, flops_per_token, parameters_by_part
from transformerlm.models.settings import ModelSettings
from transformerlm.training.build import num_accumulation_steps, sequences_per_pass
from transformerlm.training.planning.machine import Machine
from transformerlm.training.planning.micro_batch import divisors, memory_by_part
from transformerlm.training.planning.preflight import existing_parent
from transformerlm.utils.dtypes import Precision

CHINCHILLA = 20  # tokens per parameter that train the best model for a given compute (Hoffmann et al. 2022)

Facts = dict[str, Any]


def arithmetic(config: TrainConfig, *, run_dir: Path, machine: Machine, precision: Precision) -> Facts:
    """Return what is known of a run without running it, under flat dotted keys with units.

    `config` has no "auto" as its micro-batch. The matrix of a tied head counts in FLOPs, but not in parameters.

    Raises:
        ValueError: the batch cannot be divided among the machine's processes.
    """
    training, model = config.training, ModelSettings(**config.model.model_dump())
    parts = parameters_by_part(model)
    parameters, tokens_per_step = sum(parts.values()), training.batch_size * config.model.context_length
    flops, tokens = flops_per_token(model, config.model.context_length), tokens_per_step * training.max_steps
    per_pass = sequences_per_pass(training, machine.num_processes)
    free = {"disk.free_bytes": shutil.disk_usage(existing_parent(run_dir)).free} if machine.is_here else {}
    memory = _memory(config, machine, precision, per_pass)
    checkpoint = checkpoint_bytes(model, optimizer=config.optimizer.name)
    return {
        "device": machine.name,
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
        "micro_batch_size": per_pass,
        "num_processes": machine.num_processes,
        "accumulation_steps": num_accumulation_steps(training.batch_size, per_pass, machine.num_processes),
        **{f"memory.{name}_bytes": size for name, size in memory.items()},
        "memory.device_bytes": machine.memory_bytes,
        "memory.available_bytes": machine.available_bytes,
        "memory.fits": memory["total"] <= machine.memory_bytes,
        "checkpoint.bytes": checkpoint,
        # The checkpoints that are kept, the best one, and the one that is being written.
        "disk.needed_bytes": checkpoint * (config.checkpoint.keep + 2),
        **free,
    }


def expected(config: PlanConfig, machine: Machine, *, plan: Facts) -> Facts:
    """Return how fast a run is assumed to be on a machine that is not here; `plan` is its `arithmetic`."""
    assert config.machine is not None
    rate = machine.expected_tokens_per_second(config.machine, flops_per_token=plan["flops.per_token"])
    max_time = config.training.max_time
    limit = duration_seconds(max_time) if max_time else math.inf
    facts = {"assumed.tokens_per_second": rate, "assumed.eta_seconds": min(plan["tokens.total"] / rate, limit)}
    if machine.flops_per_second is not None:
        used = rate * plan["flops.per_token"] / machine.num_processes
        facts |= {
            "assumed.peak_flops_per_second": machine.flops_per_second,
            "assumed.flops_utilisation": used / machine.flops_per_second,
        }
    return facts


def remedies(config: TrainConfig, *, machine: Machine, precision: Precision) -> list[tuple[str, int]]:
    """Return what saves memory: each change, as it is written in the TOML, with the total of bytes after it.

    Each change comes on top of those before it. The list ends with the first change after which the run fits.
    """
    room, found = machine.memory_bytes, list[tuple[str, int]]()
    size = sequences_per_pass(config.training, machine.num_processes)
    smaller = [one for one in divisors(config.training.batch_size // machine.num_processes) if one < size]
    if smaller:
        size = next((one for one in smaller if _memory(config, machine, precision, one)["total"] <= room), 1)
        found.append((f"training.micro_batch_size = {size}", _memory(config, machine, precision, size)["total"]))
    if not config.model.activation_checkpointing and (not found or found[-1][1] > room):
        config = config.model_copy(update={"model": config.model.model_copy(update={"activation_checkpointing": True})})
        found.append(("model.activation_checkpointing = true", _memory(config, machine, precision, size)["total"]))
    if precision == "fp32" and (not found or found[-1][1] > room):
        found.append(('training.precision = "bf16"', _memory(config, machine, "bf16", size)["total"]))
    return found


def _memory(config: TrainConfig, machine: Machine, precision: Precision, size: int) -> dict[str, int]:
    return memory_by_part(config, micro_batch_size=size, precision=precision, device=machine.device)
