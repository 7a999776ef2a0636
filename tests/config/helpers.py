"""What the tests of this room share: the schemas, two files, and the error lines that a file gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from config.commands import COMMANDS
from config.errors import ConfigError
from config.io import SHIPPED, load_config
from config.train import TrainConfig

# by the name of their TOML file, which is that of their module
SCHEMAS = {schema.__module__.rpartition(".")[2]: schema for schema in COMMANDS.values()}
TRAIN = SHIPPED / "train.toml"


def errors_of(text: str, tmp_path: Path, schema=TrainConfig, overrides=None) -> list[str]:
    """Return the error lines that a TOML text gives, without the numbers of the lines."""
    path = tmp_path / "train.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(schema, path, overrides)
    return [re.sub(r"^train\.toml:\d+", "train.toml", line) for line in caught.value.lines]


SMALL = """\
[model]  # "d_model" and lines such as [data] in a comment or in a text are none
vocab_size = 300
context_length = 16
d_model = 30
num_layers = 1
num_heads = 4
[data]
train = "a.npy"
tokenizer = "t"
[training]
max_steps = 10
batch_size = 4
[schedule]
warmup_steps = 20
[samples]
prompts = [
    "[model]",
    \'\'\'
d_model = 3
[training]\'\'\', "a",
]
[logging]
run_name = "?"
dataset.x = 1
"""


def raw_errors(*texts: str, tmp_path: Path, schema=TrainConfig, overrides=None) -> list[str]:
    """Return the error lines of files called a.toml, b.toml, ..., just as a user sees them."""
    paths = [tmp_path / f"{letter}.toml" for letter, _ in zip("abc", texts, strict=False)]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(schema, paths, overrides)
    return caught.value.lines
