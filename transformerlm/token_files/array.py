"""The `.npy` files of a token file, opened without trusting them: no pickle, no expression evaluated, no size believed.

numpy's own reader evaluates the header as a Python literal and takes the shape from it. Here the header must be exactly
what numpy writes for a row of whole numbers, and the file must have the size that the header says.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

_MAGIC = b"\x93NUMPY\x01\x00"
_MAX_HEADER_BYTES = 4096
_HEADER = re.compile(
    rb"\{'descr': '(?P<type>[^']{1,16})', 'fortran_order': (?P<fortran>False|True), "
    rb"'shape': \((?P<shape>[0-9, ]{0,100})\),? ?\}\s*"
)
OFFSET_TYPE = np.dtype("<i8")
_TOKEN_TYPES: dict[str, np.dtype[Any]] = {"<u2": np.dtype("<u2"), "<u4": np.dtype("<u4")}
TOKEN_TYPE_NAMES = ("uint16", "uint32")
_OFFSET_TYPES: dict[str, np.dtype[Any]] = {"<i8": OFFSET_TYPE}
ADVICE = "run transformerlm-make-data again"


def open_token_array(path: Path) -> np.memmap[Any, np.dtype[Any]]:
    """Return a token file's ids as a read-only memory map, shape (tokens,).

    Raises:
        ValueError: not an `.npy` file, another kind of array, or a size that contradicts the header.
    """
    return open_row(path, _TOKEN_TYPES, kinds=" or ".join(TOKEN_TYPE_NAMES))


def open_offset_array(path: Path) -> np.memmap[Any, np.dtype[Any]]:
    """Return where documents begin in a token file, and where the last one ends, int64 `(documents + 1,)`.

    Raises:
        ValueError: as `open_token_array`.
    """
    return open_row(path, _OFFSET_TYPES, kinds="int64")


def open_row(
    path: Path, types: dict[str, np.dtype[Any]], *, kinds: str, advice: str = ADVICE
) -> np.memmap[Any, np.dtype[Any]]:
    """Return a row of numbers of one of `types` as a read-only memory map; `kinds` are their names for people.

    Raises:
        ValueError: not an `.npy` file, another kind of array, or a size that contradicts the header.
    """

    def error(expected: str, found: str) -> ValueError:
        return ValueError(f"{path}: not a readable .npy file: {expected}, found {found}; {advice}")

    with path.open("rb") as file:
        start = file.read(len(_MAGIC) + 2)
        header_bytes = int.from_bytes(start[len(_MAGIC) :], "little")
        header = file.read(min(header_bytes, _MAX_HEADER_BYTES))
    match = _HEADER.fullmatch(header)
    if not start.startswith(_MAGIC) or match is None or header_bytes > _MAX_HEADER_BYTES:
        raise error("expected the header of a row of whole numbers", f"{(start + header)[:60]!r}")
    shape = [int(length) for length in match["shape"].split(b",") if length.strip()]
    descr = match["type"].decode("latin-1")
    if descr not in types or len(shape) != 1:
        raise error(f"expected a 1-D array of {kinds}", f"{len(shape)}-D {_name(descr)}")
    offset = len(start) + header_bytes
    expected, size = offset + shape[0] * types[descr].itemsize, path.stat().st_size
    if size != expected:
        raise error(f"expected {expected:,} bytes for the {shape[0]:,} ids of its header", f"{size:,}")
    return np.memmap(path, types[descr], mode="r", offset=offset, shape=(shape[0],))


def _name(descr: str) -> str:
    try:
        return np.dtype(descr).name
    except (TypeError, ValueError):
        return repr(descr)
