"""Drawing an id from a row's weights as compiled loops, a few passes over the row and no sort of it.

The plain form compares a share of the sum with cumulative sums, in fp64 and in one order. Here the sums are taken in
another order, by blocks or by size. They differ by far less than `_MARGIN` of the whole. Where the share lies
nearer than that to a border, the answer is `UNSURE`, and the caller goes the plain way; so the ids are the same.

Part of: choice
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from transformerlm.inference.fast.jit import kernel

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

UNSURE = -2
_MARGIN = 1e-9  # the sum of 100,000 numbers in fp64 is good to 1e-11
_BLOCK = 128
# A weight's bucket is its exponent and the first bits of its fraction: 64 between a power of two and the next.
_BUCKET_BITS = 17
_BITS_OF_ONE = 0x3F800000


@kernel
def shift(logits: Floats, temperatures: Floats, out: Floats, tops: Floats) -> None:
    """Write logits minus the greatest of their row, divided by its temperature, and the greatest."""
    for row in range(len(logits)):
        own, shifted, temperature = logits[row], out[row], temperatures[row]
        top = tops[row] = _greatest(own)
        for i in range(len(own)):
            shifted[i] = (own[i] - top) / temperature


@kernel
def _greatest(x: Floats) -> np.float32:
    """Return the greatest number; a NaN is passed over."""
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = np.float32(-np.inf)
    whole = len(x) // 8 * 8
    for i in range(0, whole, 8):
        a0 = x[i] if x[i] > a0 else a0
        a1 = x[i + 1] if x[i + 1] > a1 else a1
        a2 = x[i + 2] if x[i + 2] > a2 else a2
        a3 = x[i + 3] if x[i + 3] > a3 else a3
        a4 = x[i + 4] if x[i + 4] > a4 else a4
        a5 = x[i + 5] if x[i + 5] > a5 else a5
        a6 = x[i + 6] if x[i + 6] > a6 else a6
        a7 = x[i + 7] if x[i + 7] > a7 else a7
    for i in range(whole, len(x)):
        a0 = x[i] if x[i] > a0 else a0
    return max(max(max(a0, a1), max(a2, a3)), max(max(a4, a5), max(a6, a7)))


class Scratch(NamedTuple):
    """Memory for what is computed on the way, for rows of some length; `make_scratch` makes it."""

    large: Floats
    places: NDArray[np.int32]
    here: Floats
    sums: Doubles


def make_scratch(vocab_size: int) -> Scratch:
    """Return memory for rows of so many ids."""
    one_more = vocab_size + 1  # the next place is written before it is known whether it counts
    return Scratch(
        large=np.empty(one_more, np.float32),
        places=np.empty(one_more, np.int32),
        here=np.empty(one_more, np.float32),
        sums=np.empty(max(-(-vocab_size // _BLOCK), (_BITS_OF_ONE >> _BUCKET_BITS) + 1), np.float64),
    )


@kernel
def draw_from_all(weights: Floats, uniforms: Doubles, ids: Ints, scratch: Scratch) -> None:
    """Write the first id of each row at which the sum of the weights passes its share of the whole, or `UNSURE`."""
    vocab_size = weights.shape[1]
    sums = scratch.sums[: -(-vocab_size // _BLOCK)]
    for row in range(len(weights)):
        own, total = weights[row], 0.0
        for block in range(len(sums)):
            sums[block] = _sum(own[block * _BLOCK : (block + 1) * _BLOCK])
            total += sums[block]
        target, before, block = uniforms[row] * total, 0.0, 0
        while block < len(sums) - 1 and before + sums[block] <= target:
            before += sums[block]
            block += 1
        ids[row] = UNSURE if total == total else -1  # a NaN
        for i in range(block * _BLOCK, min((block + 1) * _BLOCK, vocab_size)):
            after = before + np.float64(own[i])
            if after > target:
                if target - before > _MARGIN * total and after - target > _MARGIN * total:
                    ids[row] = i
                break
            before = after


@kernel
def _sum(x: Floats) -> float:
    """Return the sum in fp64, a vector at a time."""
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = 0.0
    whole = len(x) // 8 * 8
    for i in range(0, whole, 8):
        a0 += np.float64(x[i])
        a1 += np.float64(x[i + 1])
        a2 += np.float64(x[i + 2])
        a3 += np.float64(x[i + 3])
        a4 += np.float64(x[i + 4])
        a5 += np.float64(x[i + 5])
        a6 += np.float64(x[i + 6])
        a7 += np.float64(x[i + 7])
    for i in range(whole, len(x)):
        a0 += np.float64(x[i])
    return ((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7))


@kernel
def draw_from_top_p(
    weights: Floats, totals: Doubles, top_p: Doubles, uniforms: Doubles, ids: Ints, scratch: Scratch
) -> None:
    """The same from the fewest ids, likely ones first and of equals the lower, that hold `top_p` of the `totals`."""
    vocab_size = weights.shape[1]
    large, places = scratch.large, scratch.places
    for row in range(len(weights)):
        ids[row] = UNSURE if totals[row] == totals[row] else -1  # a NaN
        margin, border = _MARGIN * totals[row], top_p[row] * totals[row]
        if not 0.0 < totals[row] < np.inf:
            continue
        # The ids below 1/n of what top-p leaves out hold less than that; most hold much less.
        low = np.float32(max(2.0 * (1.0 - top_p[row]) * totals[row] / vocab_size, 1e-30))
        count = 0
        own = weights[row]
        for i in range(vocab_size):  # no branch: which are larger cannot be foreseen
            large[count], places[count] = own[i], i
            count += own[i] > low
        if count == 0:
            continue
        sums = scratch.sums[: _bucket(low) + 1]
        for bucket in range(len(sums)):
            sums[bucket] = 0.0
        for i in range(count):
            sums[_bucket(large[i])] += np.float64(large[i])
        # What the ids before the border hold, the one at which it is reached included.
        _, before, value = _pass(large[:count], sums, border, margin, scratch.here)
        if value < 0.0:
            continue
        kept = before + np.float64(value)
        number, before, value = _pass(large[:count], sums, uniforms[row] * kept, margin, scratch.here)
        if value < 0.0:
            continue
        for i in range(count):
            if large[i] == value:
                number -= 1
                if number < 0:
                    ids[row] = places[i]
                    break


@kernel
def _bucket(weight: np.float32) -> np.int64:
    """Return where a weight of at most 1 goes: great ones first."""
    return max(0, (_BITS_OF_ONE - np.int64(np.float32(weight).view(np.int32))) >> _BUCKET_BITS)


@kernel
def _pass(large: Floats, sums: Doubles, target: float, margin: float, here: Floats) -> tuple[int, float, float]:
    """Return which weight is the first, in descending order, with which their sum passes `target`.

    The result is how many equal ones are before it, the sum before it, and the weight; -1 where that is not sure.
    """
    before, bucket = 0.0, 0
    while bucket < len(sums) and before + sums[bucket] <= target:
        before += sums[bucket]
        bucket += 1
    if bucket == len(sums):
        return 0, before, -1.0
    count = 0
    for i in range(len(large)):
        here[count] = large[i]
        count += _bucket(large[i]) == bucket
    _sort(here, count)
    equals = 0
    for i in range(count):
        equals = equals + 1 if i > 0 and here[i] == here[i - 1] else 0
        after = before + np.float64(here[i])
        if after > target:
            is_sure = target - before > margin and after - target > margin
            return equals, before, np.float64(here[i]) if is_sure else -1.0
        before = after
    return 0, before, -1.0


@kernel
def _sort(numbers: Floats, count: int) -> None:
    """Sort the first `count` numbers, great ones first (Shell 1959; each gap is 4/9 of the one before, Tokuda 1992)."""
    gap = 1
    while gap * 9 // 4 < count:
        gap = gap * 9 // 4 + 1
    while gap > 0:
        for i in range(gap, count):
            number, place = numbers[i], i
            while place >= gap and numbers[place - gap] < number:
                numbers[place] = numbers[place - gap]
                place -= gap
            numbers[place] = number
        gap = 0 if gap == 1 else max(1, gap * 4 // 9)
