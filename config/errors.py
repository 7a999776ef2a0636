"""What is wrong with a configuration, one problem a line: where, what was expected, what was found, how to fix it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from config.keys import describe_value, iter_keys, section_of
from config.layers import Layer
from config.paths import not_utf8
from config.suggest import closest, hint

MAX_ERRORS = 50
_WRITE = "; write "


class ConfigError(ValueError):
    """A configuration that cannot be used; `lines` holds one line for each problem."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def problem_lines(
    schema: type[BaseModel], tree: dict[str, Any], error: ValidationError, *, layers: Sequence[Layer]
) -> list[str]:
    """Return one line for each problem of a configuration: at most `MAX_ERRORS`, then how many more there are.

    Args:
        schema: what the configuration should be.
        tree: the configuration as it was read.
        error: what pydantic found.
        layers: the sources that it was read from, the strongest last.
    """
    errors = error.errors(include_url=False)
    files = [layer for layer in layers if layer.lines]
    if len(files) == 1 and (owner := _owner_of(schema, files[0].tree)):
        return [f"{files[0].name}: {owner}"]
    lines = [_line(schema, item, layers) for item in errors]
    if all(item["type"] == "value_error" and _is_section(schema, item) for item in errors):
        lines += [f"{_relation_origin(layers, [], text)}: {text}" for text in _other_relations(schema, tree)]
    # A key of several types gets one line from each type; keep the one that says more.
    shorter = {line.partition(_WRITE)[0] for line in lines if _WRITE in line}
    lines = [line for line in dict.fromkeys(lines) if line not in shorter]
    if len(lines) > MAX_ERRORS:
        lines[MAX_ERRORS:] = [f"{layers[0].name}: {len(lines) - MAX_ERRORS:,} more errors"]
    return lines


def _line(schema: type[BaseModel], error: ErrorDetails, layers: Sequence[Layer]) -> str:
    parts = _place_of(schema, error)
    dotted, is_section = ".".join(parts), _is_section(schema, error)
    holders = [layer for layer in layers if layer.holds(parts) and not (is_section and layer.is_options)]
    source = holders[-1] if holders else layers[0]
    is_option = source.is_options and bool(holders)
    origin = source.name if source.is_options and not is_option else source.place(parts)
    where = "" if origin == f"--{dotted}" or not dotted else f" {dotted}"
    if error["type"] == "extra_forbidden":
        unknown = ".".join(_names(parts))
        return f"{origin}:{where} is not a known key{hint(unknown, _names_of(schema), sections=True)}"
    if error["type"] == "missing":
        described = next((key.description for key in iter_keys(schema) if key.name == ".".join(_names(parts))), "")
        return f"{origin}:{where} is required: {_expected_at(schema, parts)}{described and f' ({described})'}"
    if error["type"] == "string_unicode":
        return f"{origin}:{where and where + ':'} {not_utf8(str(error['input']))}"
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        origin = _relation_origin(layers, parts, message) if is_section else origin
        return f"{origin}:{where and where + ':'} {message}"
    expected, found = _expected_at(schema, parts), describe_value(error["input"])
    return f"{origin}:{where and where + ':'} expected {expected}, found {found}{_meant(error)}"


def _meant(error: ErrorDetails) -> str:
    """Return how to write the value if only its type is wrong: 10000 for 1e4 or "10000"."""
    value = error["input"]
    wanted = {"int_type": int, "float_type": float}.get(error["type"])
    if isinstance(value, bool) or not isinstance(value, int | float | str) or wanted is None:
        return ""
    try:
        number = float(value)
        return f"{_WRITE}{value if wanted is float else int(number)}" if number == wanted(number) else ""
    except (ValueError, OverflowError):
        return ""


def _relation_origin(layers: Sequence[Layer], section: list[str], message: str) -> str:
    """Return the place of the first key that a relation names, with the options that may have broken it."""
    words = [[*section, *word.split(".")] for word in re.findall(r"[a-z]\w*(?:\.\w+)*", message)]
    named = [(layer, parts) for parts in [*words, section] for layer in layers if ".".join(parts) in layer.lines]
    origin = named[0][0].place(named[0][1]) if named else layers[0].name
    prefix = "".join(f"{part}." for part in section)
    options = (name for layer in layers if layer.is_options for name in _dotted(layer.tree))
    given = [f"--{name}" for name in sorted(options) if name.startswith(prefix)]
    return f"{origin} with {', '.join(given[:3])}{', ...' if len(given) > 3 else ''}" if given else origin


def _dotted(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield from _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]


def _is_section(schema: type[BaseModel], error: ErrorDetails) -> bool:
    """Return whether the error is about a table, or about the whole: a relation between keys."""
    return ".".join(_names(_place_of(schema, error))) not in _names_of(schema)


def _names_of(schema: type[BaseModel]) -> list[str]:
    return [key.name for key in iter_keys(schema)]


def _place_of(schema: type[BaseModel], error: ErrorDetails) -> list[str]:
    """Return the parts of the key's name; pydantic adds the name of a type where a key takes several."""
    parts = [str(part) for part in error["loc"]]
    return parts[:-1] if parts and ".".join(parts[:-1]) in _names_of(schema) and not parts[-1].isdecimal() else parts


def _expected_at(schema: type[BaseModel], parts: list[str]) -> str:
    name = ".".join(_names(parts))
    for key in iter_keys(schema):
        if key.name == name:
            return key.item if parts[-1].isdecimal() else key.expected
    return f"a [{name}] table"


def _names(parts: list[str]) -> list[str]:
    """Return an error's place without the numbers of a list's items."""
    return [part for part in parts if not part.isdecimal()]


# --- what one pass of pydantic does not find --------------------------------------------------------------


def _other_relations(schema: type[BaseModel], tree: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong between the sections, which pydantic does not check once a section has an error of its own.

    Each value has the right type, or there would be other errors, but a path is still text. A relation that needs a
    path waits until the sections are right.
    """
    whole = _unchecked(schema, tree)
    for name in schema.__pydantic_decorators__.model_validators:
        try:
            getattr(whole, name)()
        except ValueError as error:
            yield str(error)
        except (AttributeError, TypeError):
            continue


def _unchecked(schema: type[BaseModel], tree: dict[str, Any]) -> BaseModel:
    values = dict(tree)
    for name, field in schema.model_fields.items():
        section = section_of(field.annotation)
        if section and isinstance(values.get(name), dict):
            values[name] = _unchecked(section, values[name])
    return schema.model_construct(**values)


def _owner_of(schema: type[BaseModel], tree: dict[str, Any]) -> str | None:
    """Say which command a file is for if `schema` does not know all of its keys and another command does."""
    unknown = _unfit(schema, tree, ("extra_forbidden",))
    if not unknown:
        return None
    if len(unknown) == 1 and closest(unknown[0], _names_of(schema), cutoff=0.8):  # misspelt, so far as anyone can say
        return None
    from config.commands import COMMANDS

    mine = next((name for name, other in COMMANDS.items() if other is schema), "this command")
    for name, other in COMMANDS.items():
        known = _names_of(other)
        has_all = all(any(f"{key}.".startswith(f"{one}.") for key in known) for one in unknown)
        if has_all and not _unfit(other, tree, ("extra_forbidden", "missing")):
            keys = ", ".join(unknown[:4]) + (", ..." if len(unknown) > 4 else "")
            return f"expected a file for {mine}, found one for {name} ({mine} has no {keys}){_its_run(schema, tree)}"
    return None


def _its_run(schema: type[BaseModel], tree: dict[str, Any]) -> str:
    """Say how to name a run to a command that takes a checkpoint, if the file holds the settings of a run."""
    table = tree.get("logging")
    run_name = table.get("run_name") if isinstance(table, dict) else None
    if "checkpoint" not in schema.model_fields or "data" not in tree or not isinstance(run_name, str):
        return ""
    return f"; its run is given as --checkpoint {Path(str(tree.get('runs_dir', 'runs'))) / run_name}"


def _unfit(schema: type[BaseModel], tree: dict[str, Any], kinds: tuple[str, ...]) -> list[str]:
    try:
        schema.model_validate(tree)
    except ValidationError as error:
        return [".".join(map(str, item["loc"])) for item in error.errors(include_url=False) if item["type"] in kinds]
    return []
