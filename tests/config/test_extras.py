"""The hint for a missing extra: commands for pip and for uv, for extras that exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from config.extras import how_to_install

ROOT = Path(__file__).parents[2]


def test_pip_and_uv_are_both_told():
    """A uv environment has no pip, and a pip environment no uv; uv keeps the extras that are already installed."""
    assert how_to_install("gguf") == (
        'in the clone, pip install -e ".[gguf]", or with uv: uv sync --inexact --extra gguf'
    )


def test_every_place_that_names_an_extra_asks_here_and_names_one_that_exists():
    """No message spells pip's command by itself, and pyproject has each extra that a message names."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set()
    for room in ("config", "transformerlm", "databuilder", "cli", "logger", "benchmarking", "profiling"):
        for path in (ROOT / room).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            assert "transformerlm[" not in source, path
            assert "pip install -e" not in source or path.name == "extras.py", path
            named |= set(re.findall(r"(?:how_to_install|require_extra)\([\"'](\w+)[\"']\)", source))
    assert {"fast", "gguf"} <= named <= set(extras)
