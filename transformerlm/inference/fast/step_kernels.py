"""One decoding step of some rows as compiled loops, from ids to logits, for weights in fp32.

At the sizes of a small model, PyTorch takes longer to begin its some hundred operations than the processor takes for
all of them. Here a whole step is one call. All that is computed of a row is summed in an order that depends on its own
length alone, so its bits are the same beside any others.

A matrix is kept in strips of `STRIP` output features, each transposed, one after the other, and the last filled up with
zeros: a strip's part of four rows' results stays in registers while the strip is read from its beginning to its end.

Shapes: `rows` is the number of rows, filled up to a multiple of four if it is not one; `size` that of a matrix.

Part of: compiled_step
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from transformerlm.inference.fast.jit import fetch, kernel, multiply_four, multiply_keys, multiply_one
from transformerlm.inference.fast.registers import LANES, LINE, TOGETHER, VECTORS

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

STRIP = LANES * VECTORS


class Weights(NamedTuple):
    """The model's; matrices as `strips` makes them, with the gains of the norms before them."""

    embedding: Floats
    """`(vocab_size, d_model)`"""
    qkv: Floats
    """`(num_layers, size)`"""
    output: Floats
    """`(num_layers, size)`"""
    up: Floats
    """`(num_layers, size)`; the gate's features first, where there is a gate."""
    down: Floats
    """`(num_layers, size)`"""
    head: Floats
    """`(size)`"""
    head_gains: Floats
    """`(num_layers, num_heads + num_kv_heads, d_head)`: of the norms of queries and keys; or empty."""
    rotations: Floats
    """`(context_length, d_head / 2, 2)`: cosines and sines; empty where positions are not rotated."""
    epsilons: Doubles
    """`(2)`: d_model times that of the norms, and that of the norms of queries and keys."""


class Shape(NamedTuple):
    """What the arrays do not tell; the last two are 0 or 1."""

    num_heads: int
    is_gated: int
    has_norms: int


class Scratch(NamedTuple):
    """Memory for what is computed on the way, for some rows; `make_scratch` makes it."""

    normed: Floats
    """`(rows, d_model)`"""
    qkv: Floats
    """`(rows, d_query + 2 * d_kv)`"""
    heads: Floats
    """The same memory, `(rows, num_heads + 2 * num_kv_heads, d_head)`."""
    mixed: Floats
    """`(rows, d_query)`; zeros where a row is not one of a text."""
    up: Floats
    """`(rows, d_ff)`, or twice as wide where there is a gate."""
    active: Floats
    """`(rows, d_ff)`"""
    shares: Floats
    """`(1, places)`: as many as there are places for keys."""
    last: Floats
    """`(4, STRIP)`: of a strip that the features do not fill."""


def strips(weight: Floats) -> Floats:
    """Return a matrix `(out_features, in_features)` as `multiply` reads it, `(size)`."""
    padded = np.zeros((-(-len(weight) // STRIP) * STRIP, weight.shape[1]), np.float32)
    padded[: len(weight)] = weight
    return padded.reshape(-1, STRIP, weight.shape[1]).transpose(0, 2, 1).reshape(-1)


def make_scratch(rows: int, weights: Weights, shape: Shape, keys: Floats) -> Scratch:
    """Return memory for so many rows, of texts whose keys `step` is given."""
    kv_heads, blocks, d_head = keys.shape[2:5]
    d_model, num_heads = weights.embedding.shape[1], shape.num_heads
    d_ff = weights.down.shape[1] // (-(-d_model // STRIP) * STRIP)
    heads = np.empty((rows, num_heads + 2 * kv_heads, d_head), np.float32)
    return Scratch(
        normed=np.empty((rows, d_model), np.float32),
        qkv=heads.reshape(rows, -1),
        heads=heads,
        mixed=np.zeros((rows, num_heads * d_head), np.float32),
        up=np.empty((rows, d_ff * (1 + shape.is_gated)), np.float32),
        active=np.empty((rows, d_ff), np.float32),
        shares=np.empty((1, blocks * TOGETHER), np.float32),
        last=np.empty((4, STRIP), np.float32),
    )


@kernel
def step(
    first: int,
    end: int,
    ids: Ints,
    slots: Ints,
    lengths: Ints,
    weights: Weights,
    shape: Shape,
    keys: Floats,
    values: Floats,
    x: Floats,
    scratch: Scratch,
    logits: Floats,
) -> None:
    """Read ids in slots, each after so many others; write the vectors and the logits after them.

    An id reads what those before it wrote, so several of one slot may be read, in their order. `keys` are `(num_layers,
    slots, kv_heads, max_length / TOGETHER, d_head, TOGETHER)`, so that those of a text lie one after the other, and
    `values` `(num_layers, slots, kv_heads, max_length, d_head)`; `x` is `(rows, d_model)`, and `logits` are `(rows,
    vocab_size)`. The vectors pass the layers from `first` to `end`. Without ids they are those in `x`, and where
    `logits` have no rows, none are written.
    """
    if len(ids):
        _embed(ids, weights, x)
    _pass_layers(first, end, slots, lengths, weights, shape, keys, values, x, scratch)
    if len(logits):
        _normalise(x, weights, shape, scratch.normed)
        multiply(scratch.normed, weights.head, logits, scratch.last)


@kernel
def _embed(ids: Ints, weights: Weights, x: Floats) -> None:
    """Write the vectors `(rows, d_model)` of ids, and zeros after them."""
    for row in range(len(x)):
        for i in range(x.shape[1]):
            x[row, i] = weights.embedding[ids[row], i] if row < len(ids) else np.float32(0)


@kernel
def _pass_layers(
    first: int,
    end: int,
    slots: Ints,
    lengths: Ints,
    weights: Weights,
    shape: Shape,
    keys: Floats,
    values: Floats,
    x: Floats,
    scratch: Scratch,
) -> None:
    count, normed = len(slots), scratch.normed
    for layer in range(first, end):
        _normalise(x, weights, shape, normed)
        multiply(normed, weights.qkv[layer], scratch.qkv, scratch.last)
        for row in range(count):
            following = slots[min(row + 1, count - 1)]
            later = keys[layer, following, 0]  # what is read next
            is_new = following != slots[row]  # its own were read just now
            _attend(
                scratch, row, layer, lengths[row], weights, shape, keys[layer], values[layer], slots[row], later, is_new
            )
        multiply(scratch.mixed, weights.output[layer], normed, scratch.last)
        _add(x, normed)
        _normalise(x, weights, shape, normed)
        multiply(normed, weights.up[layer], scratch.up, scratch.last)
        for row in range(len(x)):
            _activate(scratch.up[row], shape.is_gated, scratch.active[row])
        multiply(scratch.active, weights.down[layer], normed, scratch.last)
        _add(x, normed)


@kernel
def _normalise(x: Floats, weights: Weights, shape: Shape, out: Floats) -> None:
    """Write RMSNorm of each row; its gain and the root of its width are in the matrix that follows."""
    for row in range(len(x)):
        scale = np.float32(1)
        if shape.has_norms:
            squares = np.float64(0)
            for i in range(x.shape[1]):
                squares += np.float64(x[row, i]) * np.float64(x[row, i])
            scale = np.float32(1.0 / np.sqrt(squares + weights.epsilons[0]))
        for i in range(x.shape[1]):
            out[row, i] = x[row, i] * scale


@kernel
def _add(x: Floats, product: Floats) -> None:
    for row in range(len(x)):
        for i in range(x.shape[1]):
            x[row, i] += product[row, i]


# --- products ------------------------------------------------------------------------------------------------------


@kernel
def multiply(x: Floats, weight: Floats, out: Floats, last: Floats) -> None:
    """Write the product of `x` `(rows, in_features)` with a matrix in strips: `(rows, out_features)`.

    Each number is one chain of sums in the order of the input's features, whether four rows go together or one alone.
    `last` is `(4, STRIP)`, for a strip that the features do not fill.
    """
    (rows, in_features), out_features = x.shape, out.shape[1]
    for first in range(0, out_features, STRIP):
        strip, count = weight[first * in_features : (first + STRIP) * in_features], min(STRIP, out_features - first)
        if rows == 1 and count == STRIP:
            multiply_one(x, 0, strip, out, 0, first)
        elif rows == 1:
            multiply_one(x, 0, strip, last, 0, 0)
            for i in range(count):
                out[0, first + i] = last[0, i]
        for row in range(0, rows - 3, 4):
            if count == STRIP:
                multiply_four(x, row, strip, out, row, first)
            else:
                multiply_four(x, row, strip, last, 0, 0)
                for number in range(4):
                    for i in range(count):
                        out[row + number, first + i] = last[number, i]


# --- one row's attention and gate ----------------------------------------------------------------------------------


@kernel
def _attend(
    scratch: Scratch,
    row: int,
    layer: int,
    length: int,
    weights: Weights,
    shape: Shape,
    all_keys: Floats,
    all_values: Floats,
    slot: int,
    later: Floats,
    fetches_later: bool,
) -> None:
    """Turn and store a row's key and value after the first `length`, and write what its heads mix, `(d_query)`.

    `later` are the keys of the next row's first head: what is read next is on its way while what is here is used.
    """
    heads, mixed, keys, values = scratch.heads[row], scratch.mixed[row], all_keys[slot], all_values[slot]
    kv_heads, _, d_head, _ = keys.shape
    for head in range(shape.num_heads + kv_heads):
        if len(weights.head_gains):
            _normalise_head(heads[head], weights.head_gains[layer, head], weights.epsilons[1])
        if len(weights.rotations):
            _rotate(heads[head], weights.rotations[length])
    for head in range(kv_heads):
        for i in range(d_head):
            keys[head, length // TOGETHER, i, length % TOGETHER] = heads[shape.num_heads + head, i]
            values[head, length, i] = heads[shape.num_heads + kv_heads + head, i]
    group = shape.num_heads // kv_heads
    places = -(-(length + 1) // TOGETHER) * TOGETHER
    for head in range(shape.num_heads):
        own_keys, own_values = keys[head // group], values[head // group]
        is_first, is_last = head % group == 0, (head + 1) % group == 0  # of those that share keys
        _share_out(heads, head, own_keys, length + 1, places, scratch.shares, own_values, own_values.size * is_first)
        own = mixed[head * d_head : (head + 1) * d_head]
        if head + 1 < shape.num_heads:
            next_keys = keys[(head + 1) // group]
            _mix(scratch.shares[0], own_values, length + 1, own, next_keys, next_keys.size * is_last)
        else:
            _mix(scratch.shares[0], own_values, length + 1, own, later, later.size * fetches_later)


@kernel
def _normalise_head(x: Floats, gain: Floats, eps: float) -> None:
    squares = np.float64(0)
    for i in range(len(x)):
        squares += np.float64(x[i]) * np.float64(x[i])
    scale = np.float32(1.0 / np.sqrt(squares / len(x) + eps))
    for i in range(len(x)):
        x[i] = x[i] * scale * gain[i]


@kernel
def _rotate(x: Floats, rotation: Floats) -> None:
    """Turn each pair of neighbours by its angle."""
    for pair in range(len(rotation)):
        cos, sin = rotation[pair]
        first, second = x[2 * pair], x[2 * pair + 1]
        x[2 * pair] = first * cos - second * sin
        x[2 * pair + 1] = first * sin + second * cos


@kernel
def _share_out(
    heads: Floats, head: int, keys: Floats, end: int, places: int, rows: Floats, later: Floats, most: int
) -> None:
    """Write the softmax of a head's products with the first `end` keys `(blocks, d_head, TOGETHER)`.

    It is written to the first `places` of `rows` `(1, any)`. As much of `later` is fetched as there is of the keys, but
    at most `most` numbers.
    """
    size = keys.shape[1] * TOGETHER
    for block in range(places // TOGETHER):
        for line in range(block * size, min((block + 1) * size, most), LINE):
            fetch(later, line)
        multiply_keys(heads, head, keys[block], rows, 0, block * TOGETHER)
    shares, scale = rows[0], np.float32(1.0 / np.sqrt(heads.shape[1]))
    greatest = np.float32(-np.inf)
    for place in range(end):
        shares[place] *= scale
        greatest = max(greatest, shares[place])
    for place in range(end):
        shares[place] = _exp(shares[place] - greatest)
    for place in range(end, places):
        shares[place] = np.float32(0)
    part = np.float32(1) / _sum(shares, places)
    for place in range(end):
        shares[place] *= part


@kernel
def _sum(numbers: Floats, count: int) -> np.float32:
    """Return the sum of the first `count` numbers, eight at a time."""
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = np.float32(0)
    for i in range(0, count, 8):
        a0 += numbers[i]
        a1 += numbers[i + 1]
        a2 += numbers[i + 2]
        a3 += numbers[i + 3]
        a4 += numbers[i + 4]
        a5 += numbers[i + 5]
        a6 += numbers[i + 6]
        a7 += numbers[i + 7]
    return ((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7))


@kernel
def _mix(shares: Floats, values: Floats, end: int, mixed: Floats, later: Floats, most: int) -> None:
    """Write the sum of the first `end` values `(max_length, d_head)` by their shares.

    As much of `later` is fetched as there is of the values, but at most `most` numbers.
    """
    whole, size = end // 4 * 4, len(mixed)
    for i in range(size):
        mixed[i] = np.float32(0)
    for place in range(0, whole, 4):
        for line in range(place * size, min((place + 4) * size, most), LINE):
            fetch(later, line)
        v0, v1, v2, v3 = values[place], values[place + 1], values[place + 2], values[place + 3]
        a0, a1, a2, a3 = shares[place], shares[place + 1], shares[place + 2], shares[place + 3]
        for i in range(len(mixed)):
            mixed[i] = a3 * v3[i] + (a2 * v2[i] + (a1 * v1[i] + (a0 * v0[i] + mixed[i])))
    for place in range(whole, end):
        a0, v0 = shares[place], values[place]
        for i in range(len(mixed)):
            mixed[i] = a0 * v0[i] + mixed[i]


@kernel
def _activate(up: Floats, is_gated: int, out: Floats) -> None:
    """Write `silu(gate) * x`, or without a gate `silu(x)`."""
    for i in range(len(out)):
        x = up[i]
        silu = x / (np.float32(1) + _exp(-x))
        out[i] = silu * up[len(out) + i] if is_gated else silu


@kernel
def _exp(x: np.float32) -> np.float32:
    """Return exp to 1e-7 of itself, between exp(-87) and exp(88): 2^n times a polynomial (Cephes, Moshier 1992)."""
    x = min(max(x, np.float32(-87)), np.float32(88))
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    rest = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)  # ln 2 in two parts
    sum_ = np.float32(1.9875691500e-4)
    sum_ = sum_ * rest + np.float32(1.3981999507e-3)
    sum_ = sum_ * rest + np.float32(8.3334519073e-3)
    sum_ = sum_ * rest + np.float32(4.1665795894e-2)
    sum_ = sum_ * rest + np.float32(1.6666665459e-1)
    sum_ = sum_ * rest + np.float32(5.0000001201e-1)
    sum_ = sum_ * (rest * rest) + rest + np.float32(1)
    power = np.int32((np.int32(n) + 127) << 23).view(np.float32)  # the bits of 2^n
    return sum_ * power
