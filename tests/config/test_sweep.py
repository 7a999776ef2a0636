"""The schema of transformerlm-sweep: axes and settings are checked against that of transformerlm-train."""

from __future__ import annotations

import pytest

from config.errors import ConfigError
from config.io import load_config
from config.sweep import SweepConfig, overrides_of, setting_problem

AXIS = '[[axes]]\nkey = "optimizer.learning_rate"\n'
RANGE = f'{AXIS}low = 1e-4\nhigh = 1e-2\nscale = "log"\n'


def answer(text: str, tmp_path) -> SweepConfig | str:
    """Return the configuration of a TOML text, or the errors that it gets."""
    path = tmp_path / "s.toml"
    path.write_text(f'base = "train"\n{text}')
    try:
        return load_config(SweepConfig, path)
    except ConfigError as error:
        return "\n".join(error.lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{AXIS}values = []", "s.toml:2: axes.0: values: expected some, or low and high, found none"),
        (f"{AXIS}values = [1e-3, 1e-3]", "s.toml:4: axes.0.values: expected each value once, found one twice"),
        (f"{AXIS}values = [1e-3]\nlow = 1.0", "axes.0: low, high, scale and points are for a range, found values"),
        (f"{AXIS}low = 2.0\nhigh = 1.0", "axes.0: low: expected less than high, found 2 and 1"),
        (f'{AXIS}low = 0.0\nhigh = 1.0\nscale = "log"', 'low: expected a number > 0 with scale = "log", found 0'),
        (f"{AXIS}low = 0.5\nhigh = 2000.0", "optimizer.learning_rate: expected a number > 0 and <= 1000.0, found 2000"),
        ('[[axes]]\nkey = "model.ffn"\nlow = 1.0\nhigh = 2.0', "low and high are for numbers, and model.ffn takes one"),
        ('[[axes]]\nkey = "model.d_model"\nlow = 1.5\nhigh = 4.0', "low, high: expected integers for model.d_model"),
        ('[[axes]]\nkey = "training.seed"\nvalues = [1]', "training.seed cannot be varied: seeds names the seeds"),
        ('[[axes]]\nkey = "model.d_model, model.d_model"\nvalues = ["8, 8"]', "model.d_model is there twice"),
        ('set = ["model.ffn=relu"]', 's.toml:2: set: model.ffn: expected one of "swiglu", "silu", found "relu"'),
        ('set = ["model.ffn"]', 'set.0: expected a setting such as "model.ffn=silu", found "model.ffn"'),
        ('set = ["data.train=none"]', 'data.train: expected a path, found the word "none"'),
        ('[[variants]]\nname = "a"\n[[variants]]\nname = "a"', "variants: the name a is there twice"),
        (f'set = ["optimizer.learning_rate=1"]\n{AXIS}values = [1e-3]', "learning_rate: expected in one of set, axes"),
        (
            f'match = "flops"\nbudget = 1.0\nset = ["training.max_steps=4"]\n{AXIS}values = [1e-3]',
            "training.max_steps:",
        ),
        ('match = "seconds"\nbudget = 1.0\nset = ["training.max_steps=4"]', "training.max_steps: expected in one of"),
        ('match = "seconds"\nbudget = 1.0\nset = ["training.max_time=4s"]', "training.max_time: expected in one of"),
        ('match = "flops"', "match and budget go together, found match = flops, budget = None"),
        ('method = "random"', 'method = "random" needs trials, found none; method = "random" needs axes, found none'),
        ("trials = 3", 'trials does nothing with method = "grid"'),
        (RANGE, 'method = "grid" needs points for a range, found axes with key = "optimizer.learning_rate"'),
        (f'method = "tpe"\ntrials = 2\n{RANGE}points = 3', 'method = "tpe" takes a range without points'),
        (f'method = "tpe"\ntrials = 2\n{RANGE}[halving]\nrungs = [2]', 'halving does nothing with method = "tpe"'),
        ("[halving]\nrungs = [4, 2]", "halving: rungs: expected ascending steps, found [4, 2]"),
        ('match = "flops"\nbudget = 1.0\n[halving]\nrungs = [4]', "halving compares at equal steps"),
        ("print_commands = true\n[halving]\nrungs = [4]", "print_commands is not for halving"),
        ("print_commands = true\ndry_run = true", "expected dry_run or print_commands, found both"),
        ("seeds = [1, 1]", "seeds: expected each seed once, found one twice"),
    ],
)
def test_what_makes_no_sense_is_refused(text, expected, tmp_path):
    """Each with the place, what was expected and what was found."""
    assert expected in answer(text, tmp_path)


def test_a_setting_is_checked_as_transformerlm_train_would():
    """By its own type and range; what needs other keys is checked with them, later."""
    assert setting_problem("model.num_kv_heads", "none") is None
    assert setting_problem("schedule.warmup_steps", "5%") is None
    assert setting_problem("schedule.warmup_steps", "101%") is not None
    assert setting_problem("samples.prompts", "[a]") is None
    assert setting_problem("model.d_model", "33") is None
    assert setting_problem("model.rope_scaling.factor", "0") is not None


def test_settings_are_those_of_a_command_line():
    """A list has its words, as argparse gives them."""
    settings = {"samples.prompts": "a", "model.d_model": "8"}
    assert overrides_of(settings) == {"samples.prompts": ["a"], "model.d_model": "8"}


def test_a_file_has_what_it_says(tmp_path):
    """Values of any type, keys that go together, and ranges of integers."""
    axes = [
        '[[axes]]\nkey = "model.qk_norm"\nvalues = [true, false]\n',
        '[[axes]]\nkey = "model.num_layers"\nlow = 1\nhigh = 4\n',
    ]
    config = answer(f'method = "random"\ntrials = 2\n{"".join(axes)}', tmp_path)
    assert isinstance(config, SweepConfig), config
    assert config.axes[0].settings() == [{"model.qk_norm": "true"}, {"model.qk_norm": "false"}]
    assert config.axes[1].is_integer
