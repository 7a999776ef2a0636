"""Weighted sums of a table's rows: how a CPU decodes one token a sequence.

The product of a matrix with one row is such a sum, `x W^T = sum_j x_j W[:, j]`, and so are both products of attention.
Embedding bags are made for it: PyTorch's kernel, which is FBGEMM's on x86, is compiled for the width of the rows, sums
up in registers and fetches ahead, and so comes nearer to the speed of memory than its matrix product with one row.
Bags are shared out among the threads; here a bag is a strip of a matrix, or a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The kernel sums up 28 vectors of 16 numbers in registers; wider rows it reads in several passes.
_WIDEST, _NARROWEST = 448, 64
KEY_BLOCK = 128
"""Positions of keys that are read at once: the memory of keys is a multiple of it long."""


def are_fast(device: torch.device) -> bool:
    """Tell whether PyTorch has FBGEMM's kernel there: on a CPU, where it was built with it; else it is a plain loop."""
    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


def weighted_sums(table: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Return `sum_k weights[k] * table[rows[k]]` over each bag, `(bags, width)`.

    `rows` and `weights` `(n)` are those of all bags in turn, of which bag i begins at `starts[i]`. The table `(any,
    width)` should be in one piece: else it is copied.
    """
    return torch.embedding_bag(table, rows, starts, False, 0, False, weights)[0]


def _in_turn(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of equally large bags, `(bags, size)`, and where the bags begin, for `weighted_sums`."""
    return rows.reshape(-1), torch.arange(0, rows.numel(), rows.shape[1], dtype=torch.int32)


class RowProduct:
    """The product of a matrix `(out_features, in_features)` with one row, from a copy of the matrix.

    The copy is cut into strips of some hundred output features. Each is transposed, so that it is read from its
    beginning to its end.
    """

    def __init__(self, weight: Tensor) -> None:
        self._out_features, in_features = weight.shape
        self._num_strips, width = _strips(self._out_features)
        padded = weight.new_zeros(self._num_strips * width, in_features)
        padded[: self._out_features] = weight
        self._table = padded.view(self._num_strips, width, in_features).transpose(1, 2).contiguous().view(-1, width)
        rows = torch.arange(len(self._table), dtype=torch.int32)
        self._rows, self._starts = _in_turn(rows.view(self._num_strips, in_features))

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply `(1, in_features)` of the matrix's dtype; return `(1, out_features)`, summed up in fp32."""
        sums = weighted_sums(self._table, self._rows, self._starts, self._once_a_strip(x))
        return sums.view(1, -1)[:, : self._out_features]

    def _once_a_strip(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self._num_strips, dim=1).view(-1)  # quicker than `repeat`


class Int8RowProduct(RowProduct):
    """The same with a matrix of int8, for `x` of fp32; each output feature is multiplied by its scale, fp32."""

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        super().__init__(weight)
        self._scales = scales
        # The kernel's bytes are unsigned, here 128 more; behind each row stand the factor and the bias that undo it.
        undo = torch.tensor([1.0, -128.0]).view(torch.uint8).expand(len(self._table), -1)
        self._table = torch.cat((self._table.view(torch.uint8) ^ 128, undo), dim=1)
        # Looked up once: finding the overload takes as long as a small kernel.
        self._sum = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default

    def __call__(self, x: Tensor) -> Tensor:
        sums: Tensor = self._sum(self._table, self._rows, self._starts, per_sample_weights=self._once_a_strip(x))
        return sums.view(1, -1)[:, : self._out_features] * self._scales


class CacheRows:
    """Which rows of cached keys and values each query head reads, when it attends to one query a sequence.

    For keys `(batch, kv_heads, d_head, blocks * KEY_BLOCK)` and values `(batch, kv_heads, max_length, d_head)`. Heads
    are counted over the batch; consecutive query heads may share a key-value head.
    """

    def __init__(self, keys: Tensor, values: Tensor, num_heads: int) -> None:
        batch_size, kv_heads, max_length, d_head = values.shape
        num_blocks = keys.shape[3] // KEY_BLOCK
        served = torch.arange(batch_size * kv_heads).repeat_interleave(num_heads // kv_heads)
        dims = served.view(-1, 1, 1) * d_head + torch.arange(d_head)
        key_rows = dims * num_blocks + torch.arange(num_blocks).view(-1, 1)
        value_rows = served.view(-1, 1) * max_length + torch.arange(max_length)
        self._key_rows = key_rows.to(torch.int32)  # (batch * num_heads, blocks, d_head)
        self._value_rows = value_rows.to(torch.int32)  # (batch * num_heads, max_length)

    def up_to(self, end: int) -> HeadBags:
        """Return the bags of the first `end` positions, which all layers of a step share."""
        return HeadBags(self._key_rows[:, : -(-end // KEY_BLOCK)], self._value_rows[:, :end])


class HeadBags:
    """Attention of one query a sequence: a bag of values for each query head, one of keys for each of its blocks.

    Args:
        key_rows: the rows of each block of keys, `(batch * num_heads, blocks, d_head)`.
        value_rows: the rows of values, `(batch * num_heads, end)`.
    """

    def __init__(self, key_rows: Tensor, value_rows: Tensor) -> None:
        self._num_heads, self._num_blocks, self._d_head = key_rows.shape
        self._end = value_rows.shape[1]
        self._keys, self._values = _in_turn(key_rows.flatten(0, 1)), _in_turn(value_rows)

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return the products of queries `(batch * num_heads, d_head)` with the keys, `(batch * num_heads, end)`."""
        repeated = query.reshape(-1, 1, self._d_head).expand(-1, self._num_blocks, -1).reshape(-1)
        blocks = weighted_sums(keys.view(-1, KEY_BLOCK), *self._keys, repeated)
        return blocks.view(self._num_heads, -1)[:, : self._end]

    def mix(self, shares: Tensor, values: Tensor) -> Tensor:
        """Return the sums of values by their `shares` `(batch * num_heads, end)`: `(batch * num_heads, d_head)`."""
        return weighted_sums(values.view(-1, self._d_head), *self._values, shares.reshape(-1))


def _strips(out_features: int) -> tuple[int, int]:
    """Return how many strips to cut and their width: whole vectors, 448 at most, and little for the busiest thread."""
    threads = torch.get_num_threads()
    least, most = -(-out_features // _WIDEST), out_features // _NARROWEST
    most = max(least, min(most, 2 * max(least, threads)))
    widths = {count: -(-out_features // (16 * count)) * 16 for count in range(least, most + 1)}
    count = min(widths, key=lambda each: -(-each // threads) * widths[each])
    return count, widths[count]
