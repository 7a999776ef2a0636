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

from transformerlm.inference.fast.jit import LANES, LINE, VECTORS, fetch, kernel, multiply_block

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

STRIP = LANES * VECTORS
TOGETHER = 16
"""So many keys lie together, one feature after the other."""


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


class Shape(NamedTuple):
    """The sizes that the arrays do not tell."""

    num_heads: int
    d_ff: int
    vocab_size: int
    is_gated: bool
    has_norms: bool
    norm_floor: float
    """`sqrt(d_model * eps)`"""
    norm_eps: float
    """Of the norms of queries and keys."""


def strips(weight: Floats) -> Floats:
    """Return a matrix `(out_features, in_features)` as `multiply` reads it, `(size)`."""
    padded = np.zeros((-(-len(weight) // STRIP) * STRIP, weight.shape[1]), np.float32)
    padded[: len(weight)] = weight
    return padded.reshape(-1, STRIP, weight.shape[1]).transpose(0, 2, 1).reshape(-1)


@kernel
def step(
    ids: Ints,
    slots: Ints,
    lengths: Ints,
    weights: Weights,
    shape: Shape,
    keys: Floats,
    values: Floats,
    x: Floats,
    logits: Floats,
) -> None:
    """Read ids in slots, each after so many others; write the vectors and the logits after them.

    An id reads what those before it wrote, so several of one slot may be read, in their order. `keys` are `(num_layers,
    slots, kv_heads, max_length / TOGETHER, d_head, TOGETHER)`, so that those of a text lie one after the other, and
    `values` `(num_layers, slots, kv_heads, max_length, d_head)`; `x` is `(rows, d_model)`, and `logits` are `(rows,
    vocab_size)`, or have no rows where none are asked for.
    """
    embed(ids, weights, x)
    layers(0, len(weights.qkv), slots, lengths, weights, shape, keys, values, x)
    if len(logits):
        head(x, weights, shape, logits)


@kernel
def embed(ids: Ints, weights: Weights, x: Floats) -> None:
    """Write the vectors `(rows, d_model)` of ids, and zeros after them."""
    x[:] = np.float32(0)
    for row in range(len(ids)):
        x[row] = weights.embedding[ids[row]]


@kernel
def layers(
    first: int,
    end: int,
    slots: Ints,
    lengths: Ints,
    weights: Weights,
    shape: Shape,
    keys: Floats,
    values: Floats,
    x: Floats,
) -> None:
    """Let vectors `(rows, d_model)` pass the layers from `first` to `end`."""
    count, (rows, d_model) = len(slots), x.shape
    d_query, d_kv = shape.num_heads * keys.shape[4], keys.shape[2] * keys.shape[4]
    normed = np.empty((rows, d_model), np.float32)
    qkv = np.empty((rows, d_query + 2 * d_kv), np.float32)
    mixed = np.zeros((rows, d_query), np.float32)
    up = np.empty((rows, shape.d_ff * (2 if shape.is_gated else 1)), np.float32)
    active = np.empty((rows, shape.d_ff), np.float32)
    for layer in range(first, end):
        _normalise(x, shape, normed)
        multiply(normed, weights.qkv[layer], qkv)
        for row in range(count):
            following = slots[min(row + 1, count - 1)]
            later = keys[layer, following, 0, : keys.shape[3] * (following != slots[row])]  # its own were read just now
            _attend(
                qkv[row], layer, lengths[row], weights, shape, keys[layer], values[layer], slots[row], later, mixed[row]
            )
        multiply(mixed, weights.output[layer], normed)
        _add(x, normed)
        _normalise(x, shape, normed)
        multiply(normed, weights.up[layer], up)
        for row in range(rows):
            _activate(up[row], shape.is_gated, active[row])
        multiply(active, weights.down[layer], normed)
        _add(x, normed)


@kernel
def head(x: Floats, weights: Weights, shape: Shape, logits: Floats) -> None:
    """Write the logits `(rows, vocab_size)` of vectors `(rows, d_model)` after the last layer."""
    normed = np.empty(x.shape, np.float32)
    _normalise(x, shape, normed)
    multiply(normed, weights.head, logits)


@kernel
def _normalise(x: Floats, shape: Shape, out: Floats) -> None:
    """Write RMSNorm of each row; its gain and the root of its width are in the matrix that follows."""
    for row in range(len(x)):
        scale = np.float32(1)
        if shape.has_norms:
            squares = np.float64(0)
            for i in range(x.shape[1]):
                squares += np.float64(x[row, i]) * np.float64(x[row, i])
            scale = np.float32(1.0 / np.sqrt(squares + shape.norm_floor * shape.norm_floor))
        for i in range(x.shape[1]):
            out[row, i] = x[row, i] * scale


@kernel
def _add(x: Floats, product: Floats) -> None:
    for row in range(len(x)):
        for i in range(x.shape[1]):
            x[row, i] += product[row, i]


# --- products ------------------------------------------------------------------------------------------------------


_multiply_one, _multiply_four = multiply_block(1), multiply_block(4)
_multiply_keys = multiply_block(1, LANES, TOGETHER // LANES)


@kernel
def multiply(x: Floats, weight: Floats, out: Floats) -> None:
    """Write the product of `x` `(rows, in_features)` with a matrix in strips: `(rows, out_features)`.

    Each number is one chain of sums in the order of the input's features, whether four rows go together or one alone.
    """
    (rows, in_features), out_features = x.shape, out.shape[1]
    last = np.empty((4, STRIP), np.float32)  # of a strip that the features do not fill
    for first in range(0, out_features, STRIP):
        strip, count = weight[first * in_features : (first + STRIP) * in_features], min(STRIP, out_features - first)
        if rows == 1 and count == STRIP:
            _multiply_one(x, 0, strip, out, 0, first)
        elif rows == 1:
            _multiply_one(x, 0, strip, last, 0, 0)
            out[0, first:] = last[0, :count]
        for row in range(0, rows - 3, 4):
            if count == STRIP:
                _multiply_four(x, row, strip, out, row, first)
            else:
                _multiply_four(x, row, strip, last, 0, 0)
                out[row : row + 4, first:] = last[:, :count]


# --- one row's attention and gate ----------------------------------------------------------------------------------


@kernel
def _attend(
    qkv: Floats,
    layer: int,
    length: int,
    weights: Weights,
    shape: Shape,
    all_keys: Floats,
    all_values: Floats,
    slot: int,
    later: Floats,
    mixed: Floats,
) -> None:
    """Turn and store a row's key and value after the first `length`, and write what its heads mix, `(d_query)`.

    `later` are the keys of the next row's first head: what is read next is on its way while what is here is used.
    """
    keys, values = all_keys[slot], all_values[slot]
    kv_heads, _, d_head, _ = keys.shape
    heads = qkv.reshape(-1, d_head)  # (heads of queries, keys, values; d_head)
    for head in range(shape.num_heads + kv_heads):
        if len(weights.head_gains):
            _normalise_head(heads[head], weights.head_gains[layer, head], shape.norm_eps)
        if len(weights.rotations):
            _rotate(heads[head], weights.rotations[length])
    for head in range(kv_heads):
        for i in range(d_head):
            keys[head, length // TOGETHER, i, length % TOGETHER] = heads[shape.num_heads + head, i]
        values[head, length] = heads[shape.num_heads + kv_heads + head]
    group = shape.num_heads // kv_heads
    shares = np.empty((1, -(-(length + 1) // TOGETHER) * TOGETHER), np.float32)
    for head in range(shape.num_heads):
        own_keys, own_values = keys[head // group], values[head // group]
        is_first, is_last = head % group == 0, (head + 1) % group == 0  # of those that share keys
        next_keys = keys[(head + 1) // group] if head + 1 < shape.num_heads else later
        _share_out(heads, head, own_keys, length + 1, shares, own_values.reshape(-1)[: own_values.size * is_first])
        _mix(
            shares[0],
            own_values,
            length + 1,
            mixed[head * d_head : (head + 1) * d_head],
            next_keys.reshape(-1)[: next_keys.size * is_last],
        )


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
def _share_out(heads: Floats, head: int, keys: Floats, end: int, rows: Floats, later: Floats) -> None:
    """Write the softmax of a head's products with the first `end` keys `(blocks, d_head, TOGETHER)`, `(1, places)`.

    As much of `later` is fetched as there is of the keys, if it is not empty.
    """
    size = keys.shape[1] * TOGETHER
    for block in range(rows.shape[1] // TOGETHER):
        for line in range(block * size, min((block + 1) * size, len(later)), LINE):
            fetch(later, line)
        _multiply_keys(heads, head, keys[block], rows, 0, block * TOGETHER)
    shares, scale = rows[0], np.float32(1.0 / np.sqrt(heads.shape[1]))
    greatest = np.float32(-np.inf)
    for place in range(end):
        shares[place] *= scale
        greatest = max(greatest, shares[place])
    for place in range(end):
        shares[place] = _exp(shares[place] - greatest)
    shares[end:] = np.float32(0)
    lanes = np.zeros(TOGETHER, np.float32)
    for first in range(0, len(shares), TOGETHER):
        for lane in range(TOGETHER):
            lanes[lane] += shares[first + lane]
    total = np.float32(0)
    for lane in range(TOGETHER):
        total += lanes[lane]
    part = np.float32(1) / total
    for place in range(end):
        shares[place] *= part


@kernel
def _mix(shares: Floats, values: Floats, end: int, mixed: Floats, later: Floats) -> None:
    """Write the sum of the first `end` values `(max_length, d_head)` by their shares.

    As much of `later` is fetched as there is of the values, if it is not empty.
    """
    mixed[:] = np.float32(0)
    whole, size = end // 4 * 4, len(mixed)
    for place in range(0, whole, 4):
        for line in range(place * size, min((place + 4) * size, len(later)), LINE):
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
def _activate(up: Floats, is_gated: bool, out: Floats) -> None:
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
