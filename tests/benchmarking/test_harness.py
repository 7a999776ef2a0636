"""Paired rounds, ratios and report lines, with clocks that show chosen times."""

from __future__ import annotations

import io
import json
import math

import pytest

from benchmarking.harness import OURS, Quantity, Report, clock_of, paired_ratios, run_rounds, speedups, summarise, timed

RATE = Quantity("tokens_per_second")
DELAY = Quantity("latency_ms", higher_is_better=False)
FACT = Quantity("bytes_per_token", higher_is_better=None)


class FakeClock:
    """A clock that stands still until something takes time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


def test_timed_counts_the_call_and_the_wait_for_the_device_behind_it() -> None:
    """Operations queued before the call are finished before the clock is read, so they are not counted."""
    clock, queued = FakeClock(), [5.0]

    def synchronize() -> None:
        while queued:
            clock.spend(queued.pop())

    def launch() -> None:
        clock.spend(0.5)
        queued.append(2.0)

    assert timed(launch, synchronize=synchronize, clock=clock) == 2.5


def test_the_cpu_clock_is_for_one_thread_on_the_cpu() -> None:
    """The CPU clock would add several threads' seconds, and cannot see a GPU's: both are refused."""
    assert clock_of("wall", threads=8, device="cuda")() > 0
    assert clock_of("cpu", threads=1)() > 0
    for threads, device in ((2, "cpu"), (1, "cuda")):
        with pytest.raises(ValueError, match=f"expected one thread on the cpu, found {threads} on {device}"):
            clock_of("cpu", threads=threads, device=device)


def test_rounds_run_the_candidates_in_turn() -> None:
    """A round is A then B; warm-up rounds are run in full and not counted."""
    order: list[str] = []

    def candidate(name: str):
        def run():
            order.append(name)
            return {"seconds": float(len(order))}

        return run

    series = run_rounds({"a": candidate("a"), "b": candidate("b")}, warmup=1, repeats=2)
    assert order == ["a", "b"] * 3
    assert series == {"a": {"seconds": [3.0, 5.0]}, "b": {"seconds": [4.0, 6.0]}}


@pytest.mark.parametrize(("warmup", "repeats"), [(0, 0), (-1, 1)])
def test_rounds_refuse_what_counts_nothing(warmup: int, repeats: int) -> None:
    """Without a counted round there is no result, and that is an error."""
    with pytest.raises(ValueError, match="repeats >= 1"):
        run_rounds({"a": lambda: {"seconds": 1.0}}, warmup=warmup, repeats=repeats)
    with pytest.raises(ValueError, match="expected candidates"):
        run_rounds({}, warmup=0, repeats=1)


def test_summary_is_median_and_extremes() -> None:
    """One slow round changes the largest value, not the median; no values or infinite ones are errors."""
    assert vars(summarise([2.0, 1.0, 100.0])) == {"median": 2.0, "min": 1.0, "max": 100.0}
    for bad in ([], [1.0, math.inf], [math.nan]):
        with pytest.raises(ValueError, match="finite"):
            summarise(bad)


def test_ratios_are_taken_round_by_round() -> None:
    """A neighbour that halves the speed of a whole round does not change that round's ratio."""
    assert paired_ratios([100.0, 50.0], [50.0, 25.0]) == [2.0, 2.0]
    with pytest.raises(ValueError, match="zip"):
        paired_ratios([1.0], [1.0, 2.0])


def test_speedup_is_above_one_where_ours_is_better() -> None:
    """Twice the rate and half the delay are both a speedup of 2."""
    assert speedups([200.0], [100.0], RATE) == [2.0]
    assert speedups([5.0], [10.0], DELAY) == [2.0]


def report_of(quantity: Quantity, **kwargs) -> tuple[list[dict], str]:
    out = io.StringIO()
    report = Report("example", {"hardware.cores": 2, "versions.torch": "9"}, out)
    series = {OURS: {quantity.name: [4.0, 6.0]}, "peer": {quantity.name: [2.0, 2.0]}, "other": {}}
    report.add(quantity, series, params={"batch_size": 3}, warmup=1, **kwargs)
    return [json.loads(line) for line in out.getvalue().splitlines()], report.table()


def test_report_prints_one_json_line_a_result() -> None:
    """A line says what was measured, where and how often, and the values; a peer's also says how ours compares."""
    (ours, peer), _ = report_of(RATE, facts={"peer": {"ids_equal": True}})
    common = {"benchmark": "example", "quantity": "tokens_per_second", "warmup": 1, "repeats": 2}
    common |= {"params.batch_size": 3, "hardware.cores": 2, "versions.torch": "9"}
    assert ours == common | {"candidate": OURS, "median": 5.0, "min": 4.0, "max": 6.0, "values": [4.0, 6.0]}
    compared = {"speedup.median": 2.5, "speedup.min": 2.0, "speedup.max": 3.0, "ids_equal": True}
    measured = {"candidate": "peer", "median": 2.0, "min": 2.0, "max": 2.0, "values": [2.0, 2.0]}
    assert peer == common | compared | measured


def test_our_ratio_with_other_settings_is_beside_the_first() -> None:
    """Where ours ran with other settings as well, a peer's line and the table have both ratios."""
    (ours, peer), table = report_of(RATE, ours_with={"default_allocator": {OURS: {RATE.name: [3.0, 3.0]}}})
    assert (peer["speedup.median"], peer["speedup.default_allocator.median"]) == (2.5, 1.5)
    assert not any(name.startswith("speedup") for name in ours)
    assert table.endswith("2.50x (2.00 .. 3.00); with default allocator 1.50x")


def test_report_does_not_compare_facts() -> None:
    """A quantity of which neither more nor less is better has no speedup."""
    lines, table = report_of(FACT)
    assert not any("speedup.median" in line for line in lines)
    assert "x (" not in table


def test_table_is_aligned_and_names_what_all_results_share_once() -> None:
    """Settings that never change are in the first line; the columns below start at the same place."""
    _, table = report_of(RATE)
    heading, titles, *rows = table.splitlines()
    assert heading == "example: batch_size=3"
    assert len(rows) == 2
    assert {row.index(value) for row, value in zip(rows, ("5", "2"), strict=True)} == {titles.index("median")}
    assert rows[1].endswith("2.50x (2.00 .. 3.00)")
