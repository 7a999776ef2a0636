"""Weight matrices in the layouts that a product with a few rows reads fastest.

Each class computes what `transformerlm.models.layers.Linear` does, `x W^T`. A decoding step multiplies one row per
sequence, so its time is that of reading the weights once. On a CPU the layout decides how near to the speed of memory
it comes: the strips of `embedding_bag_matvec` are best for one row, oneDNN's blocked layout is best for more; the plain
product of PyTorch (MKL) reaches a third to two thirds of either. So a CPU keeps both.

Twin of `pack`: `transformerlm.models.layers.Linear`
Test: tests/inference/fast/test_packed_linear.py
Pays: all matrices of a step with 8 rows take 3.0 ms instead of 7.8 as `F.linear`, in fp32 (docs/sampling.md)
Part of: decoder
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from transformerlm.inference.fast.embedding_bag_matvec import (
    EmbeddingBagMatvec,
    Int8EmbeddingBagMatvec,
    has_fast_kernel,
)

# The layout chosen for 8 rows is at the speed of memory for 1 row too; the one chosen for 1 row is not.
_ROWS_HINT = 8
GROUP = 512
"""So many weights of a row of 8 bits share a scale."""
# With more rows than this it is faster to widen the int8 weights than to multiply with them as they are.
_INT8_MAX_ROWS = 16
MOST_EQUAL_ROWS = 32
"""For how many rows a reproducible product gives each the same bits."""
# The int8 kernel takes blocks of input features, as oneDNN does in bfloat16; where the last one is not whole, it reads
# on after the weights.
_BLOCK = 32


class PackedLinear(Protocol):
    """A linear map without bias on rows `(rows, in_features)`; the result has their dtype."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product, `(rows, out_features)`."""

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return `residual` plus the product."""


def pack(weight: Tensor, *, int8: bool = False, reproducible: bool = False) -> PackedLinear:
    """Return the map of `weight` `(out_features, in_features)`; on a CPU it holds its own copy.

    With `reproducible` a row's bits do not depend on the other rows.
    """
    if int8:
        return Int8Linear(weight, reproducible=reproducible)
    if reproducible:
        return ReproducibleLinear(weight)
    return OneDnnLinear(weight) if _has_blocked_layout(weight) else PlainLinear(weight)


class PlainLinear:
    """The product of any device, in the weight's dtype; on a CPU the weight is transposed, to be read in order."""

    def __init__(self, weight: Tensor) -> None:
        # (in_features, out_features)
        self._weight = weight.T.contiguous() if weight.device.type == "cpu" else weight.T

    def __call__(self, x: Tensor) -> Tensor:
        return torch.mm(x.to(self._weight.dtype), self._weight).to(x.dtype)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)


class OneDnnLinear:
    """One row by embedding bags; more rows in oneDNN's own layout, in fp32 with the addition inside."""

    def __init__(self, weight: Tensor, *, has_strips: bool = True) -> None:
        self._matvec = EmbeddingBagMatvec(weight) if has_strips and has_fast_kernel(weight.device) else None
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
        # Looked up once: finding the overload takes as long as a small kernel.
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._multiply_add = torch.ops.mkldnn._linear_pointwise.binary
        self._dtype = weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) == 1 and self._matvec is not None:
            return self._matvec(x.to(self._dtype)).to(x.dtype)
        # No bias, and no function after the product.
        product: Tensor = self._multiply(x.to(self._dtype), self._weight, None, "none", [], "")
        return product.to(x.dtype)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        if (
            len(x) > 1 or self._matvec is None
        ) and x.dtype == self._dtype == residual.dtype:  # the operator takes one dtype only
            return self._multiply_add(x, residual, self._weight, None, "add")  # type: ignore[no-any-return]
        return residual + self(x)


class Int8Linear:
    """Weights in 8 bits, symmetric, rounded to nearest; each group of a row, up to `GROUP` weights, has its scale.

    A scale is the greatest weight of its group over 127. It is rounded to bfloat16 before the weights are divided by
    it, so it adds no error of its own.

    With `reproducible` the result for a row does not depend on the other rows, for 2 to `MOST_EQUAL_ROWS` of them.
    """

    def __init__(self, weight: Tensor, *, reproducible: bool = False) -> None:
        wide = _in_groups(weight.float())
        # A group of zeros has the scale `tiny` instead of 0, by which nothing can be divided.
        scales = (wide.abs().amax(dim=2) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        self.scales = scales.to(torch.bfloat16)  # (groups, out_features)
        levels = (wide / self.scales.float().unsqueeze(2)).round_().clamp_(-127, 127)
        self.levels = levels.to(torch.int8)  # (groups, out_features, size)
        self._in_features = weight.shape[1]
        self._padding = len(levels) * levels.shape[2] - self._in_features
        self._is_reproducible = reproducible
        by_bags = not reproducible and has_fast_kernel(weight.device)
        self._matvec = Int8EmbeddingBagMatvec(self.levels, self.scales.float()) if by_bags else None

    def __call__(self, x: Tensor) -> Tensor:
        if self._is_reproducible and _INT8_MAX_ROWS < len(x) <= MOST_EQUAL_ROWS:
            return torch.cat([self(rows) for rows in torch.split(x, _INT8_MAX_ROWS)])
        if self._padding:
            x = F.pad(x, (0, self._padding))
        if len(x) == 1 and self._matvec is not None:
            return self._matvec(x.float()).to(x.dtype)
        narrow = x.to(torch.bfloat16)  # what the kernel takes
        few = len(x) <= _INT8_MAX_ROWS and x.device.type == "cpu"
        return (self._multiply_groups(narrow) if few else self._multiply_widened(narrow)).to(x.dtype)

    def _multiply_groups(self, x: Tensor) -> Tensor:
        parts = x.view(len(x), len(self.levels), -1).transpose(0, 1).contiguous()  # (groups, rows, size)
        groups = zip(parts, self.levels, self.scales, strict=True)
        first, *rest = (torch._weight_int8pack_mm(*group) for group in groups)  # (rows, out_features)
        whole = first.float()
        for each in rest:
            whole += each
        return whole

    def _multiply_widened(self, x: Tensor) -> Tensor:
        groups, out_features, size = self.levels.shape
        wide = x.new_empty(out_features, groups, size).copy_(self.levels.transpose(0, 1))
        if groups == 1:  # then the scales can follow the sums
            return F.linear(x, wide.flatten(1)) * self.scales[0]
        return F.linear(x, wide.mul_(self.scales.T.unsqueeze(2)).flatten(1))

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)

    def dequantised(self) -> Tensor:
        """Return the weight that the 8 bits stand for, `(out_features, in_features)` in fp32."""
        wide = self.levels * self.scales.float().unsqueeze(2)
        return wide.transpose(0, 1).flatten(1)[:, : self._in_features]


def _in_groups(weight: Tensor) -> Tensor:
    """Return weights `(out_features, in_features)` as `(groups, out_features, size)`.

    The groups are equally large; they have whole blocks of input features, for which zeros are added at the end.
    """
    out_features, in_features = weight.shape
    groups = -(-in_features // GROUP)
    size = -(-in_features // (groups * _BLOCK)) * _BLOCK
    padded = F.pad(weight, (0, groups * size - in_features))
    return padded.view(out_features, groups, size).transpose(0, 1).contiguous()


class ReproducibleLinear:
    """A map whose result for a row does not depend on the other rows, for 2 to `MOST_EQUAL_ROWS` of them.

    This was found by trials, and `Decoder` tests it on its own machine. In fp32, oneDNN sums one row of more than 1,024
    features in another order than several; in bfloat16, rows of features that fill no whole blocks, and more than 32
    rows.
    """

    def __init__(self, weight: Tensor) -> None:
        self._padding = -weight.shape[1] % _BLOCK
        weight = F.pad(weight, (0, self._padding))  # features of zeros
        has_layout = _has_blocked_layout(weight)
        self._linear: PackedLinear = OneDnnLinear(weight, has_strips=False) if has_layout else PlainLinear(weight)

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(self._pad(x))

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._linear.add(self._pad(x), residual)

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, self._padding)) if self._padding else x


def _has_blocked_layout(weight: Tensor) -> bool:
    # These operators are what torch.compile calls; a build without oneDNN has none.
    if weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
