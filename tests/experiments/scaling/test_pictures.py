"""The pictures of a law: which there are, and that they are drawn from what they must."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from config.scaling import FitConfig
from tests.experiments.scaling.laws import drawn
from transformerlm.experiments.scaling.pictures import _budgets, draw_pictures
from transformerlm.experiments.scaling.study import study_points


@pytest.mark.parametrize(
    ("law", "names"),
    [
        ("both", ["isoflop", "frontier", "residuals"]),
        pytest.param("tokens", ["law", "residuals"], marks=pytest.mark.slow),
    ],
)
def test_each_law_has_its_pictures(tmp_path: Path, law: str, names: list[str]) -> None:
    """Each is a PNG file."""
    pytest.importorskip("matplotlib")
    config = FitConfig(resamples=10, law=law)  # type: ignore[arg-type]
    files = draw_pictures(study_points(drawn(noise=0.01), config), tmp_path)
    assert [path.stem for path in files] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


def test_curves_are_at_budgets_that_runs_share() -> None:
    """Three budgets of three runs each are three curves; runs without a common budget get some over their range."""
    flops, numbers = np.repeat([1e15, 1e16, 1e17], 3), np.repeat([0, 1, 2], 3)
    assert _budgets(flops, numbers) == [1e15, 1e16, 1e17]
    alone = np.geomspace(1e15, 1e18, 9)
    assert (len(_budgets(alone, np.arange(9))), _budgets(alone, np.arange(9))[-1]) == (7, pytest.approx(1e18))
