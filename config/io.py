"""From a TOML file and command-line overrides to a checked configuration object, and back.

Every problem of a file is reported in one go, a line each:

    train.toml: model.n_heads is not a known key (did you mean num_heads?)
    train.toml: model.d_model: expected an integer >= 1, found "512" (a string)
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

MAX_FILE_BYTES = 1_000_000
MAX_ERRORS = 50
# tomllib needs time with the square of a dotted key's parts: one of 500,000, which fits a file, would take days.
_LONG_KEY = re.compile(r"""(?<![\w"'-])(?:[\w"'-]++[ \t]*+\.[ \t]*+){32}""")
SHIPPED = Path(__file__).parent / "resources"

# What other projects call our keys: a newcomer's first typo.
SYNONYMS = {
    "lr": "learning_rate",
    "max_lr": "learning_rate",
    "min_lr": "min_learning_rate",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_embd": "d_model",
    "block_size": "context_length",
    "seq_len": "context_length",
    "max_seq_len": "context_length",
    "max_iters": "max_steps",
    "warmup_iters": "warmup_steps",
    "grad_clip": "max_grad_norm",
    "wandb_project": "wandb.project",
    "dtype": "precision",
    "eval_iters": "eval_tokens",
    "eval_batches": "eval_tokens",
}

Schema = TypeVar("Schema", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that cannot be used; `lines` holds one line for each problem."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


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
    in_list: bool  # it stands in each table of a list, [[section]], and cannot be set on the command line


# --- reading ---------------------------------------------------------------------------------------------


def load_config(
    schema: type[Schema], path: Path | None, overrides: Mapping[str, str | list[str]] | None = None
) -> Schema:
    """Build a `schema` object from its defaults, then the file, then the overrides.

    Args:
        schema: the command's schema.
        path: a TOML file; None uses defaults and overrides only.
        overrides: dotted key -> value as written on the command line (a list of words for a list key).

    Raises:
        ConfigError: the file cannot be read, or anything in it or in the overrides is wrong.
    """
    tree = read_toml(path) if path else {}
    overrides = overrides or {}
    keys = {key.name: key for key in iter_keys(schema)}
    for name, value in overrides.items():
        _set(tree, name, _parse_override(value, keys[name]))
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        lines = [_describe_error(schema, item, path, set(overrides)) for item in errors[:MAX_ERRORS]]
        if len(errors) > MAX_ERRORS:
            lines.append(f"{path}: {len(errors) - MAX_ERRORS:,} more errors")
        raise ConfigError(list(dict.fromkeys(lines))) from None


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        ConfigError: no such file, not a file, too large, not UTF-8, or not TOML.
    """
    if path.is_dir():
        raise ConfigError([f"{path}: expected a TOML file, found a directory"])
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file (shipped examples: {SHIPPED})"]) from None
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"]) from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError([f"{path}: larger than {MAX_FILE_BYTES:,} bytes; is this a TOML file?"])
    try:
        text = data.decode("utf-8")
        if text.startswith("\ufeff"):
            raise ValueError("it begins with a byte order mark; save it as UTF-8 without one")
        if _LONG_KEY.search(text):
            raise ValueError("expected keys of at most 32 parts, found a longer one")
        return tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 text: byte {data[error.start]:#04x} at offset {error.start}"]) from None
    except (RecursionError, ValueError) as error:
        reason = "tables or arrays nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError([f"{path}: not valid TOML: {reason}"]) from None


def _set(tree: dict[str, Any], name: str, value: object) -> None:
    *sections, leaf = name.split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            return  # the file is wrong here; validation reports it
        tree = child
    tree[leaf] = value


def _parse_override(value: str | list[str], key: Key) -> object:
    if value == "none" and key.is_optional:
        return None
    if isinstance(value, list):
        whole = _toml_value(value[0]) if len(value) == 1 and value[0].startswith("[") else None
        words = (
            value if key.item.startswith(("a string", "a path", "one of")) else [_toml_value(word) for word in value]
        )
        return whole if isinstance(whole, list) else words
    return value if key.is_text else _toml_value(value)


def _toml_value(text: str) -> object:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError, ValueError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


# --- writing ---------------------------------------------------------------------------------------------


def dump_toml(config: BaseModel) -> str:
    """Return the configuration as TOML that parses back to an equal object; keys without a value are left out."""
    import tomli_w

    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def dump_json_schema(schema: type[BaseModel]) -> str:
    """Return the JSON schema that editors use to complete and check a command's TOML file."""
    return json.dumps(schema.model_json_schema(), indent=2)


# --- describing ------------------------------------------------------------------------------------------


def iter_keys(schema: type[BaseModel]) -> Iterator[Key]:
    """Yield every key of a schema, sections walked in order, with its dotted name; those of a list of tables too."""
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
        section = _section_of(field.annotation)
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
            default=None if default is ... else _as_toml(default),
            description=field.description or "",
            is_list="array" in kind,
            is_bool="boolean" in kind,
            is_text=kind == {"string"},
            is_optional=any(variant.get("type") == "null" for variant in properties[name].get("anyOf", [])),
            item=_expected(properties[name]["items"]) if "items" in properties[name] else "",
            in_list=False,
        )
        if table := _section_of(*get_args(field.annotation)) if "array" in kind else None:
            inner_properties = definitions[table.__name__]["properties"]
            for key in _walk(table, inner_properties, definitions, f"{prefix}{name}.", {}):
                yield replace(key, in_list=True)


def _section_of(annotation: object) -> type[BaseModel] | None:
    if get_origin(annotation) in (Union, UnionType):
        return next((found for found in map(_section_of, get_args(annotation)) if found), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _variants(definition: dict[str, Any]) -> list[dict[str, Any]]:
    return [variant for variant in definition.get("anyOf", [definition]) if variant.get("type") != "null"]


def _kinds(definition: dict[str, Any]) -> set[str]:
    return {variant.get("type", "string") for variant in _variants(definition)}


def _expected(definition: dict[str, Any]) -> str:
    """Say in words what a JSON-schema property takes: `an integer >= 1`, `one of "pre", "post"`, ..."""
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
_NO_LIMIT = 2**53  # a bound that only keeps numbers exact is no news to anybody


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
    special = {
        "path": "a path",
        "duration": 'a duration such as "90s" or "2m"',
        "share": 'a share such as "5%"',
    }.get(variant.get("format", ""))
    noun = special or _NOUNS["object" if "$ref" in variant else variant.get("type", "string")]
    bounds = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
    limits = [f"{sign} {variant[key]}" for key, sign in bounds if key in variant and variant[key] < _NO_LIMIT]
    if variant.get("minLength") == 1:
        limits.append("that is not empty")
    if "pattern" in variant and not special:
        limits.append(f"matching {variant['pattern']}")
    return " ".join([noun, " and ".join(limits)]).strip()


def _as_toml(value: object) -> str:
    if value is None:
        return "none"
    return json.dumps(value, default=str) if not isinstance(value, float) else repr(value)


# --- errors ----------------------------------------------------------------------------------------------


def _describe_error(schema: type[BaseModel], error: ErrorDetails, path: Path | None, overridden: set[str]) -> str:
    parts = _place_of(schema, error)
    dotted = ".".join(parts)
    origin = f"--{dotted}" if dotted in overridden else str(path.name if path else "command line")
    where = "" if dotted in overridden or not dotted else f" {dotted}"
    if error["type"] == "extra_forbidden":
        return f"{origin}:{where} is not a known key{_did_you_mean(schema, parts)}"
    if error["type"] == "missing":
        described = next((key.description for key in iter_keys(schema) if key.name == ".".join(_names(parts))), "")
        return f"{origin}:{where} is required: {_expected_at(schema, parts)}{described and f' ({described})'}"
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        given = [f"--{name}" for name in sorted(overridden) if name.startswith(f"{dotted}." if dotted else "")]
        if given and dotted not in overridden:  # a relation that the command line may have broken
            origin = f"{origin} with {', '.join(given[:3])}{', ...' if len(given) > 3 else ''}"
        return f"{origin}:{where and where + ':'} {message}"
    expected, found = _expected_at(schema, parts), describe_value(error["input"])
    return f"{origin}:{where and where + ':'} expected {expected}, found {found}"


def _place_of(schema: type[BaseModel], error: ErrorDetails) -> list[str]:
    """Return the parts of the key's name, without the name of the type that pydantic adds where a key takes several."""
    parts = [str(part) for part in error["loc"]]
    names = {key.name for key in iter_keys(schema)}
    return parts[:-1] if parts and ".".join(parts[:-1]) in names and not parts[-1].isdigit() else parts


def _expected_at(schema: type[BaseModel], parts: list[str]) -> str:
    name = ".".join(_names(parts))
    for key in iter_keys(schema):
        if key.name == name:
            return key.item if parts[-1].isdigit() else key.expected
    return f"a [{name}] table"


def _names(parts: list[str]) -> list[str]:
    """Leave out of an error's place the numbers of a list's items."""
    return [part for part in parts if not part.isdigit()]


def describe_value(value: object) -> str:
    """Return a value as a user wrote it, with its TOML type where that is not plain: `"10" (a string)`."""
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


def _did_you_mean(schema: type[BaseModel], parts: list[str]) -> str:
    section = ".".join(_names(parts[:-1]))
    found = nearest(f"{section}.{parts[-1]}".lstrip("."), [key.name for key in iter_keys(schema)])
    names = " or ".join(name.removeprefix(f"{section}.") for name in found)
    return f" (did you mean {names}?)" if names else ""


def nearest(dotted: str, names: list[str]) -> list[str]:
    """Return the known key, or section, that somebody who wrote `dotted` most likely meant; several are as likely."""
    section, _, leaf = dotted.rpartition(".")
    wanted = SYNONYMS.get(leaf, leaf)
    siblings = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == section}
    siblings |= {name.split(".")[0]: name.split(".")[0] for name in names if not section and "." in name}
    if near := [wanted] if wanted in siblings else _closest(wanted, siblings, cutoff=0.6):
        return [siblings[name] for name in near]
    elsewhere = [name for name in names if wanted in (name, name.rpartition(".")[2])]
    return elsewhere[:1] or _closest(dotted, names, cutoff=0.75)


def _letters_apart(first: str, second: str) -> int:
    ours, theirs = Counter(first), Counter(second)
    return ((ours - theirs) + (theirs - ours)).total()


def _closest(word: str, names: Iterable[str], *, cutoff: float) -> list[str]:
    """Return the names most like a word, of equally like ones those with the same letters (to_pk: top_k, not top_p)."""
    likeness = {
        name: (difflib.SequenceMatcher(None, name, word).ratio(), -_letters_apart(name, word))
        for name in difflib.get_close_matches(word, names, n=3, cutoff=cutoff)
    }
    return sorted(name for name in likeness if likeness[name] == max(likeness.values()))
