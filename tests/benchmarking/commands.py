"""Helpers to run a benchmark's command in this process and to check its lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest


def run_command(
    main: Callable[[Sequence[str]], None], argv: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> tuple[list[dict], str]:
    """Run a command that must succeed; return its JSON lines and its stderr."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    captured = capsys.readouterr()
    assert ended.value.code == 0, captured.err
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


def check_line(line: dict) -> None:
    """Check what every result line holds."""
    assert line["repeats"] == len(line["values"])
    assert all(value > 0 for value in line["values"])
    assert 0 < line["min"] <= line["median"] <= line["max"]
    assert line["warmup"] >= 0
    for key in (
        "date",
        "clock",
        "benchmark",
        "candidate",
        "quantity",
        "hardware.cpu",
        "hardware.cores",
        "hardware.threads",
    ):
        assert line[key], key
    for key in ("hardware.ram_gb", "hardware.gpu", "versions.python", "versions.torch", "versions.transformerlm"):
        assert key in line


def by_quantity(lines: list[dict]) -> dict[tuple[str, str], dict]:
    """Index lines by quantity and candidate; there must be one of each."""
    found = {(line["quantity"], line["candidate"]): line for line in lines}
    assert len(found) == len(lines)
    return found
