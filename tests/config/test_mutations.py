"""Every key of every command, mutated one at a time: nonsense is refused, and the error names the key.

The mutations are made from the schemas, so a new key is tested from the day it is added. Values that look odd but are
valid are in one table, which must not hold unnecessary entries.
"""

from __future__ import annotations

import copy
import functools
import math
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest

from config.errors import ConfigError
from config.io import SHIPPED, load_config
from config.keys import Key, iter_keys
from config.lines import key_lines
from tests.config.helpers import SCHEMAS

KEYS = [(name, key) for name, schema in SCHEMAS.items() for key in iter_keys(schema)]
each_schema = pytest.mark.parametrize("name", SCHEMAS)

NUMBERS: dict[str, Any] = {"zero": 0, "negative": -1, "huge": 10**18}
LETTERS: dict[str, Any] = {"empty": "", "NUL": "a\0b", "long": "x" * 100_000}
LISTS = {"no items": 0, "many items": 2_000}
# Odd but valid: the mutation, and the keys for which it is valid (in every command that has them).
VALID: dict[str, set[str]] = {
    "zero": {
        "calibration_steps",  # arithmetic only
        "checkpoint.interval",  # only at the end
        "defaults.min_p",
        "defaults.temperature",  # the most likely token
        "defaults.top_p",
        "engine.prefix_cache_mb",  # no cache
        "fit.drop_highest",  # none
        "fit.resamples",  # no intervals
        "fit.resample_seed",
        "lines",  # only those to come
        "limits.logprobs",  # of the chosen tokens alone
        "limits.stop",  # no stop strings
        "limits.waiting",  # as many texts as there are slots
        "measure.warmup",
        "model.dropout.attention",  # none
        "model.dropout.embedding",
        "model.dropout.residual",
        "optimizer.beta1",  # no memory
        "optimizer.beta2",
        "optimizer.max_grad_norm",  # no clipping
        "optimizer.momentum",
        "optimizer.weight_decay",
        "port",  # any free one
        "retries",  # the first failure ends it
        "resamples",  # no intervals
        "samples.interval",  # no samples
        "samples.sampling.min_p",
        "samples.sampling.temperature",  # the most likely token
        "samples.sampling.top_p",
        "sampling.frequency_penalty",  # none
        "sampling.min_p",
        "sampling.min_tokens",
        "sampling.presence_penalty",
        "sampling.temperature",
        "sampling.top_p",
        "schedule.decay_steps",
        "schedule.min_learning_rate",
        "schedule.warmup_steps",
        "search_seed",
        "seed",
        "speculative",  # nothing is drafted
        "temperature",  # of the benchmark of serving
        "top_p",
        "training.early_stop_min_delta",
        "training.early_stop_patience",  # never
        "training.eval_interval",  # only before a checkpoint
        "training.max_skipped_steps",  # stop at the first
        "training.seed",
        "training.z_loss",  # no such term
        "workers",  # one for each core
    },
    "negative": {"sampling.frequency_penalty", "sampling.presence_penalty"},  # more of what the text has
    "huge": {"fit.resample_seed", "place", "seed", "training.seed"},  # place: runs that did not come so far say so
    "empty": {
        "chat.after",
        "chat.assistant",
        "chat.system",
        "chat.user",
        "logging.architecture",
        "logging.dataset",
        "logging.run_name",
        "system",  # a message that says nothing
    },
    # a special token, a message, and a string around messages, is any text
    "NUL": {"chat.after", "chat.assistant", "chat.end", "chat.system", "chat.user", "separator", "system"},
    "no items": {
        "access.allowed_origins",
        "axes",  # base alone, with several seeds
        "budgets",
        "chat.special_tokens",
        "compare",
        "files",
        "fine_tuning.freeze",  # nothing
        "holdout",
        "filter",
        "kinds",  # no kinds of text beside the files
        "language",
        "optimum.flops",
        "optimum.time",
        "optimum.tokens",
        "peers",
        "prompt",
        "prompt_file",
        "runs",
        "sampling.stop",
        "set",
        "sha256",
        "sizes_mb",
        "sources",
        "text",
        "tokenizer.special_tokens",
        "variants",
        "variants.set",  # the baseline
    },
    "many items": {"input", "prompt", "prompt_file", "runs", "sources.input", "text"},
    "an item: zero": {"seeds"},
    "an item: huge": {"optimum.flops", "seeds"},
    "an item: empty": {"prompt", "samples.prompts"},  # a prompt is any text
    "an item: NUL": {
        "chat.special_tokens",
        "prompt",
        "samples.prompts",
        "sampling.stop",
        "special_tokens",
        "tokenizer.special_tokens",
    },
    "an item: long": {"prompt", "samples.prompts"},
}
# A list of tables in place of what it replaces, for the keys of these tables.
TABLES: dict[str, dict[str, Any]] = {
    "sources": {"sources": [{"input": ["x"]}], "input": []},
    "axes": {"axes": [{"key": "optimizer.learning_rate", "values": [1e-3]}]},
    "variants": {"variants": [{"name": "a", "set": []}]},
    "sizes": {"sizes": [{"d_model": 64, "num_layers": 1, "num_heads": 2}]},
    "holdout": {"holdout": [{"d_model": 64, "num_layers": 9, "num_heads": 2, "tokens": 10**6}]},
}


@functools.cache
def shipped_tree(name: str) -> dict[str, Any]:
    """Return the shipped configuration of a command, which is valid, as nested tables."""
    tree = tomllib.loads((SHIPPED / f"{name}.toml").read_text(encoding="utf-8"))
    SCHEMAS[name].model_validate(tree)
    return tree


@functools.cache
def shipped_lines(name: str) -> dict[str, int]:
    """Return the lines of its keys."""
    return key_lines((SHIPPED / f"{name}.toml").read_text(encoding="utf-8"))


def changed(name: str, key: str, value: Any, *, leaf: str | None = None) -> dict[str, Any]:
    """Return a valid configuration with one key set, or with the value under another name instead."""
    tree = copy.deepcopy(shipped_tree(name))
    *sections, last = key.split(".")
    table = tree
    for section in sections:
        if section in TABLES:
            table |= copy.deepcopy(TABLES[section])
            table = table[section][0]
        else:
            table = table.setdefault(section, {})
    if leaf is not None:
        table.pop(last, None)
    table[leaf or last] = value
    return tree


def errors_of(name: str, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the error lines that a command gives for a tree as if it came from a file.

    A key of the first table of a list is named as in `iter_keys`, without the number.
    """
    monkeypatch.setattr("config.io.read_toml", lambda path: tree)
    monkeypatch.setattr("config.io._lines_of", lambda path: shipped_lines(name))
    try:
        load_config(SCHEMAS[name], SHIPPED / f"{name}.toml")
    except ConfigError as error:
        return [line.replace(".0.", ".") for line in error.lines]
    return []


def is_number(key: Key) -> bool:
    """Return whether a key takes numbers."""
    return key.expected.startswith(("an integer", "a number"))


def misspelt(word: str) -> Iterator[str]:
    """Yield the word with one letter omitted, doubled, or swapped with its neighbour."""
    for place in range(len(word)):
        yield word[:place] + word[place + 1 :]
        yield word[:place] + word[place] + word[place:]
        yield word[:place] + word[place : place + 2][::-1] + word[place + 2 :]


@each_schema
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_key_with_one_letter_wrong_is_answered_with_the_right_one(name, every, monkeypatch):
    """The misspelt key is refused, and the hint is the right spelling."""
    siblings = {other.name.rpartition(".")[2] for other in iter_keys(SCHEMAS[name])}
    for key in iter_keys(SCHEMAS[name]):
        section, _, leaf = key.name.rpartition(".")
        for wrong in sorted(set(misspelt(leaf)) - siblings - {""})[len(key.name) % every :: every]:
            lines = errors_of(name, changed(name, key.name, 1, leaf=wrong), monkeypatch)
            mine = [line for line in lines if "is not a known key" in line]
            assert len(mine) == 1, (key.name, wrong, lines)
            hint = mine[0].partition("did you mean ")[2].rstrip("?)").split(" or ")
            assert leaf in hint, (key.name, wrong, mine)
            assert f"{section}.{wrong}".lstrip(".") in mine[0]


def other_types(key: Key) -> list[Any]:
    """Return values of types that a key does not take."""
    number = 1.5 if key.expected.startswith("an integer") else 1
    wrong: list[Any] = [{"a": 1}, {}, number if not is_number(key) or number == 1.5 else "1"]
    wrong += [[]] if not key.is_list else [1, "x", [{}], [[]]]
    wrong += [True, "1"] if is_number(key) else []
    return wrong + (["true", 0] if key.is_bool else [])


@each_schema
def test_a_value_of_another_type_is_refused(name, monkeypatch):
    """Text for a number, a number for text, a list for one value, a table: each is an error that names the key."""
    for key in iter_keys(SCHEMAS[name]):
        for value in other_types(key):
            lines = errors_of(name, changed(name, key.name, value), monkeypatch)
            assert any(key.name in line for line in lines), (key.name, value, lines)


@each_schema
def test_a_section_that_is_no_table_is_refused(name, monkeypatch):
    """A value or a list in place of a table is an error that names it."""
    sections = {key.name.rpartition(".")[0] for key in iter_keys(SCHEMAS[name]) if not key.in_list} - {""}
    for section in sections:
        for value in (1, "x", [], [{}]):
            lines = errors_of(name, changed(name, section, value), monkeypatch)
            assert any(section in line for line in lines), (section, value, lines)


@each_schema
def test_a_number_that_is_none_is_refused(name, monkeypatch):
    """No key accepts NaN or infinity."""
    for key in iter_keys(SCHEMAS[name]):
        for value in (math.nan, math.inf, -math.inf):
            lines = errors_of(name, changed(name, key.name, [value] if key.is_list else value), monkeypatch)
            assert any(key.name in line for line in lines), (key.name, value, lines)


def odd_values(key: Key) -> Iterator[tuple[str, Any]]:
    """Yield the mutations of a key's value, by name."""
    if is_number(key):
        kind = int if key.expected.startswith("an integer") else float
        yield from ((mutation, kind(value)) for mutation, value in NUMBERS.items())
    elif key.is_list:
        takes_numbers = key.item.startswith(("an integer", "a number"))
        item = 1 if takes_numbers else "x"
        yield from ((mutation, [item] * length) for mutation, length in LISTS.items())
        if not takes_numbers:
            yield from ((f"an item: {mutation}", [value]) for mutation, value in LETTERS.items())
        else:
            yield from ((f"an item: {mutation}", [value]) for mutation, value in NUMBERS.items())
    elif not key.is_bool:
        yield from LETTERS.items()


@pytest.fixture(scope="module")
def accepted() -> dict[str, set[str]]:
    """Return the mutations that a schema accepts, each with the keys that accept it."""
    found: dict[str, set[str]] = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, key in KEYS:
            for mutation, value in odd_values(key):
                if not errors_of(name, changed(name, key.name, value), monkeypatch):
                    found.setdefault(mutation, set()).add(key.name)
    return found


def test_values_without_sense_are_refused_or_documented(accepted):
    """Zero, negative, huge, empty, NUL and endless values are refused, except those that the table calls valid."""
    surprising = {mutation: keys - VALID.get(mutation, set()) for mutation, keys in accepted.items()}
    assert not {mutation: keys for mutation, keys in surprising.items() if keys}


def test_the_table_of_valid_values_is_tight(accepted):
    """Each entry of the table has a key that exists, and is accepted."""
    unneeded = {mutation: keys - accepted.get(mutation, set()) for mutation, keys in VALID.items()}
    assert not {mutation: keys for mutation, keys in unneeded.items() if keys}
