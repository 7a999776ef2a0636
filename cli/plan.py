"""`transformerlm-plan`: what a training run will need, before it starts."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.plan")

from collections.abc import Iterator, Sequence
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
_MEMORY = ("weights", "gradients", "optimizer", "activations", "logits", "overhead", "total")
# What --help shows.
SHORT = (
    "training.max_steps",
    "training.batch_size",
    "training.micro_batch_size",
    "training.device",
    "training.precision",
    "model.num_layers",
    "model.d_model",
    "model.context_length",
    "model.vocab_size",
    "calibration_steps",
)
EXAMPLES = (
    ("the shipped small model", "--config train"),
    ("one of GPT-2's smallest size, by arithmetic alone", "--config plan"),
    ("whether a deeper one still fits", "--config train --model.num_layers=12"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-plan", PlanConfig, plan, short=SHORT, examples=EXAMPLES), argv)


def plan(config: PlanConfig) -> None:
    """Print a table on stderr and, unless stdout is a terminal, a JSON line there; no file is written."""
    with working("starting"):
        from transformerlm.training.planning.machine import Machine
        from transformerlm.training.planning.plan import arithmetic, expected, remedies

    chosen = config.training.micro_batch_size == "auto"
    machine = Machine.of(config.machine) if config.machine else _here(config)
    resolved, precision = _resolve(config, machine)
    run_dir = config.runs_dir / (config.logging.run_name or "")
    facts = arithmetic(resolved, run_dir=run_dir, machine=machine, precision=precision) | _data(config)
    facts |= expected(config, machine, plan=facts) if config.machine else _measured(resolved, machine, facts)
    changes = [] if facts["memory.fits"] else remedies(resolved, machine=machine, precision=precision)
    for line in _table(facts, chosen=chosen, changes=changes):
        note(line)
    print_record(facts)


def _here(config: PlanConfig) -> Machine:
    from transformerlm.training.planning.machine import Machine
    from transformerlm.utils.device import resolve_device

    try:
        return Machine.here(resolve_device(config.training.device))
    except ValueError as error:
        raise ValueError(f"{error}; to plan for GPUs that are not here, give them: --machine.gpu=H100") from None


def _resolve(config: PlanConfig, machine: Machine) -> tuple[PlanConfig, Precision]:
    """Return the configuration with a number in place of "auto" as its micro-batch, and the machine's precision."""
    from transformerlm.distributed.world import World
    from transformerlm.training.planning import micro_batch
    from transformerlm.utils.allocator import keep_freed_memory
    from transformerlm.utils.dtypes import resolve_precision

    if config.machine:
        precision: Precision = "fp32" if config.training.precision == "fp32" else "bf16"
        return micro_batch.resolve_elsewhere(config, machine, precision=precision), precision
    keep_freed_memory(machine.device)
    precision = resolve_precision(config.training.precision, machine.device)
    return micro_batch.resolve(config, device=machine.device, precision=precision, world=World()), precision


def _measured(config: PlanConfig, machine: Machine, facts: Facts) -> Facts:
    from transformerlm.training.planning.calibration import measured_facts

    steps = config.calibration_steps
    if not steps:
        return {}
    if facts["memory.total_bytes"] > facts["memory.available_bytes"]:
        note("not measured: the estimate exceeds the memory that is free")
        return {}
    settings = {"device": machine.device, "precision": facts["precision"]}
    return measured_facts(config, steps, plan=facts, progress=Progress(steps, unit="calibration step"), **settings)


def _data(config: PlanConfig) -> Facts:
    """Return the number of tokens in the training file, if it exists."""
    from transformerlm.token_files.dataset import TokenDataset

    if not config.data.train.exists():
        return {}
    return {"data.tokens": TokenDataset(config.data.train).num_tokens}


def _table(facts: Facts, *, chosen: bool, changes: list[tuple[str, int]]) -> Iterator[str]:
    from transformerlm.training.planning.plan import CHINCHILLA

    by_part = ", ".join(f"{name.replace('_', '-')} {facts[f'parameters.{name}']:,}" for name in _PARTS[:-1])
    yield _row("parameters", f"{facts['parameters.total']:,}: {by_part}")
    yield _row("FLOPs", f"{facts['flops.per_token']:,} per token, {facts['flops.total']:.3g} in all")
    tokens = f"{facts['tokens.total']:,}: {facts['steps']:,} steps of {facts['tokens.per_step']:,}"
    if facts.get("data.tokens"):
        tokens += f"; {facts['tokens.total'] / facts['data.tokens']:.2g} times the {facts['data.tokens']:,} of the data"
    yield _row("tokens", tokens)
    ratio = facts["tokens.per_parameter"]
    yield _row("per parameter", f"{ratio:.3g} tokens, {_against_best(ratio, CHINCHILLA)}")
    how = ', chosen by micro_batch_size = "auto"' if chosen else ""
    yield _row("micro-batch", f"{facts['micro_batch_size']} of {facts['batch_size']} sequences{how}")
    if facts["num_processes"] > 1:
        gpus, passes = facts["num_processes"], facts["accumulation_steps"]
        product = f"{facts['batch_size']} = {facts['micro_batch_size']} x {gpus} GPUs x {passes}"
        yield _row("batch", f"{product} forward pass{'es' if passes > 1 else ''} a step on each")
    yield from _memory_rows(facts, changes)
    free = f", {_bytes(facts['disk.free_bytes'])} are free" if "disk.free_bytes" in facts else ""
    needed = f"the run needs {_bytes(facts['disk.needed_bytes'])} of disk{free}"
    yield _row("checkpoint", f"{_bytes(facts['checkpoint.bytes'])}; {needed}")
    yield from _speed_rows(facts)


def _against_best(ratio: float, best: int) -> str:
    """Return what a ratio of tokens to parameters says about the size of the model."""
    if best / 3 <= ratio <= best * 3:
        return f"near the {best} that are best for a given number of FLOPs"
    side, size, number = ("below", "smaller", "more") if ratio < best else ("above", "larger", "fewer")
    return f"far {side} {best}: with these FLOPs a {size} model on {number} tokens would be better"


def _memory_rows(facts: Facts, changes: list[tuple[str, int]]) -> Iterator[str]:
    by_part = ", ".join(f"{name} {_bytes(facts[f'memory.{name}_bytes'])}" for name in _MEMORY[:-1])
    yield _row("memory", f"{_bytes(facts['memory.total_bytes'])} estimated: {by_part}")
    if facts.get("calibration.peak_memory_bytes"):
        yield _row("", f"{_bytes(facts['calibration.peak_memory_bytes'])} measured at the peak")
    room, available = facts["memory.device_bytes"], facts["memory.available_bytes"]
    fits = "fits" if facts["memory.fits"] else "does not fit"
    has = f"has {_bytes(room)}, of which {_bytes(available)} are free now"
    yield _row("", f"{fits}: {facts['device']} {has if 'disk.free_bytes' in facts else f'with {_bytes(room)} each'}")
    for change, total in changes:
        yield _row("", f"with {change}: {_bytes(total)}, {'fits' if total <= room else 'does not fit'}")


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
