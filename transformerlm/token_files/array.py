"""The `.npy` of a token file, opened without trusting it: no pickle, no expression evaluated, no size believed.

numpy's own reader evaluates the header as a Python literal and takes the shape from it. Here the header must be exactly
what numpy writes for a row of uint16 or uint32, and the file must have the size that the header says.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_MAGIC = b"\x93NUMPY\x01\x00"
_MAX_HEADER_BYTES = 4096
_HEADER = re.compile(
    rb"\{'descr': '(?P<type>[^']{1,16})', 'fortran_order': (?P<fortran>False|True), "
    rb"'shape': \((?P<shape>[0-9, ]{0,100})\),? ?\}\s*"
)
_TYPES: dict[bytes, np.dtype[Any]] = {b"<u2": np.dtype("<u2"), b"<u4": np.dtype("<u4")}


def open_token_array(path: Path) -> npt.NDArray[Any]:
    """Return a token file's ids as a read-only memory map, shape (tokens,).

    Raises:
        ValueError: not an `.npy` file, another kind of array, or a size that contradicts the header.
    """
    with path.open("rb") as file:
        start = file.read(len(_MAGIC) + 2)
        header_bytes = int.from_bytes(start[len(_MAGIC) :], "little")
        header = file.read(min(header_bytes, _MAX_HEADER_BYTES))
    match = _HEADER.fullmatch(header)
    if not start.startswith(_MAGIC) or match is None or header_bytes > _MAX_HEADER_BYTES:
        raise _error(path, "expected the header of a row of whole numbers", f"{(start + header)[:60]!r}")
    shape = [int(length) for length in match["shape"].split(b",") if length.strip()]
    if match["type"] not in _TYPES or len(shape) != 1:
        found = f"{len(shape)}-D {_name(match['type'].decode('latin-1'))}"
        raise _error(path, "expected a 1-D array of uint16 or uint32", found)
    dtype = _TYPES[match["type"]]
    offset = len(start) + header_bytes
    expected, size = offset + shape[0] * dtype.itemsize, path.stat().st_size
    if size != expected:
        raise _error(path, f"expected {expected:,} bytes for the {shape[0]:,} ids of its header", f"{size:,}")
    tokens: npt.NDArray[Any] = np.memmap(path, dtype, mode="r", offset=offset, shape=(shape[0],))
    return tokens


def _name(descr: str) -> str:
    try:
        return np.dtype(descr).name
    except (TypeError, ValueError):
        return repr(descr)


def _error(path: Path, expected: str, found: str) -> ValueError:
    return ValueError(f"{path}: not a readable .npy file: {expected}, found {found}; run transformerlm-make-data again")
