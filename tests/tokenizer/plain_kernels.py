"""The kernels as plain Python: the same source without numba, where each read and write is checked.

`load` imports the compiled engine's modules a second time, with this module in the place of `jit`. The functions here
are what the machine instructions mean.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import numpy as np

import transformerlm.tokenizer.fast as package

_NAMES = [
    "jit",
    "merge_kernels",
    "piece_kernels",
    "text_kernels",
    "seam_kernels",
    "table_kernels",
    "encode_kernels",
    "train_kernels",
    "encoder",
    "byte_chunks",
    "engine",
    "counter",
    "learner",
]


def kernel(function: Any) -> Any:
    """Leave the function as it is."""
    return function


helper = kernel


def byte_at(data: np.ndarray, position: int) -> int:
    """Return one byte."""
    assert 0 <= position < len(data), (position, len(data))
    return int(data[position])


unsigned = np.uint64


def word_at(data: np.ndarray, position: int) -> np.uint64:
    """Return eight bytes as a number, the first the least."""
    assert 0 <= position <= len(data) - 8, (position, len(data))
    return np.uint64(int.from_bytes(data[position : position + 8].tobytes(), "little"))


def prefetch(words: np.ndarray, place: int) -> None:
    """Load nothing."""
    assert 0 <= place < len(words), (place, len(words))


def bytes_between(data: np.ndarray, position: int, set_bits: int, least: int, number: int) -> np.uint64:
    """Return which of 64 bytes are in a range, bit by bit."""
    assert 0 <= position <= len(data) - 64, (position, len(data))
    found = (byte | set_bits in range(least, least + number) for byte in data[position : position + 64].tolist())
    return np.uint64(sum(is_in << place for place, is_in in enumerate(found)))


def lowest_bit(bits: np.uint64) -> int:
    """Return the place of the lowest bit."""
    return (int(bits) & -int(bits)).bit_length() - 1 if bits else 64


def load() -> dict[str, ModuleType]:
    """Return the engine's modules by name, uncompiled; the compiled ones stay what `import` gives."""
    names = {name: f"{package.__name__}.{name}" for name in _NAMES}
    kept = {full: sys.modules.pop(full, None) for full in names.values()}
    attributes = {name: vars(package).pop(name) for name in _NAMES if name in vars(package)}
    sys.modules[names["jit"]] = sys.modules[__name__]
    try:
        return {name: importlib.import_module(full) for name, full in names.items()}
    finally:
        for name, full in names.items():
            sys.modules.pop(full, None)
            vars(package).pop(name, None)
            if (module := kept[full]) is not None:
                sys.modules[full] = module
        vars(package).update(attributes)
