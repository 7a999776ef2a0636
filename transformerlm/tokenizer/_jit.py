"""What the kernels need of numba: the decorator, and three reads of memory that Python cannot spell.

`byte_at`, `word_at` and `num_letters_at` look at raw memory: no bounds are checked and no negative index wraps round,
which is why the kernels are given texts with `PADDING` zero bytes behind them. Each is a function of a uint8 array and
a position; tests/tokenizer/plain_kernels.py spells them in plain Python, where the kernels run uncompiled.

Importing this module imports numba and fails where it is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])

PADDING = 32


def kernel(function: Function) -> Function:
    """Compile on the first call, without the GIL, and keep the machine code on disk where there is a place for it."""
    try:
        compiled = njit(function, nogil=True, cache=True)
    except RuntimeError:  # numba finds no folder that can be written, neither beside the file nor at home
        return njit(function, nogil=True)  # type: ignore[no-any-return]
    # numba throws its kept code away when the function's own file changes; a kernel holds code of the others as well.
    cache_file: Any = getattr(compiled._cache, "_cache_file", None)
    if hasattr(cache_file, "_source_stamp"):
        cache_file._source_stamp = _source_stamp()
    return compiled  # type: ignore[no-any-return]


@cache
def _source_stamp() -> tuple[tuple[str, int, int], ...]:
    """Return what changes when a file of this folder does."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files)


def helper(function: Function) -> Function:
    """Compile as a part of the kernels that call it."""
    return njit(function, nogil=True, inline="always")  # type: ignore[no-any-return]


def _address(context: Any, builder: Any, array_type: Any, array: Any, position: Any, pointee: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    place = builder.gep(builder.bitcast(data, cgutils.voidptr_t), [position])
    return builder.bitcast(place, pointee.as_pointer())


@intrinsic
def byte_at(typing: Any, data: Any, position: Any) -> Any:
    """Return the byte as a signed 64-bit number, so that sums with positions stay whole numbers."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = builder.load(_address(context, builder, signature.args[0], args[0], args[1], ir.IntType(8)), align=1)
        return builder.zext(byte, ir.IntType(64))

    return types.int64(data, types.int64), generate


@intrinsic
def word_at(typing: Any, data: Any, position: Any) -> Any:
    """Return eight bytes as one unsigned number, the first the least."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, signature.args[0], args[0], args[1], ir.IntType(64)), align=1)

    return types.uint64(data, types.int64), generate


@intrinsic
def num_letters_at(typing: Any, data: Any, position: Any) -> Any:
    """Return how many of the sixteen bytes from here on are ASCII letters, up to the first that is not."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.IntType(8), 16)
        block = builder.load(_address(context, builder, signature.args[0], args[0], args[1], vector), align=1)
        lower = builder.or_(block, ir.Constant(vector, [0x20] * 16))
        offset = builder.sub(lower, ir.Constant(vector, [ord("a")] * 16))
        is_letter = builder.icmp_unsigned("<", offset, ir.Constant(vector, [26] * 16))
        bits = builder.zext(builder.bitcast(is_letter, ir.IntType(16)), ir.IntType(64))
        ends = builder.not_(bits)  # bit 16 is always set: at most sixteen
        return builder.cttz(ends, ir.Constant(ir.IntType(1), 1))

    return types.int64(data, types.int64), generate
