"""What a training run will need, by arithmetic alone: parameters, FLOPs, tokens, memory and disk."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from config.plan import PlanConfig
from config.schemas import duration_seconds
from config.train import TrainConfig
from transformerlm.checkpoints.load import fine_tuning_of
from transformerlm.checkpoints.save import Snapshot, count_tensor_files
from transformerlm.models.estimates import checkpoint_bytes, count_trained, flops_per_token, parameters_by_part
from transformerlm.models.lora import fine_tune
from transformerlm.models.settings import ModelSettings
from transformerlm.models.transformer import TransformerLM
from transformerlm.training.build import build_optimizer, largest_share, num_accumulation_steps, sequences_per_pass
from transformerlm.training.planning.machine import Machine
from transformerlm.training.planning.micro_batch import divisors, memory_by_part, resolve_elsewhere
from transformerlm.training.planning.preflight import existing_parent
from transformerlm.training.planning.sharding import choose_shard_size, memory_check
from transformerlm.utils.dtypes import Precision

CHINCHILLA = 20  # tokens per parameter that train the best model for a given compute (Hoffmann et al. 2022)

Facts = dict[str, Any]
Shard = int | Literal["auto", "node", "all"]


def arithmetic(
    config: TrainConfig, *, run_dir: Path, machine: Machine, precision: Precision, shard_size: int = 1
) -> Facts:
    """Return what is known of a run without running it, under flat dotted keys with units.

    `config` has no "auto" as its micro-batch, and `shard_size` processes share one copy of the model. Memory is that of
    a process. The matrix of a tied head counts in FLOPs, but not in parameters.

    Raises:
        ValueError: a process would have no sequence, or [fine_tuning] names what the model does not have.
    """
    training, model = config.training, ModelSettings(**config.model.model_dump())
    parts, fine_tuning = parameters_by_part(model), fine_tuning_of(config)
    parameters, tokens_per_step = sum(parts.values()), training.batch_size * config.model.context_length
    flops = flops_per_token(model, config.model.context_length, fine_tuning)
    tokens = tokens_per_step * training.max_steps
    per_pass = sequences_per_pass(training, machine.num_processes)
    memory = _memory(config, machine, precision, per_pass, shard_size)
    return {
        "device": machine.name,
        "precision": precision,
        **{f"parameters.{name}": count for name, count in parts.items()},
        "parameters.total": parameters,
        **({"parameters.trained": count_trained(model, fine_tuning)} if fine_tuning else {}),
        "flops.per_token": flops,
        "flops.total": flops * tokens,
        "steps": training.max_steps,
        "tokens.per_step": tokens_per_step,
        "tokens.total": tokens,
        "tokens.per_parameter": tokens / parameters,
        "batch_size": training.batch_size,
        "micro_batch_size": per_pass,
        "num_processes": machine.num_processes,
        "shard_size": shard_size,
        "accumulation_steps": num_accumulation_steps(training.batch_size, per_pass, machine.num_processes),
        **{f"memory.{name}_bytes": size for name, size in memory.items()},
        "memory.device_bytes": machine.memory_bytes,
        "memory.available_bytes": machine.available_bytes,
        "memory.fits": memory["total"] <= machine.memory_bytes,
        **_disk(config, run_dir, machine),
    }


def _disk(config: TrainConfig, run_dir: Path, machine: Machine) -> Facts:
    model = ModelSettings(**config.model.model_dump())
    checkpoint = checkpoint_bytes(model, optimizer=config.optimizer.name, fine_tuning=fine_tuning_of(config))
    free = {"disk.free_bytes": shutil.disk_usage(existing_parent(run_dir)).free} if machine.is_here else {}
    return {
        "checkpoint.bytes": checkpoint,
        "checkpoint.files": _num_tensor_files(config),
        # The checkpoints that are kept, the best one, and the one that is being written.
        "disk.needed_bytes": checkpoint * (config.checkpoint.keep + 2),
        **free,
    }


def _num_tensor_files(config: TrainConfig) -> int:
    """Return the number of a checkpoint's files of tensors, from a model and an optimizer that hold no numbers."""
    model = TransformerLM(**config.model.model_dump(), device="meta")
    fine_tune(model, fine_tuning_of(config))
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    optimizer.step()  # its state begins here
    snapshot = Snapshot.of(model, optimizer, None, config_toml="", state={})
    return count_tensor_files(snapshot, max_file_bytes=config.checkpoint.max_file_mb * 10**6)


def shard_size_for(config: PlanConfig, machine: Machine, *, precision: Precision, shard: Shard | None = None) -> int:
    """Return how many processes share one copy of the model by `parallel.shard`, or by another `shard`.

    Raises:
        ValueError: it does not suit the number of processes.
    """
    if shard is not None:
        config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"shard": shard})})
    world: Any = {"world_size": machine.num_processes}
    memory: Any = {"device": machine.device, "memory_bytes": machine.memory_bytes}
    fits = memory_check(config, precision=precision, **memory, **world)
    return choose_shard_size(config, local_world_size=machine.local_world_size, fits=fits, **world)


def by_shard_size(config: PlanConfig, machine: Machine, *, precision: Precision) -> list[Facts]:
    """Return the memory of a process for each number of them that can share one copy of the model, the least first.

    A copy is within a machine or on whole machines. The micro-batch is the one that the run would have with it.
    `config` may have "auto" as its micro-batch.
    """
    used, auto = (shard_size_for(config, machine, precision=precision, shard=shard) for shard in (None, "auto"))
    node = machine.local_world_size
    sizes = [one for one in divisors(machine.num_processes) if node % one == 0 or one % node == 0]
    rows = []
    for shard_size in sorted({*sizes, used, machine.num_processes}):
        cut = resolve_elsewhere(config, machine, precision=precision, shard_size=shard_size)
        per_pass = sequences_per_pass(cut.training, machine.num_processes)
        memory = _memory(cut, machine, precision, per_pass, shard_size)
        rows.append(
            {
                "shard_size": shard_size,
                "micro_batch_size": per_pass,
                **{f"{name}_bytes": size for name, size in memory.items()},
                "fits": memory["total"] <= machine.memory_bytes,
                "is_auto": shard_size == auto,
                "is_used": shard_size == used,
            }
        )
    return rows


def on_storage(config: PlanConfig, *, plan: Facts) -> Facts:
    """Return how long a checkpoint takes to write on machines that are not here; `plan` is the run's `arithmetic`."""
    assert config.machine is not None
    rate = config.machine.storage_gb_per_second
    return {"checkpoint.gb_per_second": rate, "checkpoint.write_seconds": plan["checkpoint.bytes"] / (rate * 1e9)}


def expected(config: PlanConfig, machine: Machine, *, plan: Facts) -> Facts:
    """Return how fast a run is assumed to be on a machine that is not here; `plan` is its `arithmetic`.

    It is empty where nothing is said of the machine's speed.
    """
    assert config.machine is not None
    rate = machine.expected_tokens_per_second(config.machine, flops_per_token=plan["flops.per_token"])
    if rate is None:
        return {}
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


def remedies(
    config: TrainConfig, *, machine: Machine, precision: Precision, shard_size: int = 1
) -> list[tuple[str, int]]:
    """Return what saves memory: each change, as it is written in the TOML, with the total of bytes after it.

    Each change comes on top of those before it. The list ends with the first change after which the run fits.
    """
    room, found = machine.memory_bytes, list[tuple[str, int]]()

    def total(sequences: int, precision: Precision = precision) -> int:
        return _memory(config, machine, precision, sequences, shard_size)["total"]

    size = sequences_per_pass(config.training, machine.num_processes)
    share = largest_share(config.training.batch_size, machine.num_processes)
    smaller = [one for one in divisors(share) if one < size]
    if smaller:
        size = next((one for one in smaller if total(one) <= room), 1)
        found.append((f"training.micro_batch_size = {size}", total(size)))
    if not config.model.activation_checkpointing and (not found or found[-1][1] > room):
        config = config.model_copy(update={"model": config.model.model_copy(update={"activation_checkpointing": True})})
        found.append(("model.activation_checkpointing = true", total(size)))
    if precision == "fp32" and (not found or found[-1][1] > room):
        found.append(('training.precision = "bf16"', total(size, "bf16")))
    return found


def _memory(config: TrainConfig, machine: Machine, precision: Precision, size: int, shard_size: int) -> dict[str, int]:
    ranks = {"num_ranks": machine.num_processes, "shard_size": shard_size}
    settings: Any = {"precision": precision, "device": machine.device, **ranks}
    return memory_by_part(config, micro_batch_size=size, **settings)
