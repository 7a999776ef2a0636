"""The training step against peers: tokens per second, FLOPs utilisation, time to the first step, peak memory.

    python -m benchmarking.bench_train --config config/resources/bench_train.toml

Each candidate takes whole steps: forward, loss, backward, clipping, optimizer. Time to the first step and peak memory
are measured in processes of their own, with an empty compiler cache.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("benchmarking.bench_train")

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from benchmarking.harness import (
    OURS,
    Clock,
    Quantity,
    Report,
    Sample,
    Series,
    clock_of,
    paired_ratios,
    run_rounds,
    timed,
)
from benchmarking.machine import describe
from cli.utils import Command, note
from cli.utils import main as run_command
from config.bench_train import BenchTrainConfig

if TYPE_CHECKING:
    from transformerlm.utils.dtypes import Precision

TOKENS = Quantity("tokens_per_second")
FIRST_STEP = Quantity("time_to_first_step_s", higher_is_better=False)
MEMORY = Quantity("peak_memory_mb", higher_is_better=False)
_LIMIT = "limit"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    name = "python -m benchmarking.bench_train"
    run_command(Command(name, BenchTrainConfig, bench_train, default_config="bench_train.toml"), argv)


def bench_train(config: BenchTrainConfig) -> None:
    """Measure as the configuration says; JSON lines on stdout, a table on stderr."""
    with _empty_compiler_cache(any(config.compile)):
        import torch

        from benchmarking.train_peers import LIBRARIES, is_available
        from transformerlm.utils.device import resolve_device

        if config.threads:
            torch.set_num_threads(config.threads)
        device = resolve_device(config.device)
        clock = clock_of(config.measure.clock, threads=torch.get_num_threads(), device=device.type)
        for peer in config.peers:
            if not is_available(peer):
                note(f"{peer} is not installed: skipped (pip install {LIBRARIES[peer]})")
        names = [OURS, *filter(is_available, config.peers)]
        environment = describe(threads=torch.get_num_threads(), device=str(device), packages=[*LIBRARIES.values()])
        report = Report("train", environment | {"clock": config.measure.clock})
        for precision, compiled in product(config.precision, config.compile):
            note(f"{precision}{', compiled' if compiled else ''} on {device}: {', '.join(names)}")
            _bench_case(config, names, precision, compiled, report, clock)
    note(report.table())


def _bench_case(
    config: BenchTrainConfig, names: list[str], precision: Precision, compiled: bool, report: Report, clock: Clock
) -> None:
    import torch

    from benchmarking.limits import MatmulPeak
    from benchmarking.train_peers import make_step
    from transformerlm.models.estimates import count_parameters, flops_per_token
    from transformerlm.models.transformer import TransformerLM
    from transformerlm.utils.device import resolve_device, synchronize

    device = resolve_device(config.device)
    hparams = TransformerLM(**config.model.model_dump(), device="meta").hparams()
    params = {"precision": precision, "compile": compiled, "batch_size": config.batch_size}
    params |= {"context_length": hparams["context_length"], "parameters": count_parameters(hparams)}
    _bench_first_steps(config, names, precision, compiled, report, params)

    torch.compiler.reset()
    tokens = config.batch_size * config.model.context_length * config.steps_per_round
    measure = partial(timed, synchronize=partial(synchronize, device), clock=clock)
    candidates: dict[str, Callable[[], Sample]] = {}
    for name in names:
        step = make_step(config, name, precision=precision, compiled=compiled)
        step()  # the compiler's time is counted above
        candidates[name] = partial(_run_steps, step, config.steps_per_round, tokens, measure)
    candidates[_LIMIT] = MatmulPeak(device, torch.bfloat16 if precision == "bf16" else torch.float32, clock=clock)
    series = run_rounds(candidates, warmup=config.measure.warmup, repeats=config.measure.repeats)
    peak = series.pop(_LIMIT)["flops_per_second"]
    flops = flops_per_token(hparams, hparams["context_length"])
    facts = {name: _utilisation(measured[TOKENS.name], peak, flops) for name, measured in series.items()}
    report.add(TOKENS, series, params=params, warmup=config.measure.warmup, facts=facts)


def _bench_first_steps(
    config: BenchTrainConfig,
    names: list[str],
    precision: Precision,
    compiled: bool,
    report: Report,
    params: dict[str, Any],
) -> None:
    from benchmarking.fresh_process import in_fresh_process
    from benchmarking.train_peers import first_step

    series: Series = {}
    for name in names:
        found, peak = in_fresh_process(first_step, config, name, precision, compiled)
        series[name] = {FIRST_STEP.name: [found["seconds"]]}
        peak_bytes = found.get("peak_bytes", peak)
        if peak_bytes:
            series[name][MEMORY.name] = [peak_bytes / 1e6]
    report.add(FIRST_STEP, series, params=params, warmup=0)
    report.add(MEMORY, series, params=params, warmup=0)


def _run_steps(
    step: Callable[[], float], count: int, tokens: int, measure: Callable[[Callable[[], None]], float]
) -> Sample:
    def run() -> None:
        for _ in range(count):
            step()

    return {TOKENS.name: tokens / measure(run)}


def _utilisation(tokens_per_second: list[float], peak: list[float], flops: int) -> dict[str, float]:
    """Return the share of the matrix product's speed that the step reaches, round by round, at the median."""
    share = statistics.median(paired_ratios([flops * rate for rate in tokens_per_second], peak))
    return {
        "flops_utilisation": share,
        "flops_per_token": flops,
        "matmul_gflops_per_second": statistics.median(peak) / 1e9,
    }


@contextmanager
def _empty_compiler_cache(needed: bool) -> Iterator[None]:
    """Let torch.compile start cold in an empty cache, which the processes that measure the first step fill."""
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
