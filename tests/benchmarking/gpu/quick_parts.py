"""Parts that take no time and import no torch, to test the suite itself: run this file like the suite."""

from __future__ import annotations

import sys
import time

from benchmarking.gpu.parts import Part
from benchmarking.gpu.task import Task

_HERE = "tests.benchmarking.gpu.quick_parts"
PARTS = (
    Part("rows", f"{_HERE}:rows", "a row every few milliseconds", 1, 60, needs=()),
    Part("error", f"{_HERE}:error", "an exception after a row", 1, 60, needs=()),
    Part("endless", f"{_HERE}:endless", "no end after a row", 1, 1, least=1, needs=()),
    Part("absent", f"{_HERE}:rows", "a library that nobody has", 1, 60, needs=("no_such_library",)),
    Part("last", f"{_HERE}:last", "a row", 1, 60, needs=()),
)
ENVIRONMENT = Part("environment", f"{_HERE}:environment", "nothing", 1, 60, needs=())
NUM_ROWS = 100


def environment(task: Task) -> None:
    from benchmarking.gpu.results import Results

    Results(task.out).write("environment", part=task.part, device_name="Quick 1", torch="0")


def rows(task: Task) -> None:
    for number in range(NUM_ROWS):
        task.row("Rows", number=number, text="a | b")
        time.sleep(0.005)


def error(task: Task) -> None:
    task.row("Before the error", value=1.5)
    raise RuntimeError("the part is broken")


def endless(task: Task) -> None:
    task.row("Before the end", value=12345.678)
    time.sleep(600)


def last(task: Task) -> None:
    task.check("the last part has run", held=True, found="yes")


if __name__ == "__main__":
    from benchmarking import gpu_suite

    gpu_suite.main(sys.argv[1:], parts=PARTS, environment=ENVIRONMENT)
