"""Paired measurements and their report: one JSON line a result on stdout, a table for people on stderr.

Absolute times on a shared machine say little; ratios within a round say more. A round runs every candidate once, ours
first (A B A B ...), and a peer is compared with ours round by round. This file does not know what is measured.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

OURS = "transformerlm"

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
Sample = Mapping[str, float]
"""What one run of a candidate measured: quantity -> value."""

Series = dict[str, dict[str, list[float]]]
"""candidate -> quantity -> its value in each counted round."""


@dataclass(frozen=True)
class Quantity:
    """Something measured, with its unit in the name; `higher_is_better` None: a fact that is not compared."""

    name: str
    higher_is_better: bool | None = True


@dataclass(frozen=True)
class Summary:
    """Median, smallest and largest of some values."""

    median: float
    min: float
    max: float


def timed(
    function: Callable[[], object], *, synchronize: Callable[[], None] = lambda: None, clock: Clock = time.perf_counter
) -> float:
    """Return the seconds that a call takes; `synchronize` waits for the device before either reading of the clock."""
    synchronize()
    start = clock()
    function()
    synchronize()
    return clock() - start


def clock_of(name: str, *, threads: int, device: str = "cpu") -> Clock:
    """Return the clock "wall" or "cpu".

    Raises:
        ValueError: the CPU clock with several threads, whose seconds it would add, or for a device that it cannot see.
    """
    if name == "cpu" and (threads != 1 or device != "cpu"):
        raise ValueError(f'measure.clock = "cpu": expected one thread on the cpu, found {threads} on {device}')
    return CLOCKS[name]


def run_rounds(candidates: Mapping[str, Callable[[], Sample]], *, warmup: int, repeats: int) -> Series:
    """Run all candidates in turn, `warmup + repeats` times, and return the values of the counted rounds.

    Garbage is collected before each run, so that no candidate pays for another one's. Objects from before the first
    round are excluded from collection.

    Raises:
        ValueError: there is nothing to run, or no round to count.
    """
    if not candidates or repeats < 1 or warmup < 0:
        raise ValueError(f"rounds: expected candidates, repeats >= 1 and warmup >= 0, got {repeats=} and {warmup=}")
    series: Series = {name: {} for name in candidates}
    with old_objects_set_aside():
        for index in range(warmup + repeats):
            for name, run in candidates.items():
                gc.collect()
                sample = run()
                if index >= warmup:
                    for quantity, value in sample.items():
                        series[name].setdefault(quantity, []).append(value)
    return series


@contextmanager
def old_objects_set_aside() -> Iterator[None]:
    """Collect garbage, and keep later collections from walking over the rest, such as all imported modules."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def summarise(values: list[float]) -> Summary:
    """Return median, smallest and largest value; raise ValueError if there is none or one is not finite."""
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"summary: expected finite values, got {values}")
    return Summary(statistics.median(values), min(values), max(values))


def paired_ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    """Return the ratio of each round; raise ValueError if the numbers of rounds differ."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def speedups(ours: list[float], peer: list[float], quantity: Quantity) -> list[float]:
    """Return how many times better than the peer we are in each round; above 1 we are better."""
    return paired_ratios(ours, peer) if quantity.higher_is_better else paired_ratios(peer, ours)


class Report:
    """Prints results as they come and collects them in a table.

    Args:
        benchmark: its name, in every line.
        environment: hardware and versions, in every line (`benchmarking.machine.describe`).
        out: where the JSON lines go; None is stdout.
    """

    def __init__(self, benchmark: str, environment: Mapping[str, Any], out: TextIO | None = None) -> None:
        self._benchmark, self._environment = benchmark, dict(environment)
        self._out = out or sys.stdout
        self._results: list[dict[str, Any]] = []

    def add(
        self,
        quantity: Quantity,
        series: Series,
        *,
        params: Mapping[str, Any],
        warmup: int,
        facts: Mapping[str, Mapping[str, Any]] | None = None,
        ours_with: Mapping[str, Series] | None = None,
    ) -> None:
        """Print one line for each candidate that measured `quantity`.

        Args:
            quantity: what to take from the series.
            series: as `run_rounds` returns it.
            params: what was measured: sizes, precision, ...
            warmup: rounds that were not counted.
            facts: candidate -> more entries for its line; they override those that all lines have.
            ours_with: settings under which ours ran in the same rounds as well -> what it measured then. A peer's line
                has our ratio with each of them too.
        """
        common = {f"params.{name}": value for name, value in params.items()} | self._environment
        settings = {"": series, **{f".{name}": other for name, other in (ours_with or {}).items()}}
        ours = {name: other.get(OURS, {}).get(quantity.name, []) for name, other in settings.items()}
        for candidate, measured in series.items():
            if quantity.name not in measured:
                continue
            values = measured[quantity.name]
            line: dict[str, Any] = {"benchmark": self._benchmark, "candidate": candidate, "quantity": quantity.name}
            line |= {"warmup": warmup, "repeats": len(values), **vars(summarise(values)), "values": values}
            if candidate != OURS and quantity.higher_is_better is not None:
                for name, own in ours.items():
                    speedup = vars(summarise(speedups(own, values, quantity))) if own else {}
                    line |= {f"speedup{name}.{what}": value for what, value in speedup.items()}
            line |= common | dict((facts or {}).get(candidate, {}))
            print(json.dumps(line), file=self._out, flush=True)
            self._results.append(line)

    def table(self) -> str:
        """Return all results so far as an aligned table for people, with what they have in common above it."""
        names = list(dict.fromkeys(name for line in self._results for name in line if name.startswith("params.")))
        varying = [name for name in names if len({line.get(name) for line in self._results}) > 1]
        heading = " ".join(_setting(self._results[0], name) for name in names if name not in varying)
        rows: list[tuple[str, ...]] = [("quantity", "candidate", "case", "median", "min .. max", "ours against it")]
        rows += [_row(line, varying) for line in self._results]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        aligned = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join([f"{self._benchmark}: {heading}", *(row.rstrip() for row in aligned)])


def _row(line: Mapping[str, Any], varying: list[str]) -> tuple[str, ...]:
    case = " ".join(_setting(line, name) for name in varying if name in line)
    extent = f"{_short(line['min'])} .. {_short(line['max'])}"
    ratio = ""
    if "speedup.median" in line:
        ratio = f"{line['speedup.median']:.2f}x ({line['speedup.min']:.2f} .. {line['speedup.max']:.2f})"
    for name in line:
        if name.startswith("speedup.") and name.count(".") == 2 and name.endswith(".median"):
            ratio += f"; with {name.split('.')[1].replace('_', ' ')} {line[name]:.2f}x"
    return line["quantity"], line["candidate"], case, _short(line["median"]), extent, ratio


def _setting(line: Mapping[str, Any], name: str) -> str:
    return f"{name.removeprefix('params.')}={line[name]}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
