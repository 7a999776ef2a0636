"""The training step against peers: tokens per second, FLOPs utilisation, time to the first step, peak memory.

    python -m benchmarking.bench_train --config config/resources/bench_train.toml

Each candidate makes whole steps: forward, loss, backward, clipping, optimizer. It has a process of its own, so that its
memory is its own and the allocator is set as its users have it. Ours runs a second time with the C library's default
allocator, which the peers have. The compiler's cache is empty at first.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("benchmarking.bench_train")

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from benchmarking.harness import (
    OURS,
    Clock,
    Quantity,
    Report,
    Sample,
    clock_of,
    paired_ratios,
    run_rounds,
)
from benchmarking.machine import describe
from cli.terminal import note
from cli.utils import Command
from cli.utils import main as run_command
from config.bench_train import BenchTrainConfig

if TYPE_CHECKING:
    from transformerlm.utils.dtypes import Precision

TOKENS = Quantity("tokens_per_second")
FIRST_STEP = Quantity("time_to_first_step_s", higher_is_better=False)
MEMORY = Quantity("peak_memory_mb", higher_is_better=False)
_LIMIT = "limit"
_DEFAULT_ALLOCATOR = "default_allocator"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    name = "python -m benchmarking.bench_train"
    run_command(Command(name, BenchTrainConfig, bench_train, default_config="bench_train.toml"), argv)


def bench_train(config: BenchTrainConfig) -> None:
    """Measure as the configuration says: JSON lines on stdout, a table on stderr."""
    with _empty_compiler_cache(any(config.compile)):
        import torch

        from benchmarking.peers.training import LIBRARIES
        from transformerlm.utils.device import resolve_device

        if config.threads:
            torch.set_num_threads(config.threads)
        device = resolve_device(config.device)
        clock = clock_of(config.measure.clock, threads=torch.get_num_threads(), device=device.type)
        names = [OURS, *(peer for peer in config.peers if _is_usable(peer, config))]
        environment = describe(threads=torch.get_num_threads(), device=str(device), packages=[*LIBRARIES.values()])
        report = Report("train", environment | {"clock": config.measure.clock})
        for precision, compiled in product(config.precision, config.compile):
            note(f"{precision}{', compiled' if compiled else ''} on {device}: {', '.join(names)}")
            _bench_case(config, names, precision, compiled, report, clock)
    note(report.table())


def _is_usable(peer: str, config: BenchTrainConfig) -> bool:
    from benchmarking.peers.training import LIBRARIES, is_available, why_not
    from transformerlm.models.settings import ModelSettings

    if not is_available(peer):
        note(f"{peer} is not installed: skipped (pip install {LIBRARIES[peer]})")
        return False
    choice = why_not(peer, asdict(ModelSettings(**config.model.model_dump())))
    if choice is not None:
        note(f"{peer} is skipped: it has no {choice}")
    return choice is None


def _bench_case(
    config: BenchTrainConfig, names: list[str], precision: Precision, compiled: bool, report: Report, clock: Clock
) -> None:
    import torch

    from benchmarking.fresh_process import object_in_fresh_process
    from benchmarking.limits import MatmulPeak
    from benchmarking.peers.training import TrainCase, TrainingSteps
    from transformerlm.models.estimates import count_parameters, flops_per_token
    from transformerlm.models.settings import ModelSettings
    from transformerlm.utils.device import resolve_device

    model = ModelSettings(**config.model.model_dump())
    case = TrainCase(asdict(model), config.batch_size, config.device, config.threads, config.measure.clock)
    params = {"precision": precision, "compile": compiled, "batch_size": config.batch_size}
    params |= {"context_length": model.context_length, "parameters": count_parameters(model)}
    with ExitStack() as stack:
        calls = {
            name: stack.enter_context(object_in_fresh_process(TrainingSteps, case, name, precision, compiled))
            for name in names
        }
        first = {name: _first_step(call) for name, call in calls.items()}
        report.add(FIRST_STEP, first, params=params, warmup=0, facts={name: {"clock": "wall"} for name in first})
        report.add(MEMORY, first, params=params, warmup=0)
        if len(names) > 1 and calls[OURS]("keeps_memory"):
            plain = partial(TrainingSteps, default_allocator=True)
            calls[_DEFAULT_ALLOCATOR] = stack.enter_context(
                object_in_fresh_process(plain, case, OURS, precision, compiled)
            )
            _first_step(calls[_DEFAULT_ALLOCATOR])

        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        candidates: dict[str, Callable[[], Sample]] = {
            name: partial(_run_steps, call, config) for name, call in calls.items()
        }
        candidates[_LIMIT] = MatmulPeak(resolve_device(config.device), dtype, clock=clock)
        series = run_rounds(candidates, warmup=config.measure.warmup, repeats=config.measure.repeats)
    peak = series.pop(_LIMIT)["flops_per_second"]
    ours_with = {name: {OURS: series.pop(name)} for name in (_DEFAULT_ALLOCATOR,) if name in series}
    flops = flops_per_token(model, model.context_length)
    facts = {name: _utilisation(measured[TOKENS.name], peak, flops) for name, measured in series.items()}
    report.add(TOKENS, series, params=params, warmup=config.measure.warmup, facts=facts, ours_with=ours_with)


def _first_step(call: Callable[..., Any]) -> dict[str, list[float]]:
    seconds, peak = call("first")
    return {FIRST_STEP.name: [seconds]} | ({MEMORY.name: [peak / 1e6]} if peak else {})


def _run_steps(call: Callable[..., Any], config: BenchTrainConfig) -> Sample:
    tokens = config.batch_size * config.model.context_length * config.steps_per_round
    return {TOKENS.name: tokens / call("seconds", config.steps_per_round)}


def _utilisation(tokens_per_second: list[float], peak: list[float], flops: int) -> dict[str, float]:
    """Return the share of the matrix product's speed that the step reaches: the median over the rounds."""
    share = statistics.median(paired_ratios([flops * rate for rate in tokens_per_second], peak))
    return {
        "flops_utilisation": share,
        "flops_per_token": flops,
        "matmul_gflops_per_second": statistics.median(peak) / 1e9,
    }


@contextmanager
def _empty_compiler_cache(needed: bool) -> Iterator[None]:
    """Give torch.compile an empty cache, which the processes that measure the first step fill."""
    if not needed:
        yield
        return
    variable = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(variable)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[variable] = folder
        try:
            yield
        finally:
            del os.environ[variable]
            if before is not None:
                os.environ[variable] = before
