"""The settings of transformerlm-serve that the engine would refuse are refused before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.serve import EngineConfig, ServeConfig
from tests.config.helpers import errors_of


@pytest.mark.parametrize(("tokens", "nearest"), [(100, "64 and 128"), (17, "16 and 32"), (65535, "32768 and 65536")])
def test_a_chunk_that_is_no_power_of_two_is_refused(tmp_path: Path, tokens: int, nearest: str) -> None:
    """The key is named, with what was found and the nearest numbers that can be."""
    text = f'checkpoint = "runs/first"\n[engine]\nprefill_chunk = {tokens}\n'
    [error] = errors_of(text, tmp_path, ServeConfig)
    assert "engine.prefill_chunk" in error
    assert f"expected a power of two, found {tokens}; {nearest} are the nearest" in error


@pytest.mark.parametrize("tokens", [16, 64, 128, 65536])
def test_a_power_of_two_is_taken(tokens: int) -> None:
    """From the smallest chunk to the largest."""
    assert EngineConfig(prefill_chunk=tokens).prefill_chunk == tokens
