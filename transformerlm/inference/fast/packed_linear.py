"""Weight matrices, stored as the product with a few rows reads them fastest.

A decoding step multiplies one row per sequence, so its time is that of reading the weights once. On a CPU the layout
decides how near to the speed of memory they come: for one row the strips of `bags` do best, for more oneDNN's blocked
layout; the plain product of PyTorch (MKL) reaches a third to two thirds of either. So a CPU keeps both.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from transformerlm.inference.fast.embedding_bag_matvec import Int8RowProduct, RowProduct, are_fast

# The layout chosen for 8 rows is at the speed of memory for 1 row too; the one chosen for 1 row is not.
_ROWS_HINT = 8
# Above this many rows it is quicker to widen the int8 weights than to multiply with them as they are.
_INT8_MAX_ROWS = 16
# Its kernel takes blocks of input features, and reads on behind the weights where the last one is not whole.
_INT8_BLOCK = 32


class Product(Protocol):
    """A linear map without bias on rows `(rows, in_features)`, which come back in the dtype they have."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product, `(rows, out_features)`."""

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return `residual` plus the product."""


def prepare(weight: Tensor, *, int8: bool = False) -> Product:
    """Return the map of `weight` `(out_features, in_features)`; what it holds is its own copy on a CPU."""
    if int8:
        return Int8Product(weight)
    return BlockedProduct(weight) if _has_blocked_layout(weight) else PlainProduct(weight)


class PlainProduct:
    """The product of any device, in the weight's dtype; on a CPU the weight is transposed, to be read in order."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.T.contiguous() if weight.device.type == "cpu" else weight.T

    def __call__(self, x: Tensor) -> Tensor:
        return torch.mm(x.to(self._weight.dtype), self._weight).to(x.dtype)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)


class BlockedProduct:
    """One row by the sums of `bags`, more in oneDNN's own layout, in fp32 with the addition inside."""

    def __init__(self, weight: Tensor) -> None:
        self._multiply_row = RowProduct(weight) if are_fast(weight.device) else None
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
        # Looked up once: finding the overload takes as long as a small kernel.
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._multiply_add = torch.ops.mkldnn._linear_pointwise.binary
        self._dtype = weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) == 1 and self._multiply_row is not None:
            return self._multiply_row(x.to(self._dtype)).to(x.dtype)
        product: Tensor = self._multiply(x.to(self._dtype), self._weight, None, "none", [], "")
        return product.to(x.dtype)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        if len(x) > 1 and x.dtype == self._dtype == residual.dtype:
            return self._multiply_add(x, residual, self._weight, None, "add")  # type: ignore[no-any-return]
        return residual + self(x)


class Int8Product:
    """Weights in 8 bits, one scale for each output feature: `scale = max |row| / 127`, symmetric, rounded to nearest.

    The scale is rounded to bfloat16 before the weights are divided by it, so it adds no error of its own.
    """

    def __init__(self, weight: Tensor) -> None:
        wide = weight.float()
        scales = (wide.abs().amax(dim=1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        self._scales = scales.to(torch.bfloat16)
        levels = (wide / self._scales.float().unsqueeze(1)).round_().clamp_(-127, 127)
        self._weight = levels.to(torch.int8)
        by_row = are_fast(weight.device)
        self._multiply_row = Int8RowProduct(self._weight, self._scales.float()) if by_row else None

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) == 1 and self._multiply_row is not None:
            return self._multiply_row(x.float()).to(x.dtype)
        narrow = x.to(torch.bfloat16)
        if len(x) <= _INT8_MAX_ROWS and x.device.type == "cpu" and x.shape[1] % _INT8_BLOCK == 0:
            return torch._weight_int8pack_mm(narrow, self._weight, self._scales).to(x.dtype)
        return (F.linear(narrow, self._weight.to(torch.bfloat16)) * self._scales).to(x.dtype)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)

    def dequantised(self) -> Tensor:
        """Return the weight that the product stands for, `(out_features, in_features)` in fp32."""
        return self._weight.float() * self._scales.float().unsqueeze(1)


def _has_blocked_layout(weight: Tensor) -> bool:
    # These operators are what torch.compile calls; a build without oneDNN has none.
    if weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
