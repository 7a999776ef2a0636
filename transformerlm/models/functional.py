"""The formulas of a Transformer as plain functions of tensors: norm, gate, softmax, attention, rotation, loss.

Each function is its formula. Where a line says `hand-over`, training takes a faster form from `fast/` that computes the
same with a backward pass of its own; `torch.compile` fuses the formulas itself and always sees them. Inside
`transformerlm.utils.plain_forms.plain_forms` nothing is handed over.

Norm, softmax and loss compute in at least fp32. References: RMSNorm (Zhang & Sennrich 2019), SiLU (Hendrycks & Gimpel
2016), SwiGLU (Shazeer 2020), attention (Vaswani et al. 2017), RoPE (Su et al. 2021).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transformerlm.models.dropout import dropout
from transformerlm.models.fast.gated_silu import gated_silu as fast_gated_silu
from transformerlm.models.fast.rms_norm import rms_norm as fast_rms_norm
from transformerlm.models.fast.rotate import rotate as fast_rotate
from transformerlm.models.fast.token_nats import token_nats as fast_token_nats
from transformerlm.utils.dtypes import upcast
from transformerlm.utils.plain_forms import may_hand_over


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in the dtype of `x`.

    `x` is `(..., d)` and `weight` `(d)`.
    """
    if torch.is_grad_enabled() and _may_hand_over():  # hand-over: only a backward pass gains from it
        return fast_rms_norm(x, weight, eps)
    wide = upcast(x)
    mean_square = wide.square().mean(dim=-1, keepdim=True)  # (..., 1)
    return (wide * torch.rsqrt(mean_square + eps) * weight).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """Return `x * sigmoid(x)`, elementwise."""
    return x * torch.sigmoid(x)


def gated_silu(gate: Tensor, x: Tensor) -> Tensor:
    """Return `silu(gate) * x`, elementwise: the gate of SwiGLU (Shazeer 2020, eq. 5)."""
    if _may_hand_over():  # hand-over
        return fast_gated_silu(gate, x)
    return silu(gate) * x


def softmax(x: Tensor, dim: int) -> Tensor:
    """Return `exp(x) / sum(exp(x))` over `dim`, in the dtype of `x`.

    The maximum is subtracted first, so that large inputs do not overflow. A slice of only -inf gives zeros:
    an attention row that may look at nothing takes nothing.
    """
    wide = upcast(x)
    maximum = wide.amax(dim=dim, keepdim=True).detach()
    exponentials = torch.exp(wide - maximum.masked_fill(maximum == -math.inf, 0.0))
    # The sum is at least exp(0) = 1, except for a slice of -inf.
    total = exponentials.sum(dim=dim, keepdim=True).clamp_min(1.0)
    return (exponentials / total).to(x.dtype)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    dropout_probability: float = 0.0,
    dropout_key: Tensor | None = None,
) -> Tensor:
    """Return `softmax(query key^T / sqrt(d_k)) value` (Vaswani et al. 2017, eq. 1).

    Shapes: query `(..., queries, d_k)`, key `(..., keys, d_k)`, value `(..., keys, d_v)`, result `(..., queries, d_v)`.
    `mask` is bool, broadcastable to `(..., queries, keys)`, True where a query may look; a query that may look nowhere
    gives zeros. Key and value may have fewer heads (dimension -3) than query: see `repeat_kv_heads`. With a
    `dropout_key` probabilities are dropped: see `dropout`.
    """
    key, value = repeat_kv_heads(key, query), repeat_kv_heads(value, query)
    # Scaling the query is cheaper than scaling the scores, which are larger.
    scores = (query * (1.0 / math.sqrt(query.shape[-1]))) @ key.transpose(-2, -1)  # (..., queries, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return dropout(softmax(scores, dim=-1), dropout_probability, dropout_key) @ value


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the attention in which no query sees a later key; the queries are the last positions of the keys.

    Shapes are those of `scaled_dot_product_attention`.
    """
    mask = causal_mask(query.shape[-2], key.shape[-2], query.device)
    return scaled_dot_product_attention(query, key, value, mask)


def causal_mask(num_queries: int, num_keys: int, device: torch.device | str | None = None) -> Tensor:
    """Return the bool mask `(num_queries, num_keys)`, True where a query may look.

    The queries are the last ones: query i is at position `num_keys - num_queries + i`, as in decoding with a cache.
    """
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return mask.tril(diagonal=num_keys - num_queries)


def document_positions(token_ids: Tensor, separator_id: int) -> Tensor:
    """Return the place of each id of `token_ids` `(..., seq)` in its document, counted from 0.

    A document begins with the separator before its text, as a text that is generated does. What comes before a row's
    first separator is the end of a document; its first id here is at place 0.
    """
    places = torch.arange(token_ids.shape[-1], device=token_ids.device)  # (seq)
    starts = (
        torch.where(token_ids == separator_id, places, 0).cummax(dim=-1).values
    )  # (..., seq), of each id's document
    return places - starts


def document_mask(positions: Tensor) -> Tensor:
    """Return the bool mask `(..., 1, seq, seq)` of causal attention within documents, True where a query may look.

    `positions` `(..., seq)` are the places of the ids in their documents: the id at place p sees itself and the p ids
    before it. The 1 stands for the heads.
    """
    seq_len = positions.shape[-1]
    places = torch.arange(seq_len, device=positions.device)  # (seq)
    starts = (places - positions).unsqueeze(-1)  # (..., seq, 1), where each query's document begins
    return ((places >= starts) & causal_mask(seq_len, seq_len, positions.device)).unsqueeze(-3)


def document_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Return the attention under the `document_mask` of a batch; shapes are `(batch, heads, seq, d)`."""
    return scaled_dot_product_attention(query, key, value, mask)


def repeat_kv_heads(x: Tensor, query: Tensor) -> Tensor:
    """Repeat each head of `x` `(..., heads, seq, d)` for the consecutive heads of `query` that it serves.

    This is grouped-query attention (Ainslie et al. 2023). The result is `(..., heads of query, seq, d)`.
    """
    if count_heads(x) == count_heads(query):
        return x
    return x.repeat_interleave(count_heads(query) // count_heads(x), dim=-3)


def count_heads(x: Tensor) -> int:
    """Return the number of heads of `(..., heads, seq, d)`, which is 1 for `(seq, d)`."""
    return x.shape[-3] if x.ndim >= 3 else 1


def num_kept_probabilities(seq_len: int, d_k: int) -> int:
    """Return how many probabilities of one head causal attention keeps for its backward pass."""
    del d_k  # the plain form keeps all of them, whatever the size of a head
    return seq_len * seq_len


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of `x` `(..., seq, d)` by angles given as `cos` and `sin` `(..., seq, d / 2)`.

    `(even, odd)` becomes `(even cos - odd sin, even sin + odd cos)`, in at least fp32, in the dtype of `x`.
    """
    if x.device.type in ("cpu", "cuda") and _may_hand_over():  # hand-over: not every device has complex numbers
        return fast_rotate(x, cos, sin)
    wide = upcast(x)
    even, odd = wide[..., 0::2], wide[..., 1::2]  # (..., seq, d / 2)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)  # (..., seq, d / 2, 2)
    return rotated.flatten(-2).to(x.dtype)


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Return `cap * tanh(logits / cap)`, elementwise: about the same near 0, and never beyond +-cap.

    Gemma 2 (Riviere et al. 2024), section 2. In the dtype of `logits`.
    """
    return (cap * torch.tanh(upcast(logits) / cap)).to(logits.dtype)


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Return `-log softmax(logits)[target]` of each target `(...)` under logits `(..., vocab)`, in nats, at least fp32.

    It is computed as `log(sum(exp(logits))) - logits[target]`, with the maximum subtracted before `exp`.
    """
    if _may_hand_over():  # hand-over
        return fast_token_nats(logits, targets)
    wide = upcast(logits)
    maximum = wide.amax(dim=-1, keepdim=True).detach()  # (..., 1)
    log_total = (wide - maximum).exp().sum(dim=-1).log() + maximum.squeeze(-1)  # (...)
    return log_total - wide.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _may_hand_over() -> bool:
    return not torch.compiler.is_compiling() and may_hand_over()
