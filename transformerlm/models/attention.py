"""Softmax, attention and causal multi-head self-attention (Vaswani et al. 2017), from scratch.

`scaled_dot_product_attention` has two implementations behind one call: "reference" is written out, "fused" is PyTorch's
kernel. Grouped-query attention (Ainslie et al. 2023) shares each key-value head among several query heads.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformerlm.models.fast.blocked_attention import blocked_causal_attention
from transformerlm.models.kv_cache import LayerCache
from transformerlm.models.layers import Linear, RMSNorm, RotaryEmbedding
from transformerlm.utils.dtypes import cast_for_matmul, upcast

AttentionImplementation = Literal["reference", "fused"]
ATTENTION_IMPLEMENTATIONS: tuple[AttentionImplementation, ...] = ("reference", "fused")


def softmax(x: Tensor, dim: int) -> Tensor:
    """Return the softmax of `x` over `dim`, computed in fp32 and returned in the input's dtype.

    The maximum is subtracted first, so large inputs do not overflow. A slice that is -inf throughout gives zeros: an
    attention row that may look at nothing takes nothing.
    """
    wide = upcast(x)
    maximum = wide.amax(dim=dim, keepdim=True).detach()
    exponentials = torch.exp(wide - maximum.masked_fill(maximum == -math.inf, 0.0))
    # The sum is at least exp(0) = 1, except for a slice of -inf.
    total = exponentials.sum(dim=dim, keepdim=True).clamp_min(1.0)
    return (exponentials / total).to(x.dtype)


def causal_mask(num_queries: int, num_keys: int, device: torch.device | str | None = None) -> Tensor:
    """Return the bool mask `(num_queries, num_keys)`, True where a query may look.

    The queries are the last ones: query i stands at position `num_keys - num_queries + i`, as in decoding with a cache.
    """
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return mask.tril(diagonal=num_keys - num_queries)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    implementation: AttentionImplementation = "reference",
) -> Tensor:
    """Return `softmax(query key^T / sqrt(d_k)) value` (Vaswani et al. 2017, eq. 1).

    Shapes: query `(..., queries, d_k)`, key `(..., keys, d_k)`, value `(..., keys, d_v)`, result `(..., queries, d_v)`.
    `mask` is bool, broadcastable to `(..., queries, keys)`, True where a query may look; a query that may look nowhere
    gives zeros. `is_causal` stands for `causal_mask` and excludes `mask`. Key and value may have fewer heads
    (dimension -3) than query; each then serves that many consecutive query heads.
    """
    if is_causal and mask is not None:
        raise ValueError("attention: give a mask or is_causal=True, not both")
    if implementation == "fused":
        return _fused_attention(query, key, value, mask, is_causal)
    if implementation != "reference":
        raise ValueError(f"attention: expected one of {', '.join(ATTENTION_IMPLEMENTATIONS)}, got {implementation!r}")
    if is_causal and query.shape[-2] > 1:
        mask = causal_mask(query.shape[-2], key.shape[-2], query.device)
    return _written_out_attention(query, _share_heads(key, query), _share_heads(value, query), mask)


def _written_out_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    # Scaling the query is cheaper than scaling the scores, which are larger.
    scores = (query * (1.0 / math.sqrt(query.shape[-1]))) @ key.transpose(-2, -1)  # (..., queries, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return softmax(scores, dim=-1) @ value


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    if is_causal and num_queries not in (1, num_keys):
        # The kernel's own causal mask puts the first query at position 0; with a cache the queries are the last ones.
        mask, is_causal = causal_mask(num_queries, num_keys, query.device), False
    if is_causal and num_queries > 1 and _pays_in_blocks(query):
        return blocked_causal_attention(query, _share_heads(key, query), _share_heads(value, query))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=is_causal and num_queries > 1,
        enable_gqa=_num_heads(key) != _num_heads(query),
    )


def _pays_in_blocks(query: Tensor) -> bool:
    return query.dtype == torch.bfloat16 and query.device.type == "cpu"


def _num_heads(x: Tensor) -> int:
    return x.shape[-3] if x.ndim >= 3 else 1


def _share_heads(x: Tensor, query: Tensor) -> Tensor:
    """Repeat each head of `x` for the consecutive query heads it serves."""
    if _num_heads(x) == _num_heads(query):
        return x
    return x.repeat_interleave(_num_heads(query) // _num_heads(x), dim=-3)


class MultiHeadSelfAttention(nn.Module):
    """Causal self-attention, `(batch, seq, d_model)` in and out.

    `rope` is shared by the layers of a model; without it positions are not encoded. `num_kv_heads` below `num_heads`
    groups queries. `qk_norm` puts an RMSNorm over each head's queries and keys, before the rotary embedding. Raises
    ValueError when heads do not divide.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        rope: RotaryEmbedding | None = None,
        qk_norm: bool = False,
        implementation: AttentionImplementation = "fused",
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if d_model % num_heads:
            raise ValueError(f"d_model ({d_model}) is not divisible by num_heads ({num_heads})")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads ({num_heads}) is not divisible by num_kv_heads ({num_kv_heads})")
        self.num_heads, self.num_kv_heads, self.d_head = num_heads, num_kv_heads, d_model // num_heads
        self.rope, self.implementation = rope, implementation
        d_kv = num_kv_heads * self.d_head
        self.q_proj = Linear(d_model, d_model, device=device, dtype=dtype)
        self.k_proj = Linear(d_model, d_kv, device=device, dtype=dtype)
        self.v_proj = Linear(d_model, d_kv, device=device, dtype=dtype)
        self.output_proj = Linear(d_model, d_model, device=device, dtype=dtype)
        self.q_norm = RMSNorm(self.d_head, norm_eps, device=device, dtype=dtype) if qk_norm else None
        self.k_norm = RMSNorm(self.d_head, norm_eps, device=device, dtype=dtype) if qk_norm else None

    def forward(self, x: Tensor, *, token_positions: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """Attend over `x`, and over what `cache` holds before it; `x` is appended to the cache.

        `token_positions` `(seq)` or `(batch, seq)` place the rows for the rotary embedding; by default they follow each
        other, behind the cache.
        """
        x = cast_for_matmul(x)
        offset = 0 if cache is None else cache.length
        query = self._position(self._split(self.q_proj(x)), self.q_norm, token_positions, offset)
        key = self._position(self._split(self.k_proj(x)), self.k_norm, token_positions, offset)
        value = self._split(self.v_proj(x))
        if cache is not None:
            key, value = cache.append(key, value)
            query = query.to(key.dtype)
        heads = scaled_dot_product_attention(query, key, value, is_causal=True, implementation=self.implementation)
        merged = heads.transpose(-3, -2).flatten(-2)  # (batch, seq, d_model)
        return self.output_proj(merged)  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.d_head).transpose(-3, -2)  # (batch, heads, seq, d_head)

    def _position(self, x: Tensor, norm: RMSNorm | None, token_positions: Tensor | None, offset: int) -> Tensor:
        x = x if norm is None else norm(x)
        if self.rope is None:
            return x
        if token_positions is not None and token_positions.ndim > 1:
            token_positions = token_positions.unsqueeze(-2)  # (batch, 1, seq): the same for every head
        return self.rope(x, token_positions, offset=offset)  # type: ignore[no-any-return]
