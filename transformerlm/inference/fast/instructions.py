"""The machine instructions of `jit.py`, as numba compiles them. Importing this module imports numba.

`multiply_block` keeps sums in the processor's registers while it goes through a matrix. LLVM does not do that with
loops over arrays: they load and store each sum every few products, and take twice as long. `fetch` is an instruction
that no loop over arrays becomes.

Part of: jit
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from transformerlm.inference.fast.registers import LANES, TOGETHER, VECTORS


def multiply_block(num_rows: int, lanes: int = LANES, vectors: int = VECTORS) -> Any:
    """Return the compiled function `(x, row, strip, out, out_row, column)` that writes a block of a product.

    It writes the products of `num_rows` rows of `x` `(rows, in_features)`, from `row` on, with `strip`
    `(in_features, lanes * vectors)`, to `out` from `out_row` and `column` on. All arrays are contiguous fp32, and no
    bound is checked. Each sum begins with 0 and takes the products in the order of the input's features.
    """

    @intrinsic
    def multiply(typing: Any, x: Any, row: Any, strip: Any, out: Any, out_row: Any, column: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            arrays = [context.make_array(signature.args[i])(context, builder, args[i]) for i in (0, 2, 3)]
            in_features, width = builder.extract_value(arrays[0].shape, 1), builder.extract_value(arrays[2].shape, 1)
            inputs = [_place(builder, arrays[0].data, in_features, args[1], number) for number in range(num_rows)]
            sums = _sums(builder, inputs, arrays[1].data, in_features, lanes, vectors)
            for number, own in enumerate(sums):
                place = builder.gep(_place(builder, arrays[2].data, width, args[4], number), [args[5]])
                for index, sum_ in enumerate(own):
                    builder.store(sum_, _vector(builder, place, index, lanes), align=4)
            return context.get_dummy_value()

        return types.void(x, types.int64, strip, out, types.int64, types.int64), generate

    return multiply


@intrinsic
def fetch(typing: Any, array: Any, place: Any) -> Any:
    """Have the processor bring `LINE` numbers of a contiguous array to its second cache, beside its other work."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        address = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        is_written, which_cache, are_data = (ir.Constant(ir.IntType(32), number) for number in (0, 2, 1))
        kind = ir.FunctionType(ir.VoidType(), [address.type, *[ir.IntType(32)] * 3])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [address.type], kind)
        builder.call(prefetch, [address, is_written, which_cache, are_data])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


def _place(builder: Any, data: Any, width: Any, row: Any, number: int) -> Any:
    """Return where row `row + number` begins."""
    return builder.gep(data, [builder.mul(builder.add(row, _int(number)), width)])


def _vector(builder: Any, place: Any, index: int, lanes: int) -> Any:
    """Return where the vector of this index is after a place."""
    return builder.bitcast(builder.gep(place, [_int(index * lanes)]), _kind(lanes).as_pointer())


def _sums(builder: Any, inputs: list[Any], strip: Any, in_features: Any, lanes: int, vectors: int) -> list[list[Any]]:
    """Loop over the features; return the sums of each row, `vectors` of them."""
    kind, before = _kind(lanes), builder.block
    loop, after = (builder.append_basic_block(name) for name in ("features", "summed"))
    builder.branch(loop)
    builder.position_at_end(loop)
    feature = builder.phi(ir.IntType(64))
    feature.add_incoming(_int(0), before)
    sums = [[builder.phi(kind) for _ in range(vectors)] for _ in inputs]
    weights = builder.gep(strip, [builder.mul(feature, _int(lanes * vectors))])
    loaded = [builder.load(_vector(builder, weights, index, lanes), align=4) for index in range(vectors)]
    new: list[list[Any]] = []
    for place, own in zip(inputs, sums, strict=True):
        factor = _everywhere(builder, builder.load(builder.gep(place, [feature])), lanes)
        products = [builder.fmul(factor, each, flags=("contract",)) for each in loaded]
        new.append([builder.fadd(each, old, flags=("contract",)) for each, old in zip(products, own, strict=True)])
        for old, each in zip(own, new[-1], strict=True):
            old.add_incoming(ir.Constant(kind, [0.0] * lanes), before)
            old.add_incoming(each, loop)
    following = builder.add(feature, _int(1))
    feature.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, in_features), loop, after)
    builder.position_at_end(after)
    return new


def _everywhere(builder: Any, number: Any, lanes: int) -> Any:
    """Return a vector that has the number in all its lanes."""
    empty, first = ir.Constant(_kind(lanes), ir.Undefined), ir.Constant(ir.IntType(32), 0)
    lanes_of_first = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(builder.insert_element(empty, number, first), empty, lanes_of_first)


def _kind(lanes: int) -> Any:
    return ir.VectorType(ir.FloatType(), lanes)


def _int(value: int) -> Any:
    return ir.Constant(ir.IntType(64), value)


multiply_one, multiply_four = multiply_block(1), multiply_block(4)
multiply_keys = multiply_block(1, LANES, TOGETHER // LANES)
