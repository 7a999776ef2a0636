"""What a schema holds: its keys in order, each with what it takes in words, its default and its description."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

_LARGE_LIMIT = re.compile(r" and <= \d{7,}(\.0)?(?=$| or )")


@dataclass(frozen=True)
class Key:
    """One key of a schema: its dotted name, what it takes, its default as TOML (None: required) and its description."""

    name: str
    expected: str
    default: str | None
    description: str
    is_list: bool
    is_bool: bool
    is_text: bool
    is_optional: bool
    item: str  # what an element of a list takes
    has_free_items: bool  # the elements of a list may be any text, such as prompts and file names
    choices: tuple[str, ...]  # the words that it takes, if they can be listed
    in_list: bool  # it is in each table of a list, [[section]], and cannot be set on the command line
    short: str  # another, shorter name of its option; "": none

    @property
    def takes(self) -> str:
        """What the key takes, without limits so large that nobody reaches them."""
        return _LARGE_LIMIT.sub("", self.expected)


def iter_keys(schema: type[BaseModel]) -> Iterator[Key]:
    """Yield every key of a schema with its dotted name, section by section; those in a list of tables, too."""
    yield from _keys(schema)


@cache
def _keys(schema: type[BaseModel]) -> tuple[Key, ...]:
    definition = schema.model_json_schema()
    return tuple(_walk(schema, definition["properties"], definition.get("$defs", {}), "", {}))


def _walk(
    schema: type[BaseModel],
    properties: dict[str, Any],
    definitions: dict[str, Any],
    prefix: str,
    defaults: dict[str, Any],
) -> Iterator[Key]:
    for name, field in schema.model_fields.items():
        default = defaults.get(name, ...) if defaults else (... if field.is_required() else field.get_default())
        section = section_of(field.annotation)
        if section:
            inner = vars(default) if isinstance(default, BaseModel) else {}
            yield from _walk(
                section, definitions[section.__name__]["properties"], definitions, f"{prefix}{name}.", inner
            )
            continue
        kind = _kinds(properties[name])
        yield Key(
            name=prefix + name,
            expected=_expected(properties[name]),
            default=None if default is ... else _as_toml(_as_written(default, kind)),
            description=field.description or "",
            is_list=kind == {"array"},  # beside one value, several are a word with commas
            is_bool="boolean" in kind,
            is_text=kind == {"string"},
            is_optional=any(variant.get("type") == "null" for variant in properties[name].get("anyOf", [])),
            item=_expected(properties[name]["items"]) if "items" in properties[name] else "",
            has_free_items=_is_free_text(properties[name].get("items", {})),
            choices=tuple(_choices(properties[name])),
            in_list=False,
            short=properties[name].get("short", ""),
        )
        if table := section_of(*get_args(field.annotation)) if "array" in kind else None:
            inner_properties = definitions[table.__name__]["properties"]
            for key in _walk(table, inner_properties, definitions, f"{prefix}{name}.", {}):
                yield replace(key, in_list=True)


def section_of(annotation: object) -> type[BaseModel] | None:
    """Return the schema of a key that is a table, or None."""
    if get_origin(annotation) in (Union, UnionType):
        return next((found for found in map(section_of, get_args(annotation)) if found), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _variants(definition: dict[str, Any]) -> list[dict[str, Any]]:
    return [variant for variant in definition.get("anyOf", [definition]) if variant.get("type") != "null"]


def _choices(definition: dict[str, Any]) -> Iterator[str]:
    for variant in _variants(definition.get("items", definition)):
        found = variant.get("enum", variant.get("examples", [variant["const"]] if "const" in variant else []))
        yield from ["true", "false"] if variant.get("type") == "boolean" else [str(one) for one in found]


def _is_free_text(definition: dict[str, Any]) -> bool:
    return definition.get("type") == "string" and "enum" not in definition and "const" not in definition


def _kinds(definition: dict[str, Any]) -> set[str]:
    return {variant.get("type", "string") for variant in _variants(definition)}


def _expected(definition: dict[str, Any]) -> str:
    """Say in words what a JSON-schema property takes: `an integer >= 1`, `one of "pre", "post"`, ..."""
    if "takes" in definition:  # a pattern or a choice, in words
        return str(definition["takes"])
    return " or ".join(_expected_variant(variant) for variant in _variants(definition))


_NOUNS = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "a string",
    "object": "a table",
}


_PLURALS = {
    "an integer": "integers",
    "a number": "numbers",
    "a string": "strings",
    "a path": "paths",
    "a table": "tables",
}
_NO_LIMIT = 2**53  # this bound only keeps numbers exact; nobody needs to read of it


def _expected_variant(variant: dict[str, Any]) -> str:
    if "enum" in variant or "const" in variant:
        choices = ", ".join(json.dumps(choice) for choice in variant.get("enum", [variant.get("const")]))
        return f"one of {choices}" if "enum" in variant else choices
    if variant.get("type") == "array":
        item = _expected(variant["items"])
        nouns = [noun for noun in _PLURALS if item.startswith(noun)]
        limit = f"at most {variant['maxItems']} " if "maxItems" in variant else ""
        if not nouns:
            return f"a list, each {item}"
        return f"a list of {limit}{_PLURALS[nouns[0]]}{item.removeprefix(nouns[0])}".replace("that is", "that are")
    if "takes" in variant:
        return str(variant["takes"])
    special = {
        "path": "a path",
        "duration": 'a duration such as "90s" or "2m"',
        "size": 'a size such as "80GB"',
        "share": 'a share such as "5%"',
    }.get(variant.get("format", ""))
    noun = special or _NOUNS["object" if "$ref" in variant else variant.get("type", "string")]
    bounds = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
    limits = [f"{sign} {variant[key]}" for key, sign in bounds if key in variant and variant[key] < _NO_LIMIT]
    if variant.get("minLength") == 1:
        limits.append("that is not empty")
    return " ".join([noun, " and ".join(limits)]).strip()


def _as_written(default: object, kind: set[str]) -> object:
    """Return a default as one writes it: one name alone, where the key takes one or a list of several."""
    is_one = "string" in kind and isinstance(default, list) and len(default) == 1
    return default[0] if is_one and isinstance(default, list) else default


def _as_toml(value: object) -> str:
    if value is None:
        return "none"
    return json.dumps(value, default=str) if not isinstance(value, float) else repr(value)


def describe_value(value: object) -> str:
    """Return a value as a user wrote it, with its TOML type where that is not obvious: `"10" (a string)`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    nouns = {str: " (a string)", float: " (a float)", int: " (an integer)"}
    return text + nouns.get(type(value), "")
