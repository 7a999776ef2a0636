"""The TOML with its reasons parses back to the same settings, whatever the reasons say."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from config.commented_toml import WIDTH, commented_toml

SETTINGS = {
    "runs_dir": Path('runs/a "b" \\c'),
    "model.d_model": 256,
    "model.num_layers": 4,
    "training.max_steps": 10,
    "model.dropout.residual": 0.1,
    "model.qk_norm": True,
    "samples.prompts": ["", "a\n[b]", "it's"],
    "schedule.warmup_steps": "5%",
    "training.batch_size": 4,
}
REASONS = {
    "model.d_model": "small",
    "model.num_layers": "small",
    "training.max_steps": "ten",
    "model.dropout.residual": "few words",
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
    text = commented_toml(SETTINGS, {**REASONS, "training.batch_size": why}, head=why)
    expected = {key: str(value) if isinstance(value, Path) else value for key, value in SETTINGS.items()}
    assert dict(flat(tomllib.loads(text))) == expected


def test_a_reason_is_over_its_key_and_neighbours_share_one():
    """People find the reason where the key is; long ones are wrapped."""
    lines = commented_toml(SETTINGS, {**REASONS, "training.batch_size": "long " * 60}).splitlines()
    at = lines.index("d_model = 256")
    assert lines[at - 2 : at + 2] == ["[model]", "# small", "d_model = 256", "num_layers = 4"]
    assert lines[lines.index("max_steps = 10") - 1] == "# ten"
    assert lines[lines.index("qk_norm = true") - 1] == "num_layers = 4"
    assert all(len(line) <= WIDTH + 2 for line in lines)


def test_a_line_of_the_head_stays_whole():
    """It may be a command, which must not be broken, nor lose a second blank."""
    command = "transformerlm-train '--config=" + "long-name  " * 20 + "train.toml'"
    assert commented_toml(SETTINGS, REASONS, head=f"{command}\nread this").splitlines()[:2] == [
        f"# {command}",
        "# read this",
    ]
