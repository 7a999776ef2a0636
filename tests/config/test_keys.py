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
