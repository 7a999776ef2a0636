"""Run directories as training writes them, made without training."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from config.io import dump_settings

STARTED = {"event": "started", "step": 0, "parameters": 1000, "max_steps": 50, "flops_per_token": 6000}
FINISHED = {"event": "finished", "step": 50, "reason": "max_steps"}


def write_run(
    folder: Path, name: str, *records: Mapping[str, Any], config: Mapping[str, Any] | None = None, at: float = 1.7e9
) -> Path:
    """Write a run of some records, last written at a time, and its settings by dotted keys; return its directory."""
    directory = folder / name
    directory.mkdir(parents=True)
    path = directory / "metrics.jsonl"
    path.write_text(lines(records))
    (directory / "config.toml").write_text(dump_settings(config or {}))
    os.utime(path, (at, at))
    return directory


def lines(records: Iterable[Mapping[str, Any]]) -> str:
    """Return records as JSON lines."""
    return "".join(json.dumps(one) + "\n" for one in records)


def step(number: int, loss: float | str, **more: Any) -> dict[str, Any]:
    """Return a step's line; 64 tokens a step."""
    return {
        "step": number,
        "metrics.loss": loss,
        "metrics.tokens": 64 * number,
        "metrics.tokens_per_second": 100.0,
        **{f"metrics.{key}": value for key, value in more.items()},
    }


def validation(number: int, loss: float | str, *, bits: float | str | None = None) -> dict[str, Any]:
    """Return a line of a step with a validation; half the loss in bits per byte if not given."""
    bits = loss / 2 if bits is None and not isinstance(loss, str) else bits
    return step(number, loss, val_loss=loss, val_bits_per_byte=bits)
