"""Which settings of a run say something: those that differ from the defaults, and those that change what is learned."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from config.keys import section_of
from config.train import TrainConfig

SEED = "training.seed"
# What a run is called, where it is, what it shows, and how it is saved: it learns the same with any of them.
_WITHOUT_EFFECT = (
    "runs_dir",
    "logging.",
    "wandb.",
    "samples.",
    "parallel.",
    "checkpoint.interval",
    "checkpoint.keep",
    "checkpoint.max_file_mb",
    "checkpoint.resume",
    "training.micro_batch_size",  # how a batch is cut changes the last bits alone
    "training.log_interval",
    "training.log_norms",
    "training.eval_interval",
)
# What a batch is a function of, besides the step.
_OF_BATCH = (SEED, "training.batch_size", "model.context_length", "data.order", "data.packing")


def has_effect(key: str) -> bool:
    """Return whether a setting changes what a run learns, or on which device."""
    return not key.startswith(_WITHOUT_EFFECT)


@cache
def defaults() -> Mapping[str, Any]:
    """Return the defaults of training by dotted keys, without tables that may be absent."""
    return dict(_defaults(TrainConfig, ""))


def _defaults(schema: type[BaseModel], prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, field in schema.model_fields.items():
        default, section = field.get_default(), section_of(field.annotation)
        if section is not None and default is not None:
            given = default.model_dump(mode="json") if isinstance(default, BaseModel) else {}
            inner = dict(_defaults(section, f"{prefix}{name}."))
            found += [(key, given.get(key.rpartition(".")[2], value)) for key, value in inner.items()]
        elif section is None and default is not PydanticUndefined:
            found.append((prefix + name, str(default) if name.endswith("_dir") else default))
    return found


@cache
def named_defaults() -> dict[str, Any]:
    """Return the defaults that a run's own settings can name, too: TOML has no word for one that is not set."""
    return {key: value for key, value in defaults().items() if value is not None}


def changed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that differ from their defaults; a version that did not know a key had its default."""
    usual = defaults()
    return {key: value for key, value in config.items() if key not in usual or usual[key] != value}


def law_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that two runs of one law have in common: all that have an effect, but the seed."""
    return {key: value for key, value in changed(config).items() if has_effect(key) and key != SEED}


def batches_of(config: Mapping[str, Any], train_sha256: Any = None) -> tuple[Any, ...] | None:
    """Return what the batches of a run follow from; None for a run whose settings do not say.

    Equal answers of two runs are equal batches at each step. The data are known by their fingerprint, else by path.
    """
    if SEED not in config:
        return None
    usual = defaults()
    return (*(config.get(key, usual.get(key)) for key in _OF_BATCH), train_sha256 or config.get("data.train"))
