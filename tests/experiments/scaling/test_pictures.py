"""The pictures of a law: which there are, and that they are drawn from what they must."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from config.scaling import FitConfig
from tests.experiments.scaling.laws import drawn
from transformerlm.experiments.scaling.law import ScalingLaw
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


def test_a_law_by_which_larger_models_are_worse_is_drawn(tmp_path: Path) -> None:
    """It has no best size for any budget, so the runs stand alone in the picture."""
    pytest.importorskip("matplotlib")
    worse = ScalingLaw(E=1.8, A=0.01, B=1500.0, alpha=-0.2, beta=0.38)
    study = study_points(drawn(law=worse), FitConfig(resamples=0, law="both"))
    assert study.fit.law.alpha < 0
    assert [path.stem for path in draw_pictures(study, tmp_path)] == ["isoflop", "frontier", "residuals"]


def test_curves_are_at_budgets_that_runs_share() -> None:
    """Three budgets of three runs each are three curves; runs without a common budget get some over their range."""
    flops, numbers = np.repeat([1e15, 1e16, 1e17], 3), np.repeat([0, 1, 2], 3)
    assert _budgets(flops, numbers) == [1e15, 1e16, 1e17]
    alone = np.geomspace(1e15, 1e18, 9)
    assert (len(_budgets(alone, np.arange(9))), _budgets(alone, np.arange(9))[-1]) == (7, pytest.approx(1e18))
