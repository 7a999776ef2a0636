"""The TOML with its reasons parses back to the same settings, whatever the reasons say."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from transformerlm.experiments.fit.choice import Chosen
from transformerlm.experiments.fit.commented_toml import WIDTH, commented_toml, values_of

SETTINGS = {
    "runs_dir": Path('runs/a "b" \\c'),
    "model.d_model": Chosen(256, "small"),
    "model.num_layers": Chosen(4, "small"),
    "training.max_steps": Chosen(10, "ten"),
    "model.dropout.residual": Chosen(0.1, "few words"),
    "model.qk_norm": True,
    "samples.prompts": ["", "a\n[b]", "it's"],
    "schedule.warmup_steps": "5%",
}


def flat(tree, prefix=""):
    """Return a TOML tree by dotted keys."""
    for key, value in tree.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


@pytest.mark.parametrize(
    "why",
    [
        "plain",
        "two\nlines",
        "x = 1\n[table]",
        "tab\t, bell \a, \x7f, \x00 and \r\n",
        "long " * 100,
        "x" * 500,
        "日本 ",
        "",
    ],
)
def test_whatever_a_comment_says_the_settings_come_back(why):
    """No reason and no head can add a key, break a line or make the TOML invalid."""
    settings = {**SETTINGS, "training.batch_size": Chosen(4, why)}
    text = commented_toml(settings, head=why)
    expected = {key: str(value) if isinstance(value, Path) else value for key, value in values_of(settings).items()}
    assert dict(flat(tomllib.loads(text))) == expected


def test_a_reason_is_over_its_key_and_neighbours_share_one():
    """People find the reason where the key is; long ones are wrapped."""
    lines = commented_toml({**SETTINGS, "training.batch_size": Chosen(4, "long " * 60)}).splitlines()
    at = lines.index("d_model = 256")
    assert lines[at - 2 : at + 2] == ["[model]", "# small", "d_model = 256", "num_layers = 4"]
    assert lines[lines.index("max_steps = 10") - 1] == "# ten"
    assert lines[lines.index("qk_norm = true") - 1] == "num_layers = 4"
    assert all(len(line) <= WIDTH + 2 for line in lines)
