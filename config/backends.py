"""The names that `logging.backend` takes: one, or several of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, PlainSerializer

from config.keys import describe_value

Backend = Literal["console", "json", "wandb", "noop"]
TrainBackend = Literal["console", "json", "wandb", "tensorboard", "noop"]
_ALONE = "noop"
_STDOUT = {"console", "json"}


def check_backends(names: Sequence[object], known: Sequence[str]) -> None:
    """Refuse names of backends that are unknown, repeated or contradict each other.

    Raises:
        ValueError: it says what was expected and what was found.
    """
    for name in names:
        if name not in known:
            raise ValueError(f"expected {_in_words(known)}, found {describe_value(name)}")
    found = ", ".join(json.dumps(name) for name in names)
    if not names:
        raise ValueError(f"expected {_in_words(known)}, found none")
    if len(set(names)) < len(names):
        raise ValueError(f"expected each name once, found {found}")
    if _ALONE in names and len(names) > 1:
        raise ValueError(f'expected "{_ALONE}" alone, found {found}')
    if set(names) >= _STDOUT:
        raise ValueError(f"expected one name for stdout, found {found}; both write the same lines there")


def _in_words(known: Sequence[str]) -> str:
    return "one or several of " + ", ".join(json.dumps(name) for name in known)


def _names(value: object) -> object:
    """Return a name, or several with commas between them, as a list; anything else as it is."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def _reading(known: Sequence[str]) -> Callable[[object], object]:
    """Return what reads the key: it checks the names itself, so that an error names the key and not a place in it."""

    def read(value: object) -> object:
        names = _names(value)
        if isinstance(names, list):
            check_backends(names, known)
        return names

    return read


def _or_one_name(known: Sequence[str]) -> Callable[[dict[str, Any]], None]:
    """Return what completes the JSON schema of the list: editors take one name, too."""

    def complete(schema: dict[str, Any]) -> None:
        several = {"type": "array", "items": schema.pop("items"), "minItems": 1, "uniqueItems": True}
        del schema["type"]
        schema |= {"anyOf": [{"type": "string", "enum": list(known)}, several], "takes": _in_words(known)}

    return complete


def _one_or_several(names: list[str]) -> str | list[str]:
    """Return one name alone, as files have it that were written before there could be several."""
    return names[0] if len(names) == 1 else names


Backends = Annotated[
    list[Backend],
    BeforeValidator(_reading(get_args(Backend))),
    PlainSerializer(_one_or_several),
    Field(json_schema_extra=_or_one_name(get_args(Backend))),
]
TrainBackends = Annotated[
    list[TrainBackend],
    BeforeValidator(_reading(get_args(TrainBackend))),
    PlainSerializer(_one_or_several),
    Field(json_schema_extra=_or_one_name(get_args(TrainBackend))),
]
