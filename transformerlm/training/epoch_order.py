"""The order of the data in which each window comes once an epoch: a function of seed and step, without a table.

The windows' numbers are sent to their places by arithmetic, a Feistel network on pairs of numbers with cycle walking
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, methods 2 and 3). Its rounds are keyed with a
hash, the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA
2014).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

# Four make it look random to whoever does not know the key (Luby and Rackoff 1988); small sizes need more.
NUM_ROUNDS = 6

Words = npt.NDArray[np.uint64]


def epoch_starts(
    num_tokens: int, *, batch_size: int, context_length: int, seed: int, step: int
) -> npt.NDArray[np.int64]:
    """Return the first positions of the windows of batch (seed, step), of which each comes once an epoch.

    The data is cut into windows whose targets do not overlap. The tokens left over, fewer than context_length, are
    before the first window or after the last one: how many are before it changes with each epoch. Within an epoch the
    windows come in the order of a permutation keyed with (seed, epoch); a batch may end one epoch and begin the next.
    The data must hold a window, context_length + 1 tokens. Raises ValueError for a step below 1, the first.
    """
    if seed < 0 or step < 1:
        raise ValueError(f'data: order "epoch" needs a seed of at least 0 and a step of at least 1, got {seed}, {step}')
    num_windows, num_left_over = divmod(num_tokens - 1, context_length)
    assert num_windows >= 1, (num_tokens, context_length)
    epochs, places = np.divmod((step - 1) * batch_size + np.arange(batch_size, dtype=np.int64), num_windows)
    key = hashed(seed, epochs.astype(np.uint64))  # (batch_size,)
    num_before = (hashed(key) % np.uint64(num_left_over + 1)).astype(np.int64)
    return num_before + permuted(places, size=num_windows, key=key) * context_length


def permuted(numbers: npt.NDArray[np.int64], *, size: int | npt.NDArray[np.int64], key: Words) -> npt.NDArray[np.int64]:
    """Return the numbers that a permutation of `range(size)` sends these `numbers` to, int64, in their shape.

    `key`, one word or one for each number, chooses the permutation; `size` may be one for each number, too.
    """
    found = numbers.astype(np.uint64)
    key, sizes = np.broadcast_to(key, found.shape), np.broadcast_to(np.asarray(size, dtype=np.uint64), found.shape)
    side = _sides(sizes)  # the network permutes side * side numbers, of which `size` are ours
    outside = np.ones(found.shape, dtype=np.bool_)
    while outside.any():  # a number that is not ours walks on along its cycle, which leads back to ours
        found[outside] = _network(found[outside], side=side[outside], key=key[outside])
        outside = found >= sizes
    return found.astype(np.int64)


def _sides(sizes: Words) -> Words:
    """Return the least number whose square is at least the size, of each."""
    found, places = np.unique(sizes, return_inverse=True)
    sides = np.array([math.isqrt(size - 1) + 1 for size in found.tolist()], dtype=np.uint64)
    return sides[places].reshape(sizes.shape)


def _network(numbers: Words, *, side: Words, key: Words) -> Words:
    """Permute `range(side * side)`: a number is a pair, and in each round one half is moved by a hash of the other."""
    left, right = numbers // side, numbers % side
    for number in range(NUM_ROUNDS):
        moved_by = hashed(key + np.uint64(number), right) >> np.uint64(1)  # so that the sum stays below 2^64
        left, right = right, (left + moved_by) % side
    return left * side + right


def hashed(*words: Words | int) -> Words:
    """Return a 64-bit hash of words, arrays of one shape or numbers below 2^64."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = (state ^ np.asarray(word, dtype=np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state
