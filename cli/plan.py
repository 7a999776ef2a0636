"""`transformerlm-plan`: what a training run will need, before it starts."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.plan")

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from cli.progress import Progress
from cli.terminal import clock, note, print_record, working
from cli.utils import Command
from cli.utils import main as run_command
from config.plan import PlanConfig

if TYPE_CHECKING:
    from transformerlm.training.planning.machine import Machine
    from transformerlm.utils.dtypes import Precision

Facts = dict[str, Any]
_PARTS = ("embeddings", "attention", "feed_forward", "norms", "head", "total")
_MEMORY = ("weights", "gradients", "optimizer", "gathered", "activations", "logits", "overhead", "total")
# What --help shows.
SHORT = (
    "training.max_steps",
    "training.batch_size",
    "training.micro_batch_size",
    "training.device",
    "model.num_layers",
    "model.d_model",
    "model.context_length",
    "machine.num_gpus",
    "machine.memory_gb",
    "calibration_steps",
)
EXAMPLES = (
    ("the shipped small model", "--config train"),
    ("one of GPT-2's smallest size, by arithmetic alone", "--config plan"),
    ("whether a deeper one still fits", "--config train --model.num_layers=12"),
    (
        "how many of 64 GPUs must share a model",
        "--config plan --model.d_model=6144 --model.num_layers=48 --gpus 64 --gpu_memory 80GB",
    ),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-plan", PlanConfig, plan, short=SHORT, examples=EXAMPLES), argv)


def plan(config: PlanConfig) -> None:
    """Print a table on stderr and, unless stdout is a terminal, a JSON line there; no file is written."""
    with working("starting"):
        from transformerlm.training.planning.machine import Machine
        from transformerlm.training.planning.plan import arithmetic, remedies

    machine = Machine.of(config.machine) if config.machine else _here(config)
    resolved, precision, shard_size = _resolve(config, machine)
    place: Any = {"machine": machine, "precision": precision, "shard_size": shard_size}
    run_dir = config.runs_dir / (config.logging.run_name or "")
    facts = arithmetic(resolved, run_dir=run_dir, **place) | _data(config)
    facts |= _elsewhere(config, machine, facts) if config.machine else _measured(resolved, machine, facts)
    changes = [] if facts["memory.fits"] else remedies(resolved, **place)
    for line in _table(facts, config, changes=changes):
        note(line)
    print_record(facts)


def _here(config: PlanConfig) -> Machine:
    from transformerlm.training.planning.machine import Machine
    from transformerlm.utils.device import resolve_device

    try:
        return Machine.here(resolve_device(config.training.device))
    except ValueError as error:
        raise ValueError(f"{error}; to plan for GPUs that are not here, give them: --machine.gpu=H100") from None


def _resolve(config: PlanConfig, machine: Machine) -> tuple[PlanConfig, Precision, int]:
    """Return the configuration with a number in place of "auto" as its micro-batch.

    Beside it are the machine's precision, and how many of its processes share one copy of the model.
    """
    from transformerlm.distributed.world import World
    from transformerlm.training.planning import micro_batch
    from transformerlm.training.planning.plan import shard_size_for
    from transformerlm.utils.allocator import keep_freed_memory
    from transformerlm.utils.dtypes import resolve_precision

    if config.machine:
        precision: Precision = "fp32" if config.training.precision == "fp32" else "bf16"
        shard_size = shard_size_for(config, machine, precision=precision)
        resolved = micro_batch.resolve_elsewhere(config, machine, precision=precision, shard_size=shard_size)
        return resolved, precision, shard_size
    keep_freed_memory(machine.device)
    precision = resolve_precision(config.training.precision, machine.device)
    return micro_batch.resolve(config, device=machine.device, precision=precision, world=World()), precision, 1


def _elsewhere(config: PlanConfig, machine: Machine, facts: Facts) -> Facts:
    from transformerlm.training.planning.plan import by_shard_size, expected, on_storage

    found = expected(config, machine, plan=facts) | on_storage(config, plan=facts)
    if machine.num_processes > 1:
        found["sharding"] = by_shard_size(config, machine, precision=facts["precision"])
    return found


def _measured(config: PlanConfig, machine: Machine, facts: Facts) -> Facts:
    from transformerlm.training.planning.calibration import measured_facts

    steps = config.calibration_steps
    if not steps:
        return {}
    if facts["memory.total_bytes"] > facts["memory.available_bytes"]:
        note("not measured: the estimate exceeds the memory that is free")
        return {}
    settings = {"device": machine.device, "precision": facts["precision"]}
    with closing(Progress(steps, unit="calibration step")) as progress:
        return measured_facts(config, steps, plan=facts, progress=progress, **settings)


def _data(config: PlanConfig) -> Facts:
    """Return the number of tokens in the training file, if it exists."""
    from transformerlm.token_files.dataset import TokenDataset

    if not config.data.train.exists():
        return {}
    return {"data.tokens": TokenDataset(config.data.train).num_tokens}


def _table(facts: Facts, config: PlanConfig, *, changes: list[tuple[str, int]]) -> Iterator[str]:
    from transformerlm.training.planning.plan import CHINCHILLA

    by_part = ", ".join(f"{name.replace('_', '-')} {facts[f'parameters.{name}']:,}" for name in _PARTS[:-1])
    yield _row("parameters", f"{facts['parameters.total']:,}: {by_part}")
    if "parameters.trained" in facts:
        share = facts["parameters.trained"] / facts["parameters.total"]
        beside = "in LoRA's matrices, beside those" if config.fine_tuning.lora else "of them"
        yield _row("trained", f"{facts['parameters.trained']:,} {beside}: {share:.2%}")
    yield _row("FLOPs", f"{facts['flops.per_token']:,} per token, {facts['flops.total']:.3g} in all")
    tokens = f"{facts['tokens.total']:,}: {facts['steps']:,} steps of {facts['tokens.per_step']:,}"
    if facts.get("data.tokens"):
        tokens += f"; {facts['tokens.total'] / facts['data.tokens']:.2g} times the {facts['data.tokens']:,} of the data"
    yield _row("tokens", tokens)
    if "parameters.trained" not in facts:  # the rest has learnt from other tokens before
        ratio = facts["tokens.per_parameter"]
        yield _row("per parameter", f"{ratio:.3g} tokens, {_against_best(ratio, CHINCHILLA)}")
    how = ', chosen by micro_batch_size = "auto"' if config.training.micro_batch_size == "auto" else ""
    yield _row("micro-batch", f"{facts['micro_batch_size']} of {facts['batch_size']} sequences{how}")
    if facts["num_processes"] > 1:
        yield _row("batch", _cut_of_batch(facts))
    yield from _memory_rows(facts, changes)
    yield from _sharding_rows(facts, config)
    yield from _checkpoint_rows(facts)
    yield from _speed_rows(facts)


def _cut_of_batch(facts: Facts) -> str:
    """Return how a batch is shared out among GPUs and passes."""
    batch, gpus, passes = facts["batch_size"], facts["num_processes"], facts["accumulation_steps"]
    each = f"{passes} forward pass{'es' if passes > 1 else ''} a step on each"
    if batch == facts["micro_batch_size"] * gpus * passes:
        return f"{batch} = {facts['micro_batch_size']} x {gpus} GPUs x {each}"
    least, rest = divmod(batch, gpus)
    share = f"{least} or {least + 1}" if rest else f"{least}"
    return f"{batch} on {gpus} GPUs: {share} each, in {each}"


def _against_best(ratio: float, best: int) -> str:
    """Return what a ratio of tokens to parameters says about the size of the model."""
    if best / 3 <= ratio <= best * 3:
        return f"near the {best} that are best for a given number of FLOPs"
    side, size, number = ("below", "smaller", "more") if ratio < best else ("above", "larger", "fewer")
    return f"far {side} {best}: with these FLOPs a {size} model on {number} tokens would be better"


def _memory_rows(facts: Facts, changes: list[tuple[str, int]]) -> Iterator[str]:
    parts = [name for name in _MEMORY[:-1] if name != "gathered" or facts["num_processes"] > 1]
    by_part = ", ".join(f"{name} {_bytes(facts[f'memory.{name}_bytes'])}" for name in parts)
    yield _row("memory", f"{_bytes(facts['memory.total_bytes'])} estimated: {by_part}")
    if facts.get("calibration.peak_memory_bytes"):
        yield _row("", f"{_bytes(facts['calibration.peak_memory_bytes'])} measured at the peak")
    room, available = facts["memory.device_bytes"], facts["memory.available_bytes"]
    fits = "fits" if facts["memory.fits"] else "does not fit"
    has = f"has {_bytes(room)}, of which {_bytes(available)} are free now"
    yield _row("", f"{fits}: {facts['device']} {has if 'disk.free_bytes' in facts else f'with {_bytes(room)} each'}")
    for change, total in changes:
        yield _row("", f"with {change}: {_bytes(total)}, {'fits' if total <= room else 'does not fit'}")


def _sharding_rows(facts: Facts, config: PlanConfig) -> Iterator[str]:
    """Yield a table with a line for each number of GPUs that may share one copy of the model."""
    rows = facts.get("sharding", [])
    if not rows:
        return
    copies, size = facts["num_processes"] // facts["shard_size"], facts["shard_size"]
    text = f"{size} GPU{'s' * (size > 1)} to a copy of the model, {copies} {'copies' if copies > 1 else 'copy'}"
    yield _row("shard", f"{text}: parallel.shard = {json.dumps(config.parallel.shard)}")
    parts = [name for name in _MEMORY if name != "overhead"]
    widths = {title: max(len(title), 8) + 2 for title in ("shard", "micro-batch", *parts)}
    yield "  " + "".join(f"{title:>{width}}" for title, width in widths.items())
    for row in rows:
        numbers = (row["shard_size"], row["micro_batch_size"], *(_bytes(row[f"{name}_bytes"]) for name in parts))
        marks = ["fits" if row["fits"] else "does not fit", *["auto"] * row["is_auto"]]
        marks += ["used"] * (row["is_used"] and not row["is_auto"])
        cells = (f"{number:>{width}}" for number, width in zip(numbers, widths.values(), strict=True))
        yield f"  {''.join(cells)}  {', '.join(marks)}"


def _checkpoint_rows(facts: Facts) -> Iterator[str]:
    free = f", {_bytes(facts['disk.free_bytes'])} are free" if "disk.free_bytes" in facts else ""
    needed = f"the run needs {_bytes(facts['disk.needed_bytes'])} of disk{free}"
    size = f"{_bytes(facts['checkpoint.bytes'])} in {facts['checkpoint.files']} files of tensors"
    yield _row("checkpoint", f"{size}; {needed}")
    if "checkpoint.write_seconds" in facts:
        rate = f"{facts['checkpoint.gb_per_second']:g} GB/s"
        yield _row("", f"{clock(facts['checkpoint.write_seconds'])} to write it at {rate}: assumed, not measured")


def _assumed_rows(facts: Facts) -> Iterator[str]:
    rate, seconds = facts["assumed.tokens_per_second"], facts["assumed.eta_seconds"]
    yield _row("speed", f"{rate:,.0f} tokens/s on {facts['device']} in {facts['precision']}: assumed, not measured")
    if "assumed.flops_utilisation" in facts:
        peak = facts["assumed.peak_flops_per_second"] / 1e12
        yield _row("", f"{facts['assumed.flops_utilisation']:.0%} of the {peak:,.0f} TFLOP/s that each has on paper")
    yield _row("time", f"{clock(seconds)}, validations, samples and checkpoints not counted")


def _speed_rows(facts: Facts) -> Iterator[str]:
    if "assumed.tokens_per_second" in facts:
        yield from _assumed_rows(facts)
    if "tokens_per_second" not in facts:
        return
    rate, share = facts["tokens_per_second"], facts["flops_utilisation"]
    peak = facts["calibration.matmul_flops_per_second"] / 1e9
    yield _row("speed", f"{rate:,.0f} tokens/s on {facts['device']} in {facts['precision']}")
    yield _row("", f"{share:.0%} of the {peak:,.0f} GFLOP/s that a matrix product reaches here")
    first, steps = facts["calibration.first_step_seconds"], facts["calibration.steps"]
    yield _row("", f"the median of {steps} steps; {first:.1f} s to the end of the first")
    yield _row("time", f"{clock(facts['eta_seconds'])}, samples and checkpoints not counted")


def _row(name: str, text: str) -> str:
    return f"{name:<14}{text}"


def _bytes(number: float) -> str:
    from transformerlm.training.planning.preflight import gigabytes

    return gigabytes(number)
