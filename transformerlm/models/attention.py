"""Causal multi-head self-attention (Vaswani et al. 2017), and the choice of how attention is computed.

`attend` has two implementations: "reference" is `functional.scaled_dot_product_attention`, which is written out;
"fused" is PyTorch's kernel, or `fast/blocked_attention.py` where that is faster. `estimates.py` asks here how many
probabilities those blocks keep.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from profiling import nvtx
from transformerlm.models.fast.block_mask import block_mask
from transformerlm.models.fast.block_mask import document_attention as fast_document_attention
from transformerlm.models.fast.blocked_attention import blocked_causal_attention
from transformerlm.models.fast.blocked_attention import (
    num_kept_probabilities as num_kept_probabilities,
)  # for estimates
from transformerlm.models.functional import (
    causal_attention,
    causal_mask,
    count_heads,
    document_mask,
    repeat_kv_heads,
    scaled_dot_product_attention,
)
from transformerlm.models.kv_cache import LayerCache
from transformerlm.models.layers import Linear, RMSNorm, RotaryEmbedding
from transformerlm.utils.dtypes import cast_for_matmul
from transformerlm.utils.plain_forms import may_hand_over
from transformerlm.utils.triton_kernels import computes, kernels_work

AttentionImplementation = Literal["reference", "fused"]
AttentionMask = Any
"""A bool tensor, or the mask of `fast/block_mask.py`."""
_MIN_BLOCK_HEAD = 16  # features of a head; the smallest tile of that kernel
ATTENTION_IMPLEMENTATIONS: tuple[AttentionImplementation, ...] = get_args(AttentionImplementation)


class MultiHeadSelfAttention(nn.Module):
    """Causal self-attention, `(batch, seq, d_model)` in and out.

    `rope` is shared by the layers of a model; without it positions are not encoded. A head has `d_head` features, by
    default `d_model / num_heads`. `num_kv_heads` below `num_heads` groups queries. `qk_norm` puts an RMSNorm over each
    head's queries and keys, before the rotary embedding. `dropout` is the probability of each of attention's
    probabilities to be dropped. Raises ValueError when heads do not divide.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        d_head: int | None = None,
        rope: RotaryEmbedding | None = None,
        qk_norm: bool = False,
        implementation: AttentionImplementation = "fused",
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if d_head is None and d_model % num_heads:
            raise ValueError(f"d_model ({d_model}) is not divisible by num_heads ({num_heads})")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads ({num_heads}) is not divisible by num_kv_heads ({num_kv_heads})")
        self.d_head = d_model // num_heads if d_head is None else d_head
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.rope, self.implementation, self.dropout = rope, implementation, dropout
        d_query, d_kv = num_heads * self.d_head, num_kv_heads * self.d_head
        self.q_proj = Linear(d_model, d_query, device=device, dtype=dtype)
        self.k_proj = Linear(d_model, d_kv, device=device, dtype=dtype)
        self.v_proj = Linear(d_model, d_kv, device=device, dtype=dtype)
        self.output_proj = Linear(d_query, d_model, device=device, dtype=dtype)
        self.q_norm = RMSNorm(self.d_head, norm_eps, device=device, dtype=dtype) if qk_norm else None
        self.k_norm = RMSNorm(self.d_head, norm_eps, device=device, dtype=dtype) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        *,
        token_positions: Tensor | None = None,
        mask: AttentionMask | None = None,
        cache: LayerCache | None = None,
        dropout_key: Tensor | None = None,
    ) -> Tensor:
        """Attend over `x`, and over what `cache` holds before it; `x` is appended to the cache.

        `token_positions` `(seq)` or `(batch, seq)` place the rows for the rotary embedding; by default they follow each
        other, after those of the cache. `mask` is that of `attention_mask`; None: causal. With a `dropout_key`
        `(batch, 2)` probabilities are dropped.
        """
        with nvtx.range("attention", level="fine"):
            x = cast_for_matmul(x)
            offset = 0 if cache is None else cache.length
            query = self._norm_and_rotate(self._split_heads(self.q_proj(x)), self.q_norm, token_positions, offset)
            key = self._norm_and_rotate(self._split_heads(self.k_proj(x)), self.k_norm, token_positions, offset)
            value = self._split_heads(self.v_proj(x))
            if cache is not None:
                key, value = cache.append(key, value)
                query = query.to(key.dtype)
            heads = attend(
                query,
                key,
                value,
                mask,
                is_causal=mask is None,
                implementation=self.implementation,
                dropout_probability=self.dropout,
                dropout_key=dropout_key,
            )
            merged = heads.transpose(-3, -2).flatten(-2)  # (batch, seq, num_heads * d_head)
            return self.output_proj(merged)  # type: ignore[no-any-return]

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.d_head).transpose(-3, -2)  # (batch, heads, seq, d_head)

    def _norm_and_rotate(self, x: Tensor, norm: RMSNorm | None, token_positions: Tensor | None, offset: int) -> Tensor:
        x = x if norm is None else norm(x)
        if self.rope is None:
            return x
        if token_positions is not None and token_positions.ndim > 1:
            token_positions = token_positions.unsqueeze(-2)  # (batch, 1, seq): the same for every head
        return self.rope(x, token_positions, offset=offset)  # type: ignore[no-any-return]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask | None = None,
    *,
    is_causal: bool = False,
    implementation: AttentionImplementation = "reference",
    dropout_probability: float = 0.0,
    dropout_key: Tensor | None = None,
) -> Tensor:
    """Return the attention of `functional.scaled_dot_product_attention`, computed by one of two implementations.

    Shapes, `mask`, shared heads and dropout are as there. Attention that drops probabilities is always the one written
    out: PyTorch's kernel would draw them from a generator whose state a resumed or divided run does not repeat.
    `is_causal` stands for `causal_mask` and excludes `mask`. Raises ValueError for both together, and for an unknown
    implementation.
    """
    if is_causal and mask is not None:
        raise ValueError("attention: give a mask or is_causal=True, not both")
    if implementation not in ATTENTION_IMPLEMENTATIONS:
        raise ValueError(f"attention: expected one of {', '.join(ATTENTION_IMPLEMENTATIONS)}, got {implementation!r}")
    if not isinstance(mask, Tensor | None):
        return fast_document_attention(query, key, value, mask)
    is_causal = is_causal and query.shape[-2] > 1  # a single query is the last position, and sees every key
    drops = dropout_key is not None and dropout_probability > 0.0
    if implementation == "fused" and not drops and may_hand_over():  # hand-over
        return _fused_attention(query, key, value, mask, is_causal)
    if is_causal and not drops:
        return causal_attention(query, key, value)
    mask = causal_mask(query.shape[-2], key.shape[-2], query.device) if is_causal else mask
    return scaled_dot_product_attention(
        query, key, value, mask, dropout_probability=dropout_probability, dropout_key=dropout_key
    )


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    if is_causal and num_queries != num_keys:
        # The kernel's own causal mask puts the first query at position 0; with a cache the queries are the last ones.
        mask, is_causal = causal_mask(num_queries, num_keys, query.device), False
    if is_causal and query.dtype == torch.bfloat16 and query.device.type == "cpu":
        return blocked_causal_attention(query, repeat_kv_heads(key, query), repeat_kv_heads(value, query))
    takes_groups = mask is None and query.dtype in (torch.bfloat16, torch.float16)
    takes_groups = takes_groups and (torch.compiler.is_compiling() or computes(query))
    if query.device.type == "cuda" and not takes_groups:  # the kernels that keep no table of scores refuse groups here
        key, value = repeat_kv_heads(key, query), repeat_kv_heads(value, query)
    is_grouped = count_heads(key) != count_heads(query)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=is_grouped)


def attention_mask(positions: Tensor, attention: MultiHeadSelfAttention) -> AttentionMask:
    """Return the mask of causal attention within documents for all layers like `attention`; see `document_mask`."""
    fused = attention.implementation == "fused" and not attention.dropout and may_hand_over()
    fused = fused and positions.device.type == "cuda" and attention.d_head >= _MIN_BLOCK_HEAD
    if fused and (torch.compiler.is_compiling() or kernels_work()):  # hand-over
        return block_mask(positions)
    return document_mask(positions)
