"""What is suggested for an unknown key: first the words of other projects, and only keys that exist."""

from __future__ import annotations

import pytest

from config.commands import COMMANDS
from config.keys import iter_keys
from config.suggest import EXPLAINED, SYNONYMS, hint, nearest
from config.train import TrainConfig

TRAIN = [key.name for key in iter_keys(TrainConfig)]
ALL = [[key.name for key in iter_keys(schema) if not key.in_list] for schema in COMMANDS.values()]


@pytest.mark.parametrize(
    ("word", "key"),
    {
        "n_embd": "model.d_model",
        "hidden_size": "model.d_model",
        "num_hidden_layers": "model.num_layers",
        "dtype": "training.precision",
        "logging_steps": "training.log_interval",
        "save_steps": "checkpoint.interval",
        "lr_scheduler_type": "schedule.name",
        "per_device_train_batch_size": "training.micro_batch_size",
        "lr": "optimizer.learning_rate",
        "max_iters": "training.max_steps",
        "block-size": "model.context_length",
        "d_modle": "model.d_model",
        "wramup_steps": "schedule.warmup_steps",
        "training.warmup_step": "schedule.warmup_steps",
        "model.n_heads": "model.num_heads",
    }.items(),
)
def test_a_word_of_another_project_goes_before_a_likely_name(word, key):
    """On the command line and in a file the key is the same, wherever its section is."""
    assert nearest(word, TRAIN, sections=False) == [key]
    assert nearest(word, TRAIN, sections=True) == [key]


def test_a_section_is_a_name_in_a_file_only():
    """`shedule` may be the table; on the command line there is no such option."""
    assert nearest("shedule", TRAIN, sections=True) == ["schedule"]
    assert "schedule" not in nearest("shedule", TRAIN, sections=False)


@pytest.mark.parametrize("names", ALL, ids=list(COMMANDS))
def test_every_suggestion_is_a_key_of_the_command(names):
    """No word, whether or not another project knows it, leads to an option that the command does not have."""
    for word in [*SYNONYMS, *EXPLAINED, "x", "modle", "wandb", "logging", "a.b"]:
        assert set(nearest(word, names, sections=False)) <= set(names), word


def test_every_synonym_is_one_of_some_command():
    """A table of synonyms whose keys are gone would suggest nothing and fail nowhere."""
    for word in SYNONYMS:
        assert any(nearest(word, names, sections=False) for names in ALL), word
    for key, _ in EXPLAINED.values():
        assert any(key in names for names in ALL), key


@pytest.mark.parametrize("word", ["epochs", "num_train_epochs", "training.gradient_accumulation_steps", "bias"])
def test_a_word_without_a_key_is_answered_in_words(word):
    """What we do differently is explained, if the command has what it names, before a similar name."""
    text = hint(word, TRAIN, sections=False, prefix="--")
    assert text.startswith(" (")
    assert "did you mean" not in text
    assert text not in hint(word, ["checkpoint", "output"], sections=False, prefix="--")
