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

from collections.abc import Callable
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
# With more rows than this it is faster to widen the int8 weights than to multiply with them as they are.
_INT8_MAX_ROWS = 16
MOST_EQUAL_ROWS = 32
"""For how many rows a reproducible product gives each the same bits."""
# The int8 kernel takes blocks of input features; where the last block is not whole, it reads on after the weights.
_INT8_BLOCK = 32


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
    if reproducible:
        return ReproducibleLinear(weight, int8=int8)
    if int8:
        return Int8Linear(weight)
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
    """Weights in 8 bits, one scale for each output feature: `scale = max |row| / 127`, symmetric, rounded to nearest.

    The scale is rounded to bfloat16 before the weights are divided by it, so it adds no error of its own.
    """

    def __init__(self, weight: Tensor, *, has_strips: bool = True) -> None:
        wide = weight.float()
        # A row of zeros has the scale `tiny` instead of 0, by which nothing can be divided.
        scales = (wide.abs().amax(dim=1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        self._scales = scales.to(torch.bfloat16)  # (out_features)
        levels = (wide / self._scales.float().unsqueeze(1)).round_().clamp_(-127, 127)
        self._weight = levels.to(torch.int8)  # (out_features, in_features)
        by_bags = has_strips and has_fast_kernel(weight.device)
        self._matvec = Int8EmbeddingBagMatvec(self._weight, self._scales.float()) if by_bags else None

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) == 1 and self._matvec is not None:
            return self._matvec(x.float()).to(x.dtype)
        narrow = x.to(torch.bfloat16)  # what the kernel takes
        if len(x) <= _INT8_MAX_ROWS and x.device.type == "cpu" and x.shape[1] % _INT8_BLOCK == 0:
            return torch._weight_int8pack_mm(narrow, self._weight, self._scales).to(x.dtype)
        return (F.linear(narrow, self._weight.to(torch.bfloat16)) * self._scales).to(x.dtype)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)

    def dequantised(self) -> Tensor:
        """Return the weight that the 8 bits stand for, `(out_features, in_features)` in fp32."""
        return self._weight.float() * self._scales.float().unsqueeze(1)


class ReproducibleLinear:
    """A map whose result for a row does not depend on the other rows, for 2 to `MOST_EQUAL_ROWS` of them.

    This was found by trials, and `Decoder` tests it on its own machine. In fp32, oneDNN sums one row of more than 1,024
    features in another order than several; in bfloat16, rows of features that fill no whole blocks, and more than 32
    rows. The int8 kernel takes 16 rows at a time.
    """

    def __init__(self, weight: Tensor, *, int8: bool) -> None:
        self._padding = -weight.shape[1] % _INT8_BLOCK
        weight = F.pad(weight, (0, self._padding))  # features of zeros
        make: Callable[..., Int8Linear | OneDnnLinear] = Int8Linear if int8 else OneDnnLinear
        has_layout = int8 or _has_blocked_layout(weight)
        self._linear: PackedLinear = make(weight, has_strips=False) if has_layout else PlainLinear(weight)
        self._is_grouped = int8

    def __call__(self, x: Tensor) -> Tensor:
        x = self._pad(x)
        if self._is_grouped and _INT8_MAX_ROWS < len(x) <= MOST_EQUAL_ROWS:
            return torch.cat([self._linear(rows) for rows in torch.split(x, _INT8_MAX_ROWS)])
        return self._linear(x)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x) if self._is_grouped else self._linear.add(self._pad(x), residual)

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, self._padding)) if self._padding else x


def _has_blocked_layout(weight: Tensor) -> bool:
    # These operators are what torch.compile calls; a build without oneDNN has none.
    if weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
