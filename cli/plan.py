"""`transformerlm-plan`: what a training run will take, before it starts."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.plan")

from collections.abc import Iterator, Sequence
from typing import Any

from cli.progress import Progress
from cli.terminal import clock, note, print_record, working
from cli.utils import Command
from cli.utils import main as run_command
from config.plan import PlanConfig

Facts = dict[str, Any]
_PARTS = ("embeddings", "attention", "feed_forward", "norms", "head", "total")
_MEMORY = ("weights", "gradients", "optimizer", "activations", "logits", "overhead", "total")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-plan", PlanConfig, plan), argv)


def plan(config: PlanConfig) -> None:
    """Print a table on stderr and, if stdout is no terminal, a JSON line there; no file is written, no run touched."""
    with working("starting"):
        from transformerlm.distributed import World
        from transformerlm.training import micro_batch
        from transformerlm.training.calibration import measured_facts
        from transformerlm.training.plan import arithmetic, remedies
        from transformerlm.utils.allocator import keep_freed_memory
        from transformerlm.utils.device import resolve_device
        from transformerlm.utils.dtypes import resolve_precision

    device = resolve_device(config.training.device)
    keep_freed_memory(device)
    precision = resolve_precision(config.training.precision, device)
    chosen = config.training.micro_batch_size == "auto"
    resolved = micro_batch.resolve(config, device=device, precision=precision, world=World())
    run_dir = config.runs_dir / (config.logging.run_name or "")
    facts = arithmetic(resolved, run_dir=run_dir, device=device, precision=precision) | _data(config)
    if facts["memory.total_bytes"] > facts["memory.available_bytes"] and config.calibration_steps:
        note("not measured: the estimate exceeds the memory that is free")
    elif config.calibration_steps:
        steps = config.calibration_steps
        settings = {"device": device, "precision": precision, "progress": Progress(steps, unit="calibration step")}
        facts |= measured_facts(resolved, steps, plan=facts, **settings)
    changes = [] if facts["memory.fits"] else remedies(resolved, device=device, precision=precision)
    for line in _table(facts, chosen=chosen, changes=changes):
        note(line)
    print_record(facts)


def _data(config: PlanConfig) -> Facts:
    """Return the tokens of the training file, where it is there."""
    from transformerlm.training.data import TokenDataset

    if not config.data.train.exists():
        return {}
    return {"data.tokens": TokenDataset(config.data.train).num_tokens}


def _table(facts: Facts, *, chosen: bool, changes: list[tuple[str, int]]) -> Iterator[str]:
    from transformerlm.training.plan import CHINCHILLA

    by_part = ", ".join(f"{name.replace('_', '-')} {facts[f'parameters.{name}']:,}" for name in _PARTS[:-1])
    yield _row("parameters", f"{facts['parameters.total']:,}: {by_part}")
    yield _row("FLOPs", f"{facts['flops.per_token']:,} per token, {facts['flops.total']:.3g} in all")
    tokens = f"{facts['tokens.total']:,}: {facts['steps']:,} steps of {facts['tokens.per_step']:,}"
    if facts.get("data.tokens"):
        tokens += f"; {facts['tokens.total'] / facts['data.tokens']:.2g} times the {facts['data.tokens']:,} of the data"
    yield _row("tokens", tokens)
    ratio = facts["tokens.per_parameter"]
    yield _row("per parameter", f"{ratio:.3g} tokens; about {CHINCHILLA} make the best of a given number of FLOPs")
    how = ', chosen by micro_batch_size = "auto"' if chosen else ""
    yield _row("micro-batch", f"{facts['micro_batch_size']} of {facts['batch_size']} sequences{how}")
    yield from _memory_rows(facts, changes)
    needed, free = _bytes(facts["disk.needed_bytes"]), _bytes(facts["disk.free_bytes"])
    yield _row("checkpoint", f"{_bytes(facts['checkpoint.bytes'])}; the run needs {needed} of disk, {free} are free")
    yield from _speed_rows(facts)


def _memory_rows(facts: Facts, changes: list[tuple[str, int]]) -> Iterator[str]:
    by_part = ", ".join(f"{name} {_bytes(facts[f'memory.{name}_bytes'])}" for name in _MEMORY[:-1])
    yield _row("memory", f"{_bytes(facts['memory.total_bytes'])} estimated: {by_part}")
    if facts.get("calibration.peak_memory_bytes"):
        yield _row("", f"{_bytes(facts['calibration.peak_memory_bytes'])} measured at the peak")
    room, available = facts["memory.device_bytes"], facts["memory.available_bytes"]
    fits = "fits" if facts["memory.fits"] else "does not fit"
    yield _row("", f"{fits}: {facts['device']} has {_bytes(room)}, of which {_bytes(available)} are free now")
    for change, total in changes:
        yield _row("", f"with {change}: {_bytes(total)}, {'fits' if total <= room else 'does not fit'}")


def _speed_rows(facts: Facts) -> Iterator[str]:
    if "tokens_per_second" not in facts:
        return
    rate, share = facts["tokens_per_second"], facts["flops_utilisation"]
    peak = facts["calibration.matmul_flops_per_second"] / 1e9
    yield _row("speed", f"{rate:,.0f} tokens/s on {facts['device']} in {facts['precision']}")
    yield _row("", f"{share:.0%} of the {peak:,.0f} GFLOP/s that a matrix product reaches here")
    first, steps = facts["calibration.first_step_seconds"], facts["calibration.steps"]
    yield _row("", f"the median of {steps} steps; {first:.1f} s to the end of the first")
    yield _row("time", f"{clock(facts['eta_seconds'])}, validations, samples and checkpoints not counted")


def _row(name: str, text: str) -> str:
    return f"{name:<14}{text}"


def _bytes(number: float) -> str:
    from transformerlm.training.preflight import gigabytes

    return gigabytes(number)
