"""From TOML files and command-line overrides to a checked configuration object, and back.

Every problem of a file is reported in one go, a line each:

    train.toml:7: model.n_heads is not a known key (did you mean num_heads?)
    train.toml:5: model.d_model: expected an integer >= 1, found "512" (a string)
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from config.errors import ConfigError, problem_lines
from config.keys import iter_keys
from config.layers import MISSING, Layer, Overrides, options_layer, set_key
from config.lines import key_lines
from config.paths import as_written, names_in_paths

MAX_FILE_BYTES = 1_000_000
# tomllib's time grows with the square of a dotted key's parts: a key of 500,000 parts, which fits a file, takes days.
# A string that looks like one is a part by itself.
_KEY_PART = r"""(?:[\w-]++|"(?:\\.|[^"\\\n])*+"|'[^'\n]*+')"""
_LONG_KEY = re.compile(rf"(?:^|[\[{{,])[ \t]*+(?:{_KEY_PART}[ \t]*+\.[ \t]*+){{32}}", re.MULTILINE)
SHIPPED = Path(__file__).parent / "resources"

Schema = TypeVar("Schema", bound=BaseModel)
Paths = Path | Sequence[Path] | None


# --- reading ---------------------------------------------------------------------------------------------


def load_config(
    schema: type[Schema], path: Paths, overrides: Overrides | None = None, *, snippets: Sequence[str] = ()
) -> Schema:
    """Build a `schema` object from its defaults, then the files, then the snippets, then the overrides.

    Args:
        schema: the command's schema.
        path: TOML files, of which a later one overrides an earlier one; None uses defaults and overrides only.
        overrides: dotted key -> value as written on the command line (a list of words for a list key).
        snippets: TOML text from the command line.

    Raises:
        ConfigError: a file cannot be read, or anything in it or in the overrides is wrong.
    """
    return validate(schema, read_layers(schema, path, overrides or {}, snippets=snippets))


def read_layers(
    schema: type[BaseModel], path: Paths, overrides: Overrides, *, snippets: Sequence[str] = ()
) -> list[Layer]:
    """Read the sources of a configuration, the strongest last.

    Raises:
        ConfigError: a file or a snippet cannot be read.
    """
    paths = [path] if isinstance(path, Path) else list(path or ())
    layers = [Layer(one.name, read_toml(one), _lines_of(one)) for one in paths]
    layers += [Layer("--toml", _parsed(text, "--toml")) for text in snippets]
    return [*layers, options_layer(schema, overrides)]


def validate(schema: type[Schema], layers: Sequence[Layer]) -> Schema:
    """Merge the sources, the strongest last, and build the configuration.

    Raises:
        ConfigError: a key, a value or a relation is wrong.
    """
    tree: dict[str, Any] = {}
    for layer in layers:
        tree = _merged(tree, layer.tree)
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(problem_lines(schema, tree, error, layers=layers)) from None


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        ConfigError: no such file, not a file, too large, not UTF-8, or not TOML.
    """
    if os.path.isdir(path):  # False, too, for what cannot be a name
        raise ConfigError([f"{path}: expected a TOML file, found a directory"])
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file (the shipped ones are in {SHIPPED})"]) from None
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"]) from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError([f"{path}: larger than {MAX_FILE_BYTES:,} bytes; is this a TOML file?"])
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 text: byte {data[error.start]:#04x} at offset {error.start}"]) from None
    return _parsed(text, str(path))


def _parsed(text: str, name: str) -> dict[str, Any]:
    try:
        if text.startswith("\ufeff"):
            raise ValueError("it begins with a byte order mark; save it as UTF-8 without one")
        if _LONG_KEY.search(text):
            raise ValueError("expected keys of at most 32 parts, found a longer one")
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError([f"{name}: not valid TOML: tables or arrays nested too deeply"]) from None
    except ValueError as error:
        # tomllib's words for C:\data, and for C:\users, where \u begins the number of a letter
        is_backslash = any(word in str(error) for word in ("Unescaped '\\'", "Invalid hex value"))
        way_out = r"; a Windows path is written 'C:\data' (single quotes) or C:/data" if is_backslash else ""
        raise ConfigError([f"{name}: not valid TOML: {error}{way_out}"]) from None


def _lines_of(path: Path) -> dict[str, int]:
    """Return the lines of a file's keys; nothing for a pipe, which was read once and is empty now."""
    return key_lines(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return both trees as one: tables are merged, and where both set a key, `above` wins."""
    both = dict(below)
    for name, value in above.items():
        under = both.get(name)
        both[name] = _merged(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return both


# --- writing ---------------------------------------------------------------------------------------------


def dump_toml(config: BaseModel) -> str:
    """Return the configuration as TOML that parses back to an equal object; keys without a value are omitted."""
    import tomli_w

    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def dump_settings(settings: Mapping[str, Any]) -> str:
    """Return settings under dotted keys as TOML."""
    import tomli_w

    tree: dict[str, Any] = {}
    for name, value in settings.items():
        set_key(tree, name, as_written(value))
    return tomli_w.dumps(tree)


def dump_origins(config: BaseModel, layers: Sequence[Layer]) -> str:
    """Return the configuration as TOML, one key a line, each with a comment that names its source."""
    return "".join(f"{line}\n" for line in _origins(config, layers))


def _origins(config: BaseModel, layers: Sequence[Layer]) -> Iterator[str]:
    dumped = Layer("", config.model_dump(mode="json", exclude_none=True))
    for key in iter_keys(type(config)):
        if key.in_list:
            continue
        parts = key.name.split(".")
        source = next((layer for layer in reversed(layers) if layer.holds(parts)), None)
        where = "default" if source is None else "command line" if source.is_options else source.place(parts)
        value, given = dumped.find(parts), source.find(parts) if source else None
        if value != given and (names := names_in_paths(given)):
            where += f"; environment: {', '.join(names)}"
        if value is MISSING:
            yield f"# {key.name}: none  # {where}"
        else:
            yield f"{key.name} = {_inline(value)}  # {where}"


def _inline(value: object) -> str:
    """Return a value as TOML on one line; the library writes tables inline if they are inside two lists."""
    import tomli_w

    text = re.sub(r"\n *", " ", tomli_w.dumps({"value": [[value]]})).removeprefix("value = ").strip()
    return text.removeprefix("[ [").removesuffix(", ], ]").strip()


def dump_json_schema(schema: type[BaseModel]) -> str:
    """Return the JSON schema that editors use to complete and check a command's TOML file."""
    return json.dumps(schema.model_json_schema(), indent=2)
