"""JSON and other small files that a stranger may have written: they are read with a limit and refused in one line.

Python's own reader silently takes the last of two equal keys, accepts NaN, and follows nesting until its stack ends.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MAX_DEPTH = 64
MAX_INTEGER = 1 << 128  # some random generators have states of 128 bits


def read_limited(path: Path, *, max_bytes: int) -> bytes:
    """Return a file's bytes without ever holding more than `max_bytes` of them.

    Raises:
        ValueError: a larger file, or no regular file (a pipe would be waited for, a device never ends).
        OSError: it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: expected a file, found a {'folder' if path.is_dir() else 'pipe or device'}")
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{path}: expected at most {max_bytes:,} bytes, found {path.stat().st_size:,}")
    return data


def read_json_object(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ValueError: a file that is too large or not UTF-8, or what `parse_json_object` refuses; it names the file.
        OSError: it cannot be read.
    """
    data = read_limited(path, max_bytes=max_bytes)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8, found byte {data[error.start]:#04x} at offset {error.start}"
        ) from None
    return parse_json_object(text.removeprefix("\ufeff"), where=str(path))


def parse_json_object(text: str, *, where: str) -> dict[str, Any]:
    """Read a JSON object; `where` begins the error.

    Raises:
        ValueError: not JSON, not an object, a key that occurs twice, a number that is not finite or needs more than
            128 bits, or nesting beyond `MAX_DEPTH`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_each_key_once, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        found = error.msg.removesuffix(" at")  # as in "Invalid control character at"
        raise ValueError(f"{where}:{error.lineno}: expected JSON, found {found} at column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"{where}: expected JSON of at most {MAX_DEPTH} levels, found more") from None
    except ValueError as error:
        raise ValueError(f"{where}: {_reason(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {json_kind(value)}")
    _check_values(value, where)
    return value


def json_kind(value: object) -> str:
    """Return JSON's name for the kind of a value that was read from it; Python's `NoneType` is `null` there."""
    kinds = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    if value is None:
        return "null"
    return "an empty array" if value == [] else kinds[type(value)]


def values_sha256(record: Mapping[str, Any], *, kept_in: str) -> str:
    """Return the sha256 of an object's values, whatever the layout of its file; the one under `kept_in` is omitted."""
    values = {key: value for key, value in record.items() if key != kept_in}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        times = Counter(key for key, _ in pairs)
        twice = next(key for key, number in times.items() if number > 1)
        raise ValueError(f"expected each key once, found {twice[:80]!r} twice")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"expected finite numbers, found {name}")


def _reason(error: ValueError) -> str:
    too_long = "integer string conversion" in str(error)  # Python's own limit, which means nothing to a user
    return "expected whole numbers of at most 128 bits, found a longer one" if too_long else str(error)


def _check_values(value: Any, where: str) -> None:
    """Refuse nesting that is too deep and numbers that are too large."""
    for depth, level in enumerate(levels(value), 1):
        if depth > MAX_DEPTH:
            raise ValueError(f"{where}: expected JSON of at most {MAX_DEPTH} levels, found more")
        for item in level:
            if isinstance(item, float) and not math.isfinite(item):
                raise ValueError(f"{where}: expected finite numbers, found {item}")
            if isinstance(item, int) and abs(item) >= MAX_INTEGER:
                raise ValueError(f"{where}: expected whole numbers of at most 128 bits, found a longer one")


def levels(value: Any) -> Iterator[list[Any]]:
    """Yield what JSON holds level by level, the value itself first; deep nesting would break a recursion."""
    level = [value]
    while level:
        yield level
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        level = below
