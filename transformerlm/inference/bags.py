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


def weighted_sums(table: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Return `sum_k weights[k] * table[rows[k]]` over each bag, `(bags, width)`.

    `rows` and `weights` `(n)` are those of all bags in turn, of which bag i begins at `starts[i]`. The table `(any,
    width)` may be the first columns of a wider one.
    """
    return torch.embedding_bag(table, rows, starts, False, 0, False, weights)[0]


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
        self._rows = torch.arange(len(self._table), dtype=torch.int32)
        self._starts = torch.arange(0, len(self._table), in_features, dtype=torch.int32)

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply `(1, in_features)` of the matrix's dtype; return `(1, out_features)`, summed up in fp32."""
        sums = weighted_sums(self._table, self._rows, self._starts, self._weights(x))
        return sums.view(1, -1)[:, : self._out_features]

    def _weights(self, x: Tensor) -> Tensor:
        return x.expand(self._num_strips, -1).reshape(-1)


class Int8RowProduct(RowProduct):
    """The same with a matrix of int8, for `x` of fp32; each output feature is multiplied by its scale, fp32."""

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        super().__init__(weight)
        self._scales = scales
        # The kernel's bytes are unsigned; behind each row stand the factor and the bias that make them numbers again.
        levels = (self._table.to(torch.int16) + 128).to(torch.uint8)
        numbers = torch.tensor([1.0, -128.0]).view(torch.uint8).expand(len(levels), -1)
        self._table = torch.cat((levels, numbers), dim=1)
        # Looked up once: finding the overload takes as long as a small kernel.
        self._sum = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default

    def __call__(self, x: Tensor) -> Tensor:
        sums: Tensor = self._sum(self._table, self._rows, self._starts, per_sample_weights=self._weights(x))
        return sums.view(1, -1)[:, : self._out_features] * self._scales


class HeadBags:
    """Attention of one query a sequence over its cached keys and values: a bag for each query head.

    Keys are `(batch, kv_heads, d_head, max_length)`, values `(batch, kv_heads, max_length, d_head)`; several query
    heads may share a key-value head.
    """

    def __init__(self, keys: Tensor, num_heads: int) -> None:
        batch_size, kv_heads, d_head, self._max_length = keys.shape
        served = torch.arange(batch_size * kv_heads, dtype=torch.int32).repeat_interleave(num_heads // kv_heads)
        self._bags = torch.arange(len(served), dtype=torch.int32)
        self._key_rows = (served.unsqueeze(1) * d_head + torch.arange(d_head, dtype=torch.int32)).view(-1)
        self._key_starts = self._bags * d_head
        self._value_rows = served.unsqueeze(1) * self._max_length + torch.arange(self._max_length, dtype=torch.int32)
        self._end, self._rows, self._starts = 0, self._value_rows, self._bags

    def scores(self, query: Tensor, keys: Tensor, end: int) -> Tensor:
        """Return the products of queries `(batch * num_heads, d_head)` with the first `end` keys."""
        table = keys.view(-1, self._max_length)[:, : self._width(end)]
        return weighted_sums(table, self._key_rows, self._key_starts, query.reshape(-1))[:, :end]

    def mix(self, shares: Tensor, values: Tensor) -> Tensor:
        """Return the sums `(batch * num_heads, d_head)` of the first values by their `shares` `(..., end)`."""
        if self._end != shares.shape[-1]:  # The layers of a step have the same.
            self._end = shares.shape[-1]
            self._rows, self._starts = self._value_rows[:, : self._end].reshape(-1), self._bags * self._end
        return weighted_sums(values.view(-1, values.shape[-1]), self._rows, self._starts, shares.reshape(-1))

    def _width(self, end: int) -> int:
        """Return `end` rounded up: the kernel is compiled for each width, which takes up to some milliseconds."""
        step = max(64, 1 << max(0, end.bit_length() - 4))
        return min(-(-end // step) * step, self._max_length)


def _strips(out_features: int) -> tuple[int, int]:
    """Return into how many strips to cut, and their width: whole vectors, and not too many for the registers."""
    least = max(1, -(-out_features // _WIDEST), min(torch.get_num_threads(), out_features // _NARROWEST))

    def width(count: int) -> int:
        return -(-out_features // (16 * count)) * 16

    count = min(range(least, 2 * least), key=lambda count: count * width(count))
    return count, width(count)
