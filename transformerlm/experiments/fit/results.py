"""What was said of a run of a fit, and what it came to: read from its lines, kept as a row, held against each other."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from transformerlm.experiments.fit.choice import Text
from transformerlm.experiments.fit.prediction import Interval, Probe, Row
from transformerlm.experiments.metric_lines import METRICS
from transformerlm.utils.json_files import read_json_object

_MOST_BYTES = 100_000
ENOUGH_RATES = 3  # lines with a speed, of which the median is taken


@dataclass(frozen=True)
class Statement:
    """What was said of a run before it began: its bits per byte, what that rests on, and how long it should be."""

    written: str
    corpus: str
    bits_per_byte: Interval
    gzip_bits_per_byte: float
    unigram_bits_per_byte: float
    probe: Probe
    text: Text
    steps: int
    passes: float
    parameters: int
    seconds: float


def read_statement(path: Path) -> Statement:
    """Read what was said of a run.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """
    try:
        return TypeAdapter(Statement).validate_python(read_json_object(path, max_bytes=_MOST_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: {where}: expected what transformerlm-fit wrote, found: {first['msg']}") from None


@dataclass(frozen=True)
class RunResult:
    """A finished run: its size, its length over all starts, what it reached, and what its text costs without a model.

    `tokens_per_second` is that of training alone, validations left out; None for a run of a few steps.
    """

    parameters: int
    steps: int
    seconds: float
    tokens_per_second: float | None
    passes: float
    bits_per_byte: float
    gzip_bits_per_byte: float
    unigram_bits_per_byte: float
    stopped_by: str


def read_result(run_dir: Path) -> RunResult:
    """Return what a run came to, by the loss of its last validation.

    Raises:
        ValueError: the run has not ended with a validation.
    """
    with (run_dir / METRICS).open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    events = {record["event"]: record for record in records if "event" in record}
    summary, started = events.get("summary", {}), events.get("started", {})
    last = summary.get("val_bits_per_byte")
    if not isinstance(last, float) or not math.isfinite(last) or "gzip_bits_per_byte" not in summary:
        raise ValueError(f"{run_dir}: it ended without a validation loss")
    elapsed = [record["time.elapsed_s"] for record in records if "time.elapsed_s" in record]
    rates = [record.get("metrics.tokens_per_second") for record in records]
    rates = sorted(rate for rate in rates if isinstance(rate, float) and rate > 0)
    return RunResult(
        parameters=started["parameters"],
        steps=summary["step"],
        seconds=elapsed[-1] if elapsed else summary["seconds"],
        tokens_per_second=rates[len(rates) // 2] if len(rates) >= ENOUGH_RATES else None,
        passes=summary["passes_over_data"],
        bits_per_byte=last,
        gzip_bits_per_byte=summary["gzip_bits_per_byte"],
        unigram_bits_per_byte=summary["unigram_bits_per_byte"],
        stopped_by=str(events.get("finished", {}).get("reason")),
    )


def probe_of(result: RunResult) -> Probe:
    """Return a short run as what a prediction begins with."""
    return Probe(result.bits_per_byte, result.gzip_bits_per_byte, result.steps)


def row_of(result: RunResult, said: Statement) -> Row:
    """Return the run and its probe as a past run, from which later ones are predicted."""
    text, probe = said.text, said.probe
    return Row(
        corpus=said.corpus,
        num_bytes=text.num_bytes,
        train_tokens=text.train_tokens,
        vocab_size=text.vocab_size,
        parameters=result.parameters,
        gzip_bits_per_byte=result.gzip_bits_per_byte,
        share_seen=text.share_seen,
        steps=result.steps,
        probe_steps=probe.steps,
        passes=result.passes,
        probe_bits_per_byte=probe.bits_per_byte,
        bits_per_byte=result.bits_per_byte,
    )


def judgement(interval: Interval, result: RunResult) -> dict[str, Any]:
    """Return how good a prediction was: the relative error of its middle, and whether the outcome is inside."""
    return {
        "bits_per_byte": result.bits_per_byte,
        "inside": interval.holds(result.bits_per_byte),
        "above_middle": result.bits_per_byte / interval.middle - 1,
        "predicted": asdict(interval),
        "steps": result.steps,
        "seconds": result.seconds,
    }
