"""The parts of a Transformer block, written from scratch: linear, embedding, norm, feed-forward and rotary embedding.

They know tensors and plain numbers only. No layer has a bias. References: RMSNorm (Zhang & Sennrich 2019), SwiGLU
(Shazeer 2020), RoPE (Su et al. 2021), its scaling for longer contexts (Llama 3.1, Grattafiori et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from profiling import nvtx
from transformerlm.models.functional import gated_silu, rms_norm, rotate, silu
from transformerlm.utils.dtypes import cast_for_matmul


class Linear(nn.Module):
    """A linear map without bias, `(..., in_features)` to `(..., out_features)`.

    The weight is `(out_features, in_features)`, drawn from N(0, 2 / (in_features + out_features)) cut at 3 sigma.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        std = math.sqrt(2.0 / (in_features + out_features))
        nn.init.trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T

    def extra_repr(self) -> str:
        """Return the sizes, for `print(model)`."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


class Embedding(nn.Module):
    """A table of vectors: ids `(...)` to `(..., embedding_dim)`, drawn from N(0, std^2) cut at 3 sigma."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        std: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)

    def forward(self, token_ids: Tensor) -> Tensor:
        # The backward pass of index_select is many times faster on a CPU than that of weight[token_ids].
        return self.weight.index_select(0, token_ids.reshape(-1)).view(*token_ids.shape, self.weight.shape[1])

    def extra_repr(self) -> str:
        """Return the sizes, for `print(model)`."""
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension, then scale (Zhang & Sennrich 2019).

    `(..., d_model)` in and out. Computes in at least fp32 and returns the input's dtype.
    """

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Return the size and epsilon, for `print(model)`."""
        return f"{len(self.weight)}, eps={self.eps}"


class SwiGLU(nn.Module):
    """The gated feed-forward layer `w2(silu(w1 x) * w3 x)` (Shazeer 2020), `(..., d_model)` in and out."""

    UP = ("w1", "w3")
    """The matrices that read the input; `activate` turns their products into what w2 reads."""
    NUM_KEPT = 3
    """Tensors `(..., d_ff)` that the forward pass keeps for the backward pass: w1 x, w3 x and their product."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.w1 = Linear(d_model, d_ff, device=device, dtype=dtype)
        self.w2 = Linear(d_ff, d_model, device=device, dtype=dtype)
        self.w3 = Linear(d_model, d_ff, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        with nvtx.range("ffn", level="fine"):
            x = cast_for_matmul(x)
            return self.w2(self.activate(self.w1(x), self.w3(x)))  # type: ignore[no-any-return]

    @staticmethod
    def activate(gate: Tensor, x: Tensor) -> Tensor:
        """Return `silu(gate) * x`."""
        return gated_silu(gate, x)


class PlainFFN(nn.Module):
    """A feed-forward layer of two matrices, `w2(activate(w1 x))`, `(..., d_model)` in and out; subclasses activate."""

    UP = ("w1",)
    NUM_KEPT: int

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.w1 = Linear(d_model, d_ff, device=device, dtype=dtype)
        self.w2 = Linear(d_ff, d_model, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        with nvtx.range("ffn", level="fine"):
            return self.w2(self.activate(self.w1(x)))  # type: ignore[no-any-return]

    @staticmethod
    def activate(x: Tensor) -> Tensor:
        """Return what w2 reads, elementwise."""
        raise NotImplementedError


class SiLUFFN(PlainFFN):
    """The plain feed-forward layer `w2(silu(w1 x))`."""

    NUM_KEPT = 3  # w1 x, its sigmoid and silu

    @staticmethod
    def activate(x: Tensor) -> Tensor:
        """Return `silu(x)`."""
        return silu(x)


FeedForward = type[SwiGLU] | type[PlainFFN]
FEED_FORWARDS: dict[str, FeedForward] = {"swiglu": SwiGLU, "silu": SiLUFFN}
"""The feed-forward layers by the names of `model.ffn`: settings, model, decoder and estimates all ask this table."""


def feed_forward(ffn: str) -> FeedForward:
    """Return the layer of this name; raise ValueError when there is none."""
    if ffn not in FEED_FORWARDS:
        raise ValueError(f"model.ffn: expected one of {', '.join(FEED_FORWARDS)}, got {ffn!r}")
    return FEED_FORWARDS[ffn]


class RotaryEmbedding(nn.Module):
    """Rotate each pair of features (2i, 2i+1) by the angle `position * theta^(-2i / d_k)` (RoPE, Su et al. 2021).

    With `scaling` the angles of slow pairs are divided by the `rope_factors` of these settings. The tables of cosines
    and sines are fp32 whatever the model's dtype, and are not part of the state dict. Raises ValueError when `d_k` is
    odd.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        theta: float,
        d_k: int,
        max_seq_len: int,
        *,
        scaling: Mapping[str, float] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if d_k % 2:
            raise ValueError(f"rotary embedding: d_k must be even to rotate pairs of features, got {d_k}")
        self.theta, self.d_k, self.max_seq_len, self.scaling = theta, d_k, max_seq_len, scaling
        cos, sin = self._tables(device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor, token_positions: Tensor | None = None, *, offset: int = 0) -> Tensor:
        """Rotate `x` `(..., seq, d_k)`; row j is at position `token_positions[..., j]`, or else at `offset + j`.

        Raises ValueError when `offset + seq` exceeds max_seq_len. `token_positions` are not checked: looking at them
        would make the host wait for the device.
        """
        if token_positions is not None:
            return rotate(x, self.cos[token_positions], self.sin[token_positions])
        end = offset + x.shape[-2]
        if end > self.max_seq_len:
            raise ValueError(f"rotary embedding: {end} positions asked for, but max_seq_len is {self.max_seq_len}")
        return rotate(x, self.cos[offset:end], self.sin[offset:end])

    def extra_repr(self) -> str:
        """Return the sizes, for `print(model)`."""
        sizes = f"theta={self.theta}, d_k={self.d_k}, max_seq_len={self.max_seq_len}"
        return sizes if self.scaling is None else f"{sizes}, scaling={dict(self.scaling)}"

    def _tables(self, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        # float64, on the CPU because MPS has none: an fp32 angle is already off by 1e-4 at position 1000.
        frequencies = _rope_frequencies(self.theta, self.d_k)
        if self.scaling is not None:
            frequencies = frequencies / rope_factors(self.theta, self.d_k, **self.scaling)
        positions = torch.arange(self.max_seq_len, dtype=torch.float64, device="cpu")
        angles = torch.outer(positions, frequencies)  # (max_seq_len, d_k / 2)
        return angles.cos().to(device, torch.float32), angles.sin().to(device, torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Only the device counts: model.to(bfloat16) must not round the tables, nor to_empty() leave them unset. All
        # layers share the tables, and come here one after the other.
        device = fn(self.cos[:0]).device
        if device != self.cos.device:
            self.cos, self.sin = self._tables(device)
        return self


def _rope_frequencies(theta: float, d_k: int) -> Tensor:
    """Return the radians by which each pair turns from one position to the next, `(d_k / 2)` in fp64."""
    return theta ** -(torch.arange(0, d_k, 2, dtype=torch.float64, device="cpu") / d_k)


def rope_factors(
    theta: float,
    d_k: int,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_context_length: float,
) -> Tensor:
    """Return by what Llama 3.1 divides each pair's frequency, `(d_k / 2)` in fp64: 1 for fast pairs, `factor` for slow.

    A pair that makes more than `high_freq_factor` turns within `original_context_length` tells near positions apart,
    and stays as it is. One that makes fewer than `low_freq_factor` turns would meet angles in a longer context that it
    has never seen, and is slowed down by `factor`. Between the two the frequency is a mean of both, weighted by the
    number of turns. Grattafiori et al. 2024 (The Llama 3 Herd of Models); `apply_scaling` in the code for Llama 3.1.
    """
    turns = original_context_length * _rope_frequencies(theta, d_k) / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return 1 / (kept + (1 - kept) / factor)
