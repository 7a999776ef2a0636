"""What came of runs, in a few sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformerlm.experiments.compare import differing, measured_on
from transformerlm.experiments.history import RunHistory
from transformerlm.experiments.report_facts import best_validation, bits_per_byte, not_finite

_ROSE = 1.01  # a validation loss that has risen by more than this factor since its best is worth a word
_STATES = {
    "running": "is training now; it is at step {step:,}{of}.",
    "finished": "finished after {step:,} steps{of}.",
    "stopped": "was stopped by a signal after {step:,} steps{of}.",
    "failed": "ended by an error after {step:,} steps{of}.",
    "interrupted": "broke off after {step:,} steps{of}, without a last word.",
    "damaged": "has damaged lines or settings; what can be read ends at step {step:,}{of}.",
}


_ASKED_APART = {"tokenizer_sha256", "valid_sha256"}


def verdict(runs: Sequence[RunHistory], data: Sequence[dict[str, Any]]) -> list[str]:
    """Return sentences about runs; `data` has what a report holds of each, with its name and summary."""
    if len(runs) == 1:
        return _of_one(runs[0], data[0]["name"], data[0]["summary"])
    return _of_several(runs, [one["name"] for one in data])


def _of_one(run: RunHistory, name: str, summary: dict[str, Any]) -> list[str]:
    step, planned = summary["step"], summary["max_steps"]
    of = f" of {planned:,}" if planned is not None and planned != step else ""
    said = [f"{name} " + _STATES[summary["state"]].format(step=step, of=of)]
    best = best_validation(run)
    if best is None:
        said.append("It has no validation loss.")
    else:
        bits = bits_per_byte(run)
        in_bits = f", {bits:.3f} bits per byte" if bits is not None else ""
        said.append(f"Its best validation loss is {best[1]:.4f} nats a token{in_bits}, at step {best[0]:,}.")
        said += _after_best(run, best)
    if bad := not_finite(run):
        said.append(f"{bad:,} of its training losses {'is' if bad == 1 else 'are'} not finite.")
    return said


def _after_best(run: RunHistory, best: tuple[int, float]) -> list[str]:
    last = float(run.series["metrics.val_loss"].values[-1])
    if not math.isfinite(last) or last <= _ROSE * best[1]:
        return []
    said = [f"Since then it has risen to {last:.4f}."]
    train = run.series.get("metrics.loss")
    if train is not None:
        before, after = train.values[train.steps <= best[0]][-10:], train.values[-10:]
        if len(before) and after.mean() < before.mean():
            said.append("The training loss fell meanwhile: from there on the model learned its training text by heart.")
    return said


def _of_several(runs: Sequence[RunHistory], names: Sequence[str]) -> list[str]:
    known = [(best[1], best[0], name) for run, name in zip(runs, names, strict=True) if (best := best_validation(run))]
    if not known:
        return ["None of the runs has a validation loss."]
    if trouble := _not_comparable(runs):
        return [trouble]
    known.sort()
    loss, step, name = known[0]
    said = [f"{name} has the lowest validation loss: {loss:.4f} nats a token, at step {step:,}."]
    if len(known) > 1:
        said.append(f"The next one is {known[1][2]}, {known[1][0] - loss:.4f} above it.")
    said.append(
        "Whether such a difference is more than chance needs several seeds: transformerlm-runs compare counts them."
    )
    without = [name for name in names if name not in {one[2] for one in known}]
    if without:
        said.append(f"Without a validation loss: {', '.join(without)}.")
    return said


def _not_comparable(runs: Sequence[RunHistory]) -> str:
    def differ(key: str, other: str) -> bool:
        return len({str(value) for run in runs if (value := run.environment.get(key, run.started.get(other)))}) > 1

    known = [measured_on(run.started) for run in runs if "valid_tokens" in run.started]
    if differ("data.valid.sha256", "valid_sha256") or {*differing(known)} - _ASKED_APART:
        return "The runs were validated on different tokens, so their losses cannot be compared."
    if differ("tokenizer_sha256", "tokenizer_sha256"):
        return "The runs have different tokenizers, so their losses a token cannot be compared."
    return ""
