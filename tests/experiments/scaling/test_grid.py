"""The runs of a grid: whole steps, each once, all checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from config.errors import ConfigError
from config.scaling import ScalingConfig
from tests.experiments.sweep.helpers import BASE, price
from transformerlm.experiments.scaling.grid import Grid, plan_grid, planned_points, tokens_of

SIZES = [
    {"d_model": 16, "num_layers": 1, "num_heads": 2},
    {"d_model": 32, "num_layers": 2, "num_heads": 2, "learning_rate": 0.01},
]


def planned(folder: Path, **changes: Any) -> Grid:
    """Return the grid of two sizes and two token counts, with keys changed."""
    base = folder / "base.toml"
    base.write_text(BASE)
    tree = {"base": str(base), "sizes": SIZES, "tokens": [640, 6400], **changes}
    return plan_grid(ScalingConfig.model_validate(tree), base, folder / "law", price)


def test_each_size_is_trained_on_each_number_of_tokens(tmp_path: Path) -> None:
    """Steps follow from the tokens, the rate from the size, and the directory from the grid."""
    runs = planned(tmp_path).runs
    shapes = [(one.config.model.d_model, one.config.model.num_layers, tokens_of(one)) for one in runs]
    assert shapes == [(16, 1, 640), (16, 1, 6400), (32, 2, 640), (32, 2, 6400)]
    assert [one.config.training.max_steps for one in runs] == [10, 100, 10, 100]
    assert [one.config.optimizer.learning_rate for one in runs] == [1e-3, 1e-3, 0.01, 0.01]
    assert {one.config.runs_dir for one in runs} == {tmp_path / "law"}
    assert len({one.name for one in runs}) == 4


def test_budgets_give_larger_models_fewer_tokens(tmp_path: Path) -> None:
    """All runs of a budget cost the same, to a step."""
    runs = planned(tmp_path, tokens=[], budgets=[1e8, 1e9]).runs
    for one, budget in zip(runs, [1e8, 1e9, 1e8, 1e9], strict=True):
        assert abs(one.flops - budget) <= one.tokens_per_step * one.flops_per_token / 2


def test_runs_that_round_to_the_same_steps_are_made_once(tmp_path: Path) -> None:
    """650 tokens are ten steps of 64, as 640 are; seeds are runs of their own."""
    assert len(planned(tmp_path, tokens=[640, 650]).runs) == 2
    assert len(planned(tmp_path, seeds=[0, 1]).runs) == 8


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    """Less than a step, and a run to foretell that is in the grid."""
    with pytest.raises(ConfigError, match=r"d16-l1-h2: expected at least one step, 64 tokens, found 20 tokens"):
        planned(tmp_path, tokens=[20])
    with pytest.raises(ConfigError, match="expected runs that are not in the grid"):
        planned(tmp_path, holdout=[{**SIZES[0], "tokens": 6400}])
    assert len(planned(tmp_path, holdout=[{**SIZES[0], "tokens": 64000}]).holdout) == 1


def test_planned_runs_are_points(tmp_path: Path) -> None:
    """With the tokens that they will really be trained on."""
    points = planned_points(planned(tmp_path, tokens=[650, 6400]).runs, [10, 10, 40, 40])
    assert points.tokens.tolist() == [640, 6400, 640, 6400]
    assert points.parameters.tolist() == [10, 10, 40, 40]
