"""A curve becomes a few characters."""

from __future__ import annotations

import pytest

from transformerlm.experiments.sparkline import ASCII_BLOCKS, BLOCKS, blocks_for, sparkline


def test_high_and_low():
    """The largest value is the highest block and the smallest the lowest."""
    assert sparkline([1, 2, 4, 8, 16, 32, 64, 128], width=8) == BLOCKS
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], width=8) == BLOCKS  # with a zero the scale is linear
    assert sparkline([3.0, 1.0], width=8) == "█▁"


def test_many_values_share_a_character():
    """Each character is the mean of its part."""
    assert sparkline([8.0] * 50 + [1.0] * 50, width=4) == "██▁▁"
    assert len(sparkline(list(range(1, 1000)), width=16)) == 16


def test_odd_values():
    """Equal values are one flat line, what is not finite is an x, nothing is nothing."""
    assert sparkline([2.0, 2.0, 2.0], width=8) == "▁▁▁"
    assert sparkline([2.0, float("nan"), float("inf"), 1.0], width=8) == "█xx▁"
    assert sparkline([float("nan")], width=8) == "x"
    assert sparkline([], width=8) == ""
    assert sparkline([-1.0, 0.0, 1e300], width=8)[-1] == "█"


@pytest.mark.parametrize(
    ("encoding", "blocks"), [("utf-8", BLOCKS), ("ascii", ASCII_BLOCKS), ("none such", ASCII_BLOCKS)]
)
def test_a_terminal_without_blocks_gets_letters(encoding, blocks):
    """A stream that cannot show them is not given question marks."""
    assert blocks_for(encoding) == blocks
    assert blocks_for(None) == BLOCKS
    assert sparkline([2.0, 1.0], width=2, blocks=blocks) == blocks[-1] + blocks[0]
