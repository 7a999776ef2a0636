"""The picture of a sweep."""

from __future__ import annotations

import pytest

from transformerlm.experiments.sweep.effects import draw_effects
from transformerlm.experiments.sweep.results import Row

pytest.importorskip("matplotlib")


def row(labels: dict[str, str], mean: float, state: str = "finished") -> Row:
    """Return a made-up row."""
    facts = {"losses": {0: mean}, "rank": mean, "spread": None, "bits_per_byte": 1.0, "step": 1, "flops": 1}
    return Row(group=str(labels), labels=labels, mean=mean, state=state, **facts)


def test_the_picture_has_a_panel_an_axis_and_one_for_all(tmp_path):
    """Numbers over more than a factor of ten are on a log axis; words are below it; an axis of one value has none."""
    rows = [
        row({"rate": rate, "ffn": ffn, "same": "1"}, float(rate) + len(ffn))
        for rate in ("0.001", "0.01", "0.1")
        for ffn in ("silu", "swiglu")
    ]
    draw_effects(rows, tmp_path / "effects.svg")
    text = (tmp_path / "effects.svg").read_text()
    for word in ("<!-- rate -->", "<!-- ffn -->", "<!-- swiglu -->", "<!-- $\\mathdefault{10^{-3}}$ -->", "darker"):
        assert word in text, word
    assert "<!-- same -->" not in text


def test_fewer_than_two_settings_are_no_picture(tmp_path):
    """A setting that has not finished is not drawn."""
    rows = [row({"a": "1"}, 1.0), row({"a": "2"}, 2.0, "stopped"), row({"a": "3"}, float("inf"))]
    with pytest.raises(ValueError, match="at least two finished settings"):
        draw_effects(rows, tmp_path / "effects.png")
    assert not list(tmp_path.iterdir())
