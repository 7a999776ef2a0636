"""The machine instructions of `jit.py`, as numba compiles them. Importing this module imports numba.

Part of: jit
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


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
def bytes_between(typing: Any, data: Any, position: Any, set_bits: Any, least: Any, number: Any) -> Any:
    """Return which of the 64 bytes from here on are `least` or one of the `number - 1` values after it, bit by bit.

    `set_bits` are set in each byte before that: with 0x20 a capital is its small letter.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.IntType(8), 64)

        def everywhere(value: Any) -> Any:
            byte = builder.trunc(value, ir.IntType(8))
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), byte, ir.Constant(ir.IntType(32), 0))
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), 64), [0] * 64)
            return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), lanes)

        block = builder.load(_address(context, builder, signature.args[0], args[0], args[1], vector), align=1)
        # Unsigned: what is below `least` wraps around and is far above `number`, so one comparison does for both ends.
        offset = builder.sub(builder.or_(block, everywhere(args[2])), everywhere(args[3]))
        return builder.bitcast(builder.icmp_unsigned("<", offset, everywhere(args[4])), ir.IntType(64))

    return types.uint64(data, *[types.int64] * 4), generate


@intrinsic
def lowest_bit(typing: Any, bits: Any) -> Any:
    """Return the place of the lowest bit that is set, 64 if none is."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@intrinsic
def prefetch(typing: Any, words: Any, place: Any) -> Any:
    """Begin to load an item of an array of words into the nearest cache, and wait for nothing."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], kind)
        position = builder.shl(args[1], ir.Constant(ir.IntType(64), 3))
        address = _address(context, builder, signature.args[0], args[0], position, ir.IntType(8))
        builder.call(function, [address, *(ir.Constant(number, value) for value in (0, 3, 1))])  # to read, again, data
        return context.get_dummy_value()

    return types.void(words, types.uint64), generate
