"""One block of a `Decoder`: attention that reads its cache, and feed-forward, on rows of vectors.

Part of: decoder
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from transformerlm.inference.fast.cache import LayerKV, NewPositions
from transformerlm.inference.fast.packed_linear import PackedLinear
from transformerlm.models.attention import attend
from transformerlm.models.layers import feed_forward
from transformerlm.models.settings import ModelSettings
from transformerlm.utils.dtypes import upcast

Weights = Mapping[str, Tensor]

# PyTorch's elementwise functions take two vectors of 16 numbers at a time, and share out more numbers than these.
_VECTORS, _ONE_THREAD = 32, 32768


class Norm:
    """RMSNorm; the matrix after it may take its gain over."""

    def __init__(self, gain: Tensor, eps: float) -> None:
        root = float(gain.numel() ** 0.5)
        # sqrt(mean(x^2) + eps) = hypot(|x|, sqrt(n eps)) / sqrt(n): two small kernels instead of five.
        self._floor = torch.tensor(root * eps**0.5, device=gain.device)
        self._gain: Tensor | None = upcast(gain) * root  # (d_model)
        self._dtype = torch.promote_types(gain.dtype, torch.float32)

    def take_gain(self) -> Tensor:
        """Return gain times sqrt(n) as `(d_model)`, fp32, and no longer apply them."""
        assert self._gain is not None, "the gain was taken already"
        gain, self._gain = self._gain, None
        return gain

    def __call__(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self._dtype)  # (rows, 1)
        normed = x / torch.hypot(size, self._floor)  # sqrt(n) is still missing: it is in the gain
        if self._gain is not None:
            normed = normed * self._gain
        return normed.to(x.dtype)


class Layer:
    """One block: attention and feed-forward with their norms and residuals, on rows `(batch * seq, d_model)`."""

    def __init__(self, weights: Weights, settings: ModelSettings, stack: Callable[..., PackedLinear]) -> None:
        self._num_heads, self._kv_heads, self._d_head = settings.num_heads, settings.num_kv_heads, settings.d_head
        self._scale = self._d_head**-0.5
        eps, self._is_post = settings.norm_eps, settings.norm_position == "post"
        self._ffn = feed_forward(settings.ffn)
        self._norms = [Norm(weights[name], eps) if name in weights else None for name in ("ln1", "ln2")]
        before = [None, None] if self._is_post else self._norms  # after a "post" norm comes a residual
        projections = [weights[f"attn.{name}_proj"] for name in ("q", "k", "v")]
        self._qkv = stack(projections, before[0])
        self._output = stack([weights["attn.output_proj"]], None)
        self._up = stack([weights[f"ffn.{name}"] for name in self._ffn.UP], before[1])
        self._down = stack([weights["ffn.w2"]], None)
        self._qk_norm: tuple[Tensor, float] | None = None
        if settings.qk_norm:
            rows = [weights["attn.q_norm"]] * self._num_heads + [weights["attn.k_norm"]] * self._kv_heads
            self._qk_norm = upcast(torch.stack(rows)), eps  # (num_heads + kv_heads, d_head)

    @property
    def head_gains(self) -> Tensor | None:
        """The gains of the norms of queries and keys, `(num_heads + kv_heads, d_head)`."""
        return None if self._qk_norm is None else self._qk_norm[0]

    def __call__(self, x: Tensor, rotation: Tensor | None, positions: NewPositions, memory: LayerKV) -> Tensor:
        ln1, ln2 = self._norms
        if self._is_post and ln1 is not None and ln2 is not None:
            x = ln1(self._output.add(self._attend(self._qkv(x), rotation, positions, memory), x))
            return ln2(self._down.add(self._activate(self._up(x)), x))
        qkv = self._qkv(x if ln1 is None else ln1(x))  # (batch * seq, q + k + v)
        x = self._output.add(self._attend(qkv, rotation, positions, memory), x)
        return self._down.add(self._activate(self._up(x if ln2 is None else ln2(x))), x)

    def _activate(self, x: Tensor) -> Tensor:
        return by_rows(lambda rows: self._ffn.activate(*rows.chunk(len(self._ffn.UP), dim=1)), x)  # (batch * seq, d_ff)

    def _attend(self, qkv: Tensor, rotation: Tensor | None, positions: NewPositions, memory: LayerKV) -> Tensor:
        """Rotate, store and attend: `(batch * seq, q + k + v)` to `(batch * seq, num_heads * d_head)`.

        There are three ways to attend: one query a sequence by embedding bags, a prompt in an empty cache by the fused
        causal kernel, and all else by two batched products with what the cache holds.
        """
        seq, num_heads, kv_heads, d_head = positions.seq_len, self._num_heads, self._kv_heads, self._d_head
        batch = qkv.shape[0] // seq
        heads = qkv.view(batch, seq, -1, d_head)  # (batch, seq, q + k + v heads, d_head)
        self._turn(heads[:, :, : num_heads + kv_heads], rotation)
        query, new = heads[:, :, :num_heads], heads[:, :, num_heads:].view(batch, seq, 2, kv_heads, d_head)
        positions.write(memory, new)
        if positions.bags is not None:
            scores = positions.bags.scores(query * self._scale, memory.keys)  # (batch * num_heads, end)
            shares = torch.softmax(_hide(scores, positions.bias, batch), -1)
            return positions.bags.mix(shares, memory.values).view(batch, -1)
        if positions.slot_bags is not None:
            return positions.slot_bags.attend(query * self._scale, *memory).view(batch, -1)
        if seq > 1 and positions.bias is None:
            key, value = new.unbind(2)
            parts = (each.transpose(1, 2) for each in (query, key, value))  # (batch, heads, seq, d_head)
            mixed = attend(*parts, is_causal=True, implementation="fused")
            return mixed.transpose(1, 2).reshape(batch * seq, -1)
        return self._attend_to_cache(query, positions, memory)

    def _attend_to_cache(self, query: Tensor, positions: NewPositions, memory: LayerKV) -> Tensor:
        """Let queries `(batch, seq, num_heads, d_head)` attend to the cache; `(batch * seq, num_heads * d_head)`."""
        batch, seq, _, d_head = query.shape
        kv_heads = self._kv_heads
        if seq > 1:  # Queries that share keys are rows of one product.
            query = query.view(batch, seq, kv_heads, -1, d_head).permute(0, 2, 3, 1, 4)  # (batch, kv, group, seq, d)
        rows = query.reshape(batch * kv_heads, -1, d_head)  # (batch * kv, group * seq, d)
        keys, values = (each.flatten(0, 1) for each in memory)
        keys, values = keys[:, :, : positions.end], values[:, : positions.end]  # (batch * kv, d, end), (.., end, d)
        # beta=0: the first argument is not read; the scale is applied inside the product.
        scores = torch.baddbmm(rows.new_empty(()), rows, keys, beta=0, alpha=self._scale)  # (.., group * seq, end)
        mixed = torch.bmm(torch.softmax(_hide(scores, positions.bias, batch), -1), values)  # (.., group * seq, d)
        if seq > 1:
            mixed = mixed.view(batch, kv_heads, -1, seq, d_head).permute(0, 3, 1, 2, 4)  # (batch, seq, kv, group, d)
        return mixed.reshape(batch * seq, -1)

    def _turn(self, heads: Tensor, rotation: Tensor | None) -> None:
        """Norm and rotate queries and keys `(batch, seq, heads, d_head)`, in place."""
        wide = upcast(heads)
        if self._qk_norm is not None:
            gain, eps = self._qk_norm
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * gain
        if rotation is not None:
            # A pair of neighbours as one complex number, times cos + i sin, is the pair turned by that angle.
            torch.view_as_complex(wide.view(*wide.shape[:-1], -1, 2)).mul_(rotation)
        if wide is not heads:
            heads.copy_(wide)


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return an elementwise function of `x` `(rows, width)`, so that no number depends on how many rows there are.

    PyTorch computes whole vectors of numbers, and those left over at the end one by one, by another approximation of
    exp. So rows go together only if they fill whole vectors, and are so few that one thread does them all.
    """
    if x.device.type != "cpu":  # others compute each number by itself
        return function(x)
    rows = max(1, _ONE_THREAD // x.shape[1]) if x.shape[1] % _VECTORS == 0 else 1
    if len(x) <= rows:
        return function(x)
    return torch.cat([function(part) for part in torch.split(x, rows)])


def _hide(scores: Tensor, bias: Tensor | None, batch: int) -> Tensor:
    """Add the bias `(batch or 1, 1, seq, keys)` to scores `(..., keys)`, in place, as `(batch, heads, seq, keys)`."""
    if bias is not None:
        scores.view(batch, -1, bias.shape[-2], scores.shape[-1]).add_(bias)
    return scores
