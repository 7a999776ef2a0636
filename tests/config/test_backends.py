"""`logging.backend`: one name as ever, or several, in a file, on the command line and in the JSON schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from config.errors import ConfigError
from config.io import SHIPPED, dump_json_schema, dump_toml, load_config
from config.keys import iter_keys
from config.make_data import MakeDataConfig
from config.train import TrainConfig
from tests.config.helpers import TRAIN, errors_of

FILE = TRAIN.read_text()
OLD = 'backend = "console"'


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ('"console"', ["console"]),
        ('["noop"]', ["noop"]),
        ('["console", "tensorboard"]', ["console", "tensorboard"]),
        ('"wandb, json"', ["wandb", "json"]),
    ],
)
def test_a_file_has_one_name_or_several(written: str, names: list[str], tmp_path: Path) -> None:
    """The configuration holds a list, and as TOML it is what it was: one name is written alone."""
    path = tmp_path / "train.toml"
    assert OLD in FILE
    path.write_text(FILE.replace(OLD, f"backend = {written}"))
    config = load_config(TrainConfig, path)
    assert config.logging.backend == names
    path.write_text(dump_toml(config))
    assert load_config(TrainConfig, path) == config
    assert ('backend = "' in path.read_text()) == (len(names) == 1)


@pytest.mark.parametrize("word", ["console,tensorboard", "console, tensorboard", '["console", "tensorboard"]'])
def test_an_option_has_several_names_in_one_word(word: str) -> None:
    """Names with commas, or a TOML list, and the file's name is replaced."""
    assert load_config(TrainConfig, TRAIN, {"logging.backend": word}).logging.backend == ["console", "tensorboard"]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            '"aim"',
            'expected one or several of "console", "json", "wandb", "tensorboard", "noop", found "aim" (a string)',
        ),
        ('["console", 1]', 'expected one or several of "console", "json", "wandb", "tensorboard", "noop", found 1'),
        ("[]", 'expected one or several of "console", "json", "wandb", "tensorboard", "noop", found none'),
        ("3", 'expected one or several of "console", "json", "wandb", "tensorboard", "noop", found 3'),
        ('["json", "json"]', 'expected each name once, found "json", "json"'),
        ('["noop", "json"]', 'expected "noop" alone, found "noop", "json"'),
        ('["console", "json"]', 'expected one name for stdout, found "console", "json"; both write the same'),
    ],
)
def test_what_makes_no_sense_is_one_line_that_names_the_key(written: str, message: str, tmp_path: Path) -> None:
    """Unknown, repeated and contradicting names are refused with what was expected and what was found."""
    (line,) = errors_of(FILE.replace(OLD, f"backend = {written}"), tmp_path)
    assert line.startswith(f"train.toml: logging.backend: {message}")


def test_tensorboard_is_for_a_run_with_steps() -> None:
    """A command without a run directory does not take the name."""
    with pytest.raises(ConfigError, match=r'expected one or several of "console", "json", "wandb", "noop", found'):
        load_config(MakeDataConfig, SHIPPED / "make_data.toml", {"logging.backend": "tensorboard"})


def test_the_schema_takes_one_name_and_a_list() -> None:
    """An editor completes and accepts both; help and reference show one name as the default."""
    schema = json.loads(dump_json_schema(TrainConfig))["$defs"]["TrainLoggingConfig"]["properties"]["backend"]
    one, several = schema["anyOf"]
    assert (one["type"], several["type"]) == ("string", "array")
    assert one["enum"] == several["items"]["enum"] == ["console", "json", "wandb", "tensorboard", "noop"]
    key = next(key for key in iter_keys(TrainConfig) if key.name == "logging.backend")
    assert (key.default, key.choices) == ('"console"', tuple(one["enum"]))
