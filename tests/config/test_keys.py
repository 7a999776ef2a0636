"""The keys of every schema: each one is described, with its type in words and its default."""

from __future__ import annotations

import tomllib

import pytest

from config.keys import iter_keys
from tests.config.helpers import SCHEMAS


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_key_is_described(name):
    """Every key has a description, a type in words, and a default that is valid TOML or `none`."""
    for key in iter_keys(SCHEMAS[name]):
        assert key.description, key.name
        assert key.expected, key.name
        if key.default not in (None, "none"):
            tomllib.loads(f"value = {key.default}")


def test_a_word_is_read_by_the_type_of_its_key():
    """What the command line does with a word follows from the key's type, not from how help describes it."""
    keys = {key.name: key for key in iter_keys(SCHEMAS["train"])}
    text = {"logging.run_name", "training.device", "data.train", "training.max_time", "optimizer.name"}
    assert all(keys[name].is_text for name in text)
    for name in ("training.micro_batch_size", "training.compile", "schedule.warmup_steps", "model.d_model"):
        assert not keys[name].is_text, name
    assert (keys["data.valid"].is_optional, keys["data.train"].is_optional) == (True, False)
    assert keys["samples.prompts"].has_free_items
