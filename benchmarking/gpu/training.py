"""Training at 22.7 M parameters: whether the losses are right, and how fast it is compared with the peers.

Every candidate has a process of its own. All make their first step, which compiles, at the same time, while the losses
are computed. Then they take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from benchmarking.fresh_process import object_in_fresh_process
from benchmarking.gpu import losses
from benchmarking.gpu.shapes import SMALL, TINY, Shape
from benchmarking.gpu.task import Task
from benchmarking.harness import OURS, Sample, Series, paired_ratios, run_rounds, summarise
from benchmarking.limits import MatmulPeak
from benchmarking.peers.training import TrainCase, TrainingSteps, is_available
from transformerlm.models.estimates import flops_per_token
from transformerlm.models.settings import ModelSettings
from transformerlm.models.transformer import TransformerLM
from transformerlm.utils.dtypes import Precision

CANDIDATES = (
    (OURS, True),
    (OURS, False),
    ("nanogpt_style", True),
    ("huggingface", True),
    ("huggingface", False),
)
# The processes of a toy spend their time on imports; these run every line, and the losses compile.
_OF_A_TOY = ((OURS, False), ("nanogpt_style", False))
# How far a loss may be from that in fp32 on a CPU, in nats, at any step: bfloat16 keeps 8 bits, and the order of a
# product's sum differs. On a CPU bf16 differs by about 0.0002.
BANDS: dict[Precision, float] = {"bf16": 0.02, "fp32": 0.002}
_LIMIT = "limit"
_REPEATS, _STEPS_PER_ROUND = 5, 40
_FP32_STEPS = 10

Call = Callable[..., Any]


def run(task: Task) -> None:
    """Measure all candidates, and compare the losses."""
    shape = TINY if task.tiny else SMALL
    hparams = TransformerLM(**shape.model(), device="meta").hparams()
    case = TrainCase(hparams, shape.batch_size, task.device, backend=task.backend)
    with ExitStack() as stack, ThreadPoolExecutor(len(CANDIDATES)) as threads:
        begun: dict[str, tuple[Call, Future[tuple[float, int | None]]]] = {}
        for candidate, compiled in _OF_A_TOY if task.tiny else CANDIDATES:
            if is_available(candidate):
                call = stack.enter_context(object_in_fresh_process(TrainingSteps, case, candidate, "bf16", compiled))
                begun[_name(candidate, compiled)] = call, threads.submit(call, "first")
        _compare_losses(task, shape)
        calls = _first_steps(task, begun)
        if calls:
            _take_turns(task, case, calls)


def _name(candidate: str, compiled: bool) -> str:
    return f"{candidate}, {'compiled' if compiled else 'eager'}"


def _compare_losses(task: Task, shape: Shape) -> None:
    steps = 3 if task.tiny else losses.STEPS
    if task.tiny:
        expected = list(losses.losses(shape, device="cpu", precision="fp32", steps=steps))
    else:
        expected = losses.kept_losses()
    cases: list[tuple[Precision, str | None, int]] = [
        ("bf16", None, steps),
        ("fp32", None, min(steps, _FP32_STEPS)),
        ("bf16", task.backend, steps),
    ]
    for precision, backend, count in cases:
        name = f"{precision}, {'eager' if backend is None else 'compiled'}"
        what = f"losses of {count} steps in {name} are within {BANDS[precision]} of fp32 on a CPU"
        try:
            settings: dict[str, Any] = {"device": task.device, "precision": precision, "backend": backend}
            found = list(losses.losses(shape, steps=count, **settings))
        except Exception:  # the other cases are still informative
            task.failed(what)
            continue
        differences = [abs(a - b) for a, b in zip(found, expected, strict=False)]
        task.row("Losses against fp32 on a CPU", case=name, last_loss=found[-1], most_apart=max(differences))
        task.check(what, max(differences) <= BANDS[precision], f"{max(differences):.2g} at most")


def _first_steps(
    task: Task, begun: dict[str, tuple[Call, Future[tuple[float, int | None]]]]
) -> dict[str, tuple[Call, dict[str, float]]]:
    """Wait for the candidates' first steps; return those that made one, with its cost."""
    calls: dict[str, tuple[Call, dict[str, float]]] = {}
    for name, (call, first) in begun.items():
        try:
            seconds, peak = first.result()
        except Exception:  # a peer that cannot be compiled must not cost the others
            task.failed(f"{name} makes a step")
            continue
        calls[name] = call, {"first_step_s": seconds} | ({"peak_gb": peak / 1e9} if peak else {})
    return calls


def _take_turns(task: Task, case: TrainCase, calls: dict[str, tuple[Call, dict[str, float]]]) -> None:
    steps, repeats = (1, 1) if task.tiny else (_STEPS_PER_ROUND, _REPEATS)
    tokens = case.batch_size * case.hparams["context_length"]

    def rate(call: Call) -> Sample:
        return {"tokens_per_second": steps * tokens / call("seconds", steps)}

    series = run_rounds(
        {**{name: partial(rate, call) for name, (call, _) in calls.items()}, _LIMIT: _peak(task)},
        warmup=0 if task.tiny else 1,
        repeats=repeats,
    )
    facts = {name: first for name, (_, first) in calls.items()}
    write_rates(task, "Training, 22.7 M parameters, 128 x 256 tokens, bf16", series, case.hparams, facts)


def _peak(task: Task) -> MatmulPeak:
    return MatmulPeak(torch.device(task.device), torch.bfloat16)


def write_rates(
    task: Task,
    table: str,
    series: Series,
    hparams: dict[str, Any],
    facts: Mapping[str, Mapping[str, float]],
) -> None:
    """Write a row for each candidate: tokens/s, the share of a matrix product's speed, our ratio to it, `facts`.

    Compiled is compared with compiled, eager with eager. The share counts, for all, the FLOPs that our model needs.
    """
    model, peak = ModelSettings(**hparams), series[_LIMIT]["flops_per_second"]
    flops = flops_per_token(model, model.context_length)
    for name, more in facts.items():
        values = series[name]["tokens_per_second"]
        ours = series.get(f"{OURS}, {name.split(', ')[1]}")
        cells: dict[str, Any] = {"candidate": name, "tokens_per_second": summarise(values).median}
        cells["share_of_peak"] = summarise(paired_ratios([flops * value for value in values], peak)).median
        if ours is not None and not name.startswith(OURS):
            ratio = summarise(paired_ratios(ours["tokens_per_second"], values))
            cells["ours_over_it"] = f"{ratio.median:.2f}x ({ratio.min:.2f} .. {ratio.max:.2f})"
        task.row(table, **cells, **more)
