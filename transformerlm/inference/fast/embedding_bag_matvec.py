"""Weighted sums of a table's rows: how a CPU decodes one token a sequence.

A matrix times one vector is such a sum, `x W^T = sum_j x_j W[:, j]`, and so are both products of attention. Embedding
bags are made for such sums: PyTorch's kernel, which is FBGEMM's on x86, is compiled for the width of the rows, sums in
registers and fetches ahead, and so comes nearer to the speed of memory than PyTorch's product with one row. The threads
share out the bags; here a bag is a strip of a matrix, or a head.

Twin of `EmbeddingBagMatvec`: `transformerlm.models.layers.Linear`
Test: tests/inference/fast/test_embedding_bag_matvec.py
Pays: all matrices of a step take 1.86 ms instead of 4.6 as `F.linear`, in fp32 (docs/sampling.md)
Part of: decoder, cache, packed_linear
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Numbers = np.ndarray[Any, np.dtype[np.int32]]

# The kernel sums 28 vectors of 16 numbers in registers; it reads wider rows in several passes.
_WIDEST, _NARROWEST = 448, 64
_VECTOR = 16
KEY_BLOCK = 128
"""How many positions of keys are read at once: the memory of keys is a multiple of it long."""


def has_fast_kernel(device: torch.device) -> bool:
    """Return whether PyTorch has FBGEMM's kernel, on a CPU and if it was built with it; else it has a plain loop."""
    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


def weighted_sums(table: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Return `sum_k weights[k] * table[rows[k]]` over each bag, `(bags, width)`.

    `rows` and `weights` `(n)` are those of all bags, one bag after the other; bag i begins at `starts[i]`. The table
    `(any, width)` should be contiguous: else it is copied.
    """
    return torch.embedding_bag(table, rows, starts, False, 0, False, weights)[0]


class EmbeddingBagMatvec:
    """A matrix `(out_features, in_features)` times one vector, from a copy of the matrix.

    The copy is cut into strips of some hundred output features. Each strip is transposed, so that the kernel reads it
    from its beginning to its end:

        W (6 x 2) in 2 strips:  rows 0-2 of W -> table rows 0, 1 (column j of the strip is table row j)
                                rows 3-5 of W -> table rows 2, 3
        bags:                   [0, 1] and [2, 3], each weighted with (x_0, x_1)
    """

    def __init__(self, weight: Tensor) -> None:
        self._out_features, in_features = weight.shape
        self._num_strips, width = _choose_strips(self._out_features)
        padded = weight.new_zeros(self._num_strips * width, in_features)  # the last strip is filled up with zeros
        padded[: self._out_features] = weight
        strips = padded.view(self._num_strips, width, in_features).transpose(1, 2)  # (strips, in_features, width)
        self._table = strips.contiguous().view(-1, width)  # (strips * in_features, width)
        rows = torch.arange(len(self._table), dtype=torch.int32)
        self._rows, self._starts = _flatten_bags(rows.view(self._num_strips, in_features))

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply `(1, in_features)` of the matrix's dtype; return `(1, out_features)`, summed in fp32."""
        sums = weighted_sums(self._table, self._rows, self._starts, self._repeat_for_strips(x))  # (strips, width)
        return sums.view(1, -1)[:, : self._out_features]

    def _repeat_for_strips(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self._num_strips, dim=1).view(-1)  # (strips * in_features); faster than `repeat`


class Int8EmbeddingBagMatvec(EmbeddingBagMatvec):
    """The same with a matrix of int8, for `x` of fp32. Each group of input features has its own bags and scales.

    Args:
        levels: the matrix, int8, `(groups, out_features, size)`.
        scales: by what a sum over a group is multiplied, fp32, `(groups, out_features)`.
    """

    def __init__(self, levels: Tensor, scales: Tensor) -> None:
        super().__init__(levels.transpose(0, 1).flatten(1))
        groups, _, size = levels.shape
        self._starts = torch.arange(0, len(self._table), size, dtype=torch.int32)  # (strips * groups)
        padded = F.pad(scales, (0, self._num_strips * self._table.shape[1] - self._out_features))
        of_strips = padded.view(groups, self._num_strips, -1).transpose(0, 1)
        self._scales = of_strips.contiguous()  # (strips, groups, width)
        self._has_groups = groups > 1
        # The kernel's bytes are unsigned, so each is stored 128 higher: flipping the top bit adds 128. After the bytes
        # of a row come the factor and the bias by which the kernel reads them, as two fp32 numbers: 1 and -128.
        undo = torch.tensor([1.0, -128.0]).view(torch.uint8).expand(len(self._table), -1)  # (rows, 8 bytes)
        self._table = torch.cat((self._table.view(torch.uint8) ^ 128, undo), dim=1)
        # Looked up once: finding the overload takes as long as a small kernel.
        self._sum = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default

    def __call__(self, x: Tensor) -> Tensor:
        sums: Tensor = self._sum(self._table, self._rows, self._starts, per_sample_weights=self._repeat_for_strips(x))
        scaled = sums.view_as(self._scales).mul_(self._scales)
        if self._has_groups:
            scaled = scaled.sum(1)
        return scaled.view(1, -1)[:, : self._out_features]


class SlotBags:
    """Attention of one query for each of some rows of a cache: each head reads up to its own row's length.

    Row i of the step has the memory `slots[i]` and reads its first `lengths[i]` positions, of keys and values as in
    `AttentionRows`. No number depends on the other rows: a bag is summed alone, and what a longer neighbour adds to the
    width of the softmax is zeros after the row's own numbers.
    """

    def __init__(self, keys: Tensor, values: Tensor, num_heads: int, *, slots: list[int], lengths: list[int]) -> None:
        _, kv_heads, max_length, self._d_head = values.shape
        # Small whole numbers, anew each step: NumPy takes a quarter of PyTorch's time for them.
        heads = np.arange(num_heads, dtype=np.int32) // (num_heads // kv_heads)
        # The key-value head that each query head reads, counted over all slots: (rows, num_heads, 1)
        served = (np.array(slots, dtype=np.int32).reshape(-1, 1) * kv_heads + heads)[:, :, np.newaxis]
        ends = np.array(lengths, dtype=np.int32)  # (rows)
        self._num_bags, self._shape = served.size, (len(slots), num_heads, -1)
        self._set_keys(served, ends, keys.shape[3] // KEY_BLOCK)
        self._set_values(served, ends, max_length)

    def _set_keys(self, served: Numbers, ends: Numbers, num_blocks: int) -> None:
        blocks = np.arange(-(-int(ends.max()) // KEY_BLOCK), dtype=np.int32)
        self._width = len(blocks) * KEY_BLOCK
        has_block = np.broadcast_to(
            blocks * KEY_BLOCK < ends[:, np.newaxis, np.newaxis], (*served.shape[:2], len(blocks))
        )
        # Where in the rectangle of all blocks each bag's numbers go.
        places = has_block.reshape(-1).nonzero()[0]  # (bags)
        self._places = None if len(places) == has_block.size else torch.from_numpy(places)
        firsts = (served * (self._d_head * num_blocks) + blocks).reshape(-1)[places]  # (bags)
        self._owners = torch.from_numpy(places // len(blocks))  # (bags): whose query weights the bag's rows
        steps = np.arange(self._d_head, dtype=np.int32) * num_blocks
        self._keys = _flatten_bags(torch.from_numpy(firsts[:, np.newaxis] + steps))
        hidden = np.arange(self._width, dtype=np.int32) >= ends[:, np.newaxis]
        self._hidden = torch.from_numpy(hidden).unsqueeze(1)  # (rows, 1, width)

    def _set_values(self, served: Numbers, ends: Numbers, max_length: int) -> None:
        sizes = ends.repeat(served.shape[1])  # (rows * num_heads)
        starts = sizes.cumsum(dtype=np.int32) - sizes
        each = np.arange(sizes.sum(), dtype=np.int32)
        # Number k of a bag from s on reads the (k - s)-th row of its values; its share is at bag * width + k - s.
        rows = each + (served.reshape(-1) * max_length - starts).repeat(sizes)
        self._values = torch.from_numpy(rows), torch.from_numpy(starts)
        bags = np.arange(self._num_bags, dtype=np.int32) * self._width
        self._shares = torch.from_numpy(each + (bags - starts).repeat(sizes))

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return what each head mixes for scaled queries `(rows, num_heads, d_head)`: `(rows * num_heads, d_head)`."""
        weights = query.reshape(-1, self._d_head).index_select(0, self._owners).view(-1)
        scores = weighted_sums(keys.view(-1, KEY_BLOCK), *self._keys, weights)  # (bags, KEY_BLOCK)
        if self._places is not None:
            scores = scores.new_empty(self._num_bags * self._width // KEY_BLOCK, KEY_BLOCK).index_copy_(
                0, self._places, scores
            )
        # Filled, not added to: what is in the memory after a row's end may be any number.
        scores.view(self._shape).masked_fill_(self._hidden, -torch.inf)
        shares = torch.softmax(scores.view(self._num_bags, self._width), dim=-1)
        return weighted_sums(
            values.view(-1, self._d_head), *self._values, shares.view(-1).index_select(0, self._shares)
        )


class AttentionRows:
    """Which rows of the cached keys and values each query head reads, with one query a sequence.

    For keys `(batch, kv_heads, d_head, blocks * KEY_BLOCK)` and values `(batch, kv_heads, max_length, d_head)`. Heads
    are counted over the batch; consecutive query heads may share a key-value head. In the table of keys a row is one
    dimension of one block of one head, KEY_BLOCK positions wide; in that of values it is one position of one head.
    """

    def __init__(self, keys: Tensor, values: Tensor, num_heads: int) -> None:
        batch_size, kv_heads, max_length, d_head = values.shape
        num_blocks = keys.shape[3] // KEY_BLOCK
        # The key-value head that each query head reads: (batch * num_heads)
        served = torch.arange(batch_size * kv_heads).repeat_interleave(num_heads // kv_heads)
        dims = served.view(-1, 1, 1) * d_head + torch.arange(d_head)  # (batch * num_heads, 1, d_head)
        key_rows = dims * num_blocks + torch.arange(num_blocks).view(-1, 1)
        value_rows = served.view(-1, 1) * max_length + torch.arange(max_length)
        self._key_rows = key_rows.to(torch.int32)  # (batch * num_heads, blocks, d_head)
        self._value_rows = value_rows.to(torch.int32)  # (batch * num_heads, max_length)

    def up_to(self, end: int) -> AttentionBags:
        """Return the bags of the first `end` positions, which all layers of a step share."""
        return AttentionBags(self._key_rows[:, : -(-end // KEY_BLOCK)], self._value_rows[:, :end])


class AttentionBags:
    """Attention of one query a sequence: a bag of values for each query head, one of keys for each of its blocks.

    Args:
        key_rows: the rows of each block of keys, `(batch * num_heads, blocks, d_head)`.
        value_rows: the rows of values, `(batch * num_heads, end)`.
    """

    def __init__(self, key_rows: Tensor, value_rows: Tensor) -> None:
        self._num_heads, self._num_blocks, self._d_head = key_rows.shape
        self._end = value_rows.shape[1]
        self._keys, self._values = _flatten_bags(key_rows.flatten(0, 1)), _flatten_bags(value_rows)

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return the products of queries `(batch * num_heads, d_head)` with the keys, `(batch * num_heads, end)`."""
        # A score is sum_d query[d] * keys[d, position], so the query weights the rows, once in each block.
        repeated = query.reshape(-1, 1, self._d_head).expand(-1, self._num_blocks, -1).reshape(-1)
        blocks = weighted_sums(keys.view(-1, KEY_BLOCK), *self._keys, repeated)  # (heads * blocks, KEY_BLOCK)
        return blocks.view(self._num_heads, -1)[:, : self._end]

    def mix(self, shares: Tensor, values: Tensor) -> Tensor:
        """Return the sums of values by their `shares` `(batch * num_heads, end)`: `(batch * num_heads, d_head)`."""
        return weighted_sums(values.view(-1, self._d_head), *self._values, shares.reshape(-1))


def _flatten_bags(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of equally large bags `(bags, size)` in one line, and where each bag begins in it."""
    return rows.reshape(-1), torch.arange(0, rows.numel(), rows.shape[1], dtype=torch.int32)


def _choose_strips(out_features: int) -> tuple[int, int]:
    """Return the number of strips and their width: whole vectors, 448 at most, and little for the busiest thread."""
    threads = torch.get_num_threads()
    least, most = -(-out_features // _WIDEST), out_features // _NARROWEST
    most = max(least, min(most, 2 * max(least, threads)))
    widths = {count: -(-out_features // (_VECTOR * count)) * _VECTOR for count in range(least, most + 1)}
    # The busiest thread takes ceil(count / threads) strips.
    count = min(widths, key=lambda each: -(-each // threads) * widths[each])
    return count, widths[count]
