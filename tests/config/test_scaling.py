"""The settings of transformerlm-scaling that do not go together are refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.io import SHIPPED, load_config
from config.scaling import ScalingConfig
from tests.config.helpers import errors_of

SIZE = "[[sizes]]\nd_model = 64\nnum_layers = 2\nnum_heads = 2\n"
WHOLE = f'base = "train"\ntokens = [1000, 2000]\n{SIZE}'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected base (runs to make), runs or points, found none of them"),
        ('points = "a.csv"\nruns = ["b"]\n', "expected points, or base and runs, found both"),
        ('runs = ["a"]\ntokens = [5]\n', "tokens does nothing without base"),
        ('points = "a.csv"\ndry_run = true\n', "dry_run does nothing without base"),
        ('base = "train"\ntokens = [5]\n', "base needs sizes, and tokens or budgets"),
        (f'base = "train"\n{SIZE}', "base needs sizes, and tokens or budgets"),
        (f'base = "train"\ntokens = [5]\nbudgets = [1e9]\n{SIZE}', "expected tokens or budgets, found both"),
        (WHOLE.replace("2000", "1000"), "tokens: expected each number once, found 1000 twice"),
        (WHOLE + SIZE, "sizes: expected each size once, found d64-l2-h2 twice"),
        (
            'set = ["model.d_model=8"]\n' + WHOLE,
            "model.d_model cannot be set: it follows from sizes, tokens and budgets",
        ),
        ('set = ["model.d_modle=8"]\n' + WHOLE, "model.d_modle is not a key of transformerlm-train"),
        ('set = ["model.ffn=x"]\n' + WHOLE, 'model.ffn: expected one of "swiglu", "silu", found "x"'),
        ('set = ["training.batch_size=8", "training.batch_size=9"]\n' + WHOLE, "training.batch_size is set twice"),
        (
            f'{WHOLE}[[holdout]]\nd_model = 128\nnum_layers = 2\nnum_heads = 2\ntokens = 9\n[fit]\nlaw = "tokens"\n',
            'holdout needs a law of sizes and tokens, found fit.law = "tokens"',
        ),
        ('points = "a.csv"\n[predict]\ntokens = 1e9\n', "predict: expected parameters and tokens, found no parameters"),
        ('points = "a.csv"\n[fit]\nlaw = "tokens"\n[predict]\nparameters = 1e9\n', "predict: expected tokens"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, text: str, words: str) -> None:
    """Each mistake is named with what was expected."""
    assert words in "\n".join(errors_of(text, tmp_path, ScalingConfig))


def test_a_limit_of_time_can_be_taken_back(tmp_path: Path) -> None:
    """As the refusal of a base that has one says; fit writes such files."""
    (tmp_path / "scaling.toml").write_text('set = ["training.max_time=none"]\n' + WHOLE)
    assert load_config(ScalingConfig, tmp_path / "scaling.toml").set == ["training.max_time=none"]


def test_the_shipped_file_is_a_grid_that_bears_the_law() -> None:
    """Twelve runs, and a decade of tokens; tests/cli/test_scaling.py plans them."""
    config = load_config(ScalingConfig, SHIPPED / "scaling.toml")
    assert len(config.sizes) * len(config.tokens) >= 12
    assert max(config.tokens) >= 10 * min(config.tokens)
    assert config.sizes[0].settings["optimizer.learning_rate"] == "0.01"
