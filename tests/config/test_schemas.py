"""The sections that several commands share, and the relations that their schemas hold."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from config.errors import ConfigError
from config.io import SHIPPED, load_config
from config.make_data import MakeDataConfig
from config.plan import PlanConfig
from config.schemas import InferSamplingConfig, duration_seconds
from config.train import TrainConfig
from config.train_tokenizer import TrainTokenizerConfig
from tests.config.helpers import TRAIN


def test_an_empty_run_name_is_none(tmp_path):
    """`run_name = ""` is the default, the time of the start."""
    path = tmp_path / "train.toml"
    path.write_text(TRAIN.read_text().replace('run_name = "first"', 'run_name = ""'))
    assert load_config(TrainConfig, path).logging.run_name is None


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("2m", 120), ("1.5h", 5400), ("1d", 86400)])
def test_duration(text, seconds):
    """A duration is a number and a unit."""
    assert duration_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "0s", "-1s", "1e3s", "2 m", "nan s", "9" * 20 + "s"])
def test_bad_duration(text):
    """A duration without a unit, or not positive, is refused."""
    with pytest.raises(ValueError, match="expected a duration"):
        duration_seconds(text)


def test_tokenizer_vocab_size_holds_bytes_and_specials():
    """A vocabulary smaller than the bytes and special tokens is refused with both numbers."""
    with pytest.raises(ConfigError, match=r"vocab_size \(256\) is below 256 bytes \+ 1 special tokens"):
        load_config(TrainTokenizerConfig, SHIPPED / "train_tokenizer.toml", {"tokenizer.vocab_size": "256"})


def test_valid_goes_with_valid_fraction():
    """A validation file without a fraction, and outputs that collide, are refused."""
    with pytest.raises(ConfigError, match="valid and valid_fraction go together"):
        load_config(MakeDataConfig, SHIPPED / "make_data.toml", {"valid_fraction": "0"})
    with pytest.raises(ConfigError, match="same file"):
        load_config(MakeDataConfig, SHIPPED / "make_data.toml", {"valid": "data/train.npy"})


def test_config_room_is_light():
    """The config room imports neither torch nor numpy nor wandb."""
    import subprocess
    import sys

    code = "import sys, config.train, config.infer, cli.utils; print({'torch', 'numpy', 'wandb'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_default_holds_beside_other_keys_of_its_table(tmp_path):
    """`samples.sampling.max_new_tokens` is 64 if the file sets another key of that table, as the reference says."""
    config = load_config(PlanConfig, SHIPPED / "plan.toml", {"samples.sampling.temperature": "0.5"})
    assert config.samples.sampling.max_new_tokens == 64


def test_a_text_cannot_end_later_than_it_must():
    """`min_tokens` beyond `max_new_tokens` is refused, and so is a stop string of no character."""
    with pytest.raises(ValidationError, match="min_tokens: expected at most max_new_tokens, 20, found 21"):
        InferSamplingConfig(max_new_tokens=20, min_tokens=21)
    with pytest.raises(ValidationError, match=r"stop\.0"):
        InferSamplingConfig(stop=[""])


@pytest.mark.parametrize(
    "settings", [{"presence_penalty": 0.5}, {"frequency_penalty": -0.5}, {"repetition_penalty": 1.1}, {"min_tokens": 1}]
)
def test_a_penalty_is_one_of_four_settings(settings):
    """Those that look at what the text has; a stop string does not change which token comes next."""
    assert InferSamplingConfig(**settings).is_penalised
    assert not InferSamplingConfig(stop=["."]).is_penalised
