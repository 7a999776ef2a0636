"""Runs that were never trained: a configuration, and lines as a training writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HOSTILE = "<img src=x onerror=\"document.body.dataset.broken = 'yes'\">"


def step_line(step: int) -> dict[str, Any]:
    """Return the line of a step; its loss tells the step."""
    line = {"step": step, "metrics.loss": 4 - step / 100, "metrics.lr": 0.001, "metrics.grad_l2_norm": 1.0}
    return line | {"metrics.tokens": 100 * step, "metrics.tokens_per_second": 1000.0}


def write_lines(run: Path, lines: list[dict[str, Any]]) -> None:
    """Put a file of lines into the place of the one that is there, as a resumed run does."""
    new = run / "metrics.new"
    new.write_text("".join(json.dumps(line) + "\n" for line in lines))
    new.replace(run / "metrics.jsonl")


def append_line(run: Path, line: dict[str, Any]) -> None:
    """Add one line."""
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def lines_of(steps: int, note: str = "a") -> list[dict[str, Any]]:
    """Return the lines of a run: its start, its steps, validations, two samples and a skipped step."""
    lines: list[dict[str, Any]] = [{"event": "started", "step": 0, "parameters": 1000, "max_steps": steps}]
    lines[0]["flops_per_token"] = 6000
    lines += [step_line(step) for step in range(1, steps + 1)]
    lines += [{"step": steps, "metrics.val_loss": 3.5, "metrics.val_bits_per_byte": 1.5}]
    for step in (2, 4):
        lines.append({"event": "sample", "step": step, "text.prompt": note, "text.output": f"{note} at {step}"})
    return [*lines, {"event": "step_skipped", "step": 3, "reason": "loss is not finite"}]


def write_run(run: Path, *, steps: int, learning_rate: float = 0.001, note: str = "a") -> None:
    """Write a run."""
    run.mkdir()
    config = f"[optimizer]\nlearning_rate = {learning_rate}\n\n[logging]\nnote = {json.dumps(note)}\n"
    (run / "config.toml").write_text(config)
    write_lines(run, lines_of(steps, note))
