"""Causal attention in blocks that stay in a processor's cache, for bfloat16 on a CPU.

PyTorch's fused kernel computes bfloat16 on a CPU row by row, many times slower than the processor multiplies. Here a
block of queries meets all keys that it may look at as one batched product, over a few heads at a time, so that the
scores (the only large thing) are written and read in the cache; keys after the block's last query are left out. The
backward pass makes the probabilities again instead of keeping them (Chen et al. 2016; Dao et al. 2022), so that memory
grows with the sequence, not with its square.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_QUERY_ROWS = 128
_BLOCK_SCORES = 2**18  # for each thread: half a megabyte


def blocked_causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return `softmax(query key^T / sqrt(d_k), where key <= query) value`, all of them `(..., seq, d)`.

    The scores are rounded to the inputs' dtype, as in attention that is written out under autocast; the softmax over
    them is computed in fp32 and rounded again.
    """
    shape = query.shape
    flat = (x.reshape(-1, *x.shape[-2:]) for x in (query * (1.0 / math.sqrt(shape[-1])), key, value))
    with torch.autocast(query.device.type, enabled=False):  # it would widen the softmax
        result: Tensor = _BlockedCausalAttention.apply(*flat)  # type: ignore[no-untyped-call]
    return result.view(*shape[:-1], value.shape[-1])


class _BlockedCausalAttention(torch.autograd.Function):
    """`softmax(query key^T + mask) value`, each `(heads, seq, d)`; the query is scaled already."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        output = torch.empty_like(value)
        for heads, rows, keys in _blocks(query):
            weights = _probabilities(query[heads, rows], key[heads, keys])
            torch.bmm(weights, value[heads, keys], out=output[heads, rows])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, output = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        grad_query = torch.empty_like(query)
        # Several blocks of queries add to a key's gradient.
        grad_key, grad_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
        # The softmax's gradient needs sum_j p_j dp_j, which is the product of output and its gradient.
        inner = (output * grad_output).sum(dim=-1, keepdim=True)
        for heads, rows, keys in _blocks(query):
            weights = _probabilities(query[heads, rows], key[heads, keys])
            grads = grad_output[heads, rows]
            grad_value[heads, keys] += weights.transpose(1, 2) @ grads
            scores = grads @ value[heads, keys].transpose(1, 2)
            scores.sub_(inner[heads, rows]).mul_(weights)
            torch.bmm(scores, key[heads, keys], out=grad_query[heads, rows])
            grad_key[heads, keys] += scores.transpose(1, 2) @ query[heads, rows]
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _blocks(query: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Yield heads, rows of queries, and the keys that these may look at."""
    num_heads, seq_len, _ = query.shape
    for start in range(0, seq_len, _QUERY_ROWS):
        end = min(start + _QUERY_ROWS, seq_len)
        count = max(1, _BLOCK_SCORES * torch.get_num_threads() // ((end - start) * end))
        for head in range(0, num_heads, count):
            yield slice(head, head + count), slice(start, end), slice(0, end)


def _probabilities(query: Tensor, key: Tensor) -> Tensor:
    """Return the softmax of the scores of the last keys' queries, `(heads, rows, keys)`."""
    num_rows, num_keys = query.shape[1], key.shape[1]
    mask = torch.full((num_rows, num_keys), -math.inf, dtype=query.dtype).triu_(num_keys - num_rows + 1)
    scores = torch.baddbmm(mask.expand(len(query), -1, -1), query, key.transpose(1, 2))
    return torch.softmax(scores, dim=-1)
