"""The tests that need a CUDA device: each result is a line of its own as soon as it is known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarking.gpu.task import Task

ROOT = Path(__file__).parents[2]
_MARK = "mark.gpu"


def run(task: Task) -> None:
    """Run them; without a device they are only collected, which imports everything that they import."""
    files = list(files_with_gpu_tests())
    if not files:
        raise FileNotFoundError(f"{ROOT / 'tests'}: no tests; run the suite from the source tree")
    arguments = ["-q", "-m", "gpu", "-p", "no:cacheprovider", f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")]
    if task.device != "cuda":
        arguments.append("--collect-only")
    lines = _Lines(task)
    code = pytest.main([*arguments, *map(str, files)], plugins=[lines])
    task.row("Tests marked gpu", found=lines.collected, passed=lines.passed, failed=lines.failed, skipped=lines.skipped)
    task.check("the gpu tests pass", code == pytest.ExitCode.OK, f"pytest ended with {code!r}")


def files_with_gpu_tests() -> Iterator[Path]:
    """Yield the test files that use the mark."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if _MARK in path.read_text(encoding="utf-8"):
            yield path


class _Lines:
    """A pytest plugin that writes the result of each test."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.collected = self.passed = self.failed = self.skipped = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected = len(session.items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        setattr(self, report.outcome, getattr(self, report.outcome) + 1)
        cells: dict[str, Any] = {"test": report.nodeid.removeprefix("tests/"), "ended": report.outcome}
        why = _last_line(str(report.longrepr)) if report.longrepr else ""
        self._task.row("Tests marked gpu, one by one", **cells, seconds=round(report.duration, 2), why=why)


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:200]
