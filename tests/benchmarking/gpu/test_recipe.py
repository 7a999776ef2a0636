"""The suite's last part: how it shares out the time that is left, and what it reports when training ends early."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarking.gpu import recipe
from benchmarking.gpu.results import read
from benchmarking.gpu.task import Task

LINES = (
    {"step": 20, "metrics.loss": 3.0, "metrics.tokens_per_second": 900.0},
    {"step": 40, "metrics.loss": 2.5, "metrics.val_loss": 2.6, "metrics.val_bits_per_byte": 1.1},
    {"event": "sample", "step": 40, "text.prompt": "Once", "text.output": " upon\u2028a time"},
)


def trained(
    folder: Path, lines: tuple[dict[str, Any], ...], monkeypatch: pytest.MonkeyPatch, *, seconds: float
) -> list[str]:
    """Let a training write these lines and be killed at its time limit; return the command that began it."""
    begun: list[str] = []

    def run(command: list[str], *, timeout: float | None, **_: Any) -> None:
        begun.extend([*command, f"timeout={timeout:.0f}"])
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / "run").mkdir()
        (folder / "run" / recipe.NAME).write_text(text + '{"step": 60, "metr', encoding="utf-8")
        raise subprocess.TimeoutExpired(command, timeout or 0.0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(Task, "seconds_left", seconds)
    with pytest.raises(subprocess.TimeoutExpired):
        recipe._train(Task("recipe", "cuda", False, folder, folder, seconds), folder, 100)
    return begun


def test_what_was_trained_is_reported_however_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that was killed in the middle of a line has its rows in the report."""
    trained(tmp_path, LINES, monkeypatch, seconds=100.0)
    rows = [line["cells"] for line in read(tmp_path)]
    assert rows[0] == {"step": 40, "loss": 2.5, "val_loss": 2.6, "bits_per_byte": 1.1}
    assert rows[1] == {"steps": 40, "compiled": "False", "median_tokens_per_second": 900.0}
    assert rows[2] == {"step": 40, "text": "Once upon\u2028a time"}


def test_a_training_without_a_line_has_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is that of the training, and not that there is nothing to report."""
    trained(tmp_path, (), monkeypatch, seconds=100.0)
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("seconds", "max_time", "is_compiled"),
    [(30.0, 5, False), (100.0, 55, False), (340.0, 295, False), (400.0, 295, True)],
)
def test_what_max_time_does_not_count_is_taken_from_the_time(
    seconds: float, max_time: int, is_compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start, the end, and compiling, for which there must be time enough; the report is made in any case."""
    words = trained(tmp_path, LINES, monkeypatch, seconds=seconds)
    assert f"--training.max_time={max_time}s" in words
    assert f"--training.compile={str(is_compiled).lower()}" in words
    assert f"timeout={seconds - 5:.0f}" in words
