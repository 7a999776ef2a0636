"""Causal attention in blocks that stay in a processor's cache, for bfloat16 on a CPU.

PyTorch's fused kernel computes bfloat16 on a CPU row by row, many times slower than the processor multiplies. Here a
block of queries meets all keys that it may look at as one batched product, over a few heads at a time, so that the
scores (the only large thing) are written and read in the cache; keys after the block's last query are omitted. Short
sequences keep the probabilities for the backward pass. Long ones recompute them (Chen et al. 2016; Dao et al. 2022), so
that memory grows with the sequence, not with its square.

Twin of `blocked_causal_attention`: `transformerlm.models.functional.causal_attention`
Twin of `num_kept_probabilities`: `transformerlm.models.functional.num_kept_probabilities`
Test: tests/models/fast/test_blocked_attention.py
Pays: 36 ms a layer to 18 in a training step of 4 x 256 tokens in bf16, one thread (docs/LOG.md, 2026-11-21)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_Block = tuple[slice, slice, slice, Tensor]
_KeptBlock = tuple[_Block, Tensor | None]
_QUERY_ROWS = 128
_BLOCK_SCORES = 2**20  # for each thread: two megabytes
_KEPT_SEQ_LEN_PER_DIM = 8


def blocked_causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return `softmax(query key^T / sqrt(d_k), where key <= query) value`, all of them `(..., seq, d)`.

    The scores are rounded to the inputs' dtype, as in attention that is written out under autocast; the softmax over
    them is computed in fp32 and rounded again.
    """
    flat = [x.reshape(-1, *x.shape[-2:]) for x in (query, key, value)]
    keep = torch.is_grad_enabled() and num_kept_probabilities(*query.shape[-2:]) > 0
    if torch.compiler.is_compiling():  # the compiler cannot look into what follows, and takes it as one operator
        traced: Tensor = traced_attention(*flat, keep)[0]
        return traced.view(*query.shape[:-1], value.shape[-1])
    with torch.autocast(query.device.type, enabled=False):  # it would widen the softmax
        result: Tensor = _BlockedCausalAttention.apply(*flat, keep)  # type: ignore[no-untyped-call]
    return result.view(*query.shape[:-1], value.shape[-1])


def num_kept_probabilities(seq_len: int, d_k: int) -> int:
    """Return how many probabilities of one head are kept for the backward pass; none where seq_len is large for d_k."""
    if seq_len > _KEPT_SEQ_LEN_PER_DIM * d_k:
        return 0
    return sum((rows.stop - rows.start) * rows.stop for rows in _row_blocks(seq_len))


class _BlockedCausalAttention(torch.autograd.Function):
    """`softmax(query key^T / sqrt(d_k) + mask) value`, each `(heads, seq, d)`.

    With P the probabilities and g the result's gradient: `dV = P^T g`, `dP = g V^T`, the scores' is
    `dS = P (dP - sum_j P dP)`, `dQ = dS K / sqrt(d_k)`, `dK = dS^T Q / sqrt(d_k)`.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, keep: bool) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        output, kept = torch.empty_like(value), []
        ctx.num_threads = torch.get_num_threads()  # the backward pass needs the same blocks
        for heads, rows, keys, mask in _blocks(query, ctx.num_threads):
            weights = _probabilities(query[heads, rows], key[heads, keys], mask)  # (heads, rows, keys)
            torch.bmm(weights, value[heads, keys], out=output[heads, rows])
            if keep:
                kept.append(weights)
        ctx.save_for_backward(query, key, value, output, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *kept = ctx.saved_tensors
        blocks = zip_longest(_blocks(query, ctx.num_threads), kept)
        return *_gradients(grad_output.contiguous(), query, key, value, output, blocks), None


def _gradients(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, blocks: Iterable[_KeptBlock]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; each block comes with its probabilities, or None: recompute."""
    grad_query = torch.empty_like(query)
    # Several blocks of queries add to a key's gradient.
    wide = torch.promote_types(query.dtype, torch.float32)
    grad_key, grad_value = (torch.zeros_like(x, dtype=wide) for x in (key, value))
    # sum_j P dP, which is the product of the result and its gradient: no table of scores is needed for it.
    inner = (output * grad_output).sum(dim=-1, keepdim=True)  # (heads, seq, 1)
    for (heads, rows, keys, mask), kept in blocks:
        weights = _probabilities(query[heads, rows], key[heads, keys], mask) if kept is None else kept
        grads = grad_output[heads, rows]  # (heads, rows, d)
        grad_value[heads, keys] += weights.transpose(1, 2) @ grads
        scores = grads @ value[heads, keys].transpose(1, 2)  # dP, (heads, rows, keys)
        scores.sub_(inner[heads, rows]).mul_(weights)  # dS, in place of dP
        torch.bmm(scores, key[heads, keys], out=grad_query[heads, rows])
        grad_key[heads, keys] += scores.transpose(1, 2) @ query[heads, rows]
    scale = _scale(query)
    return grad_query.mul_(scale), grad_key.mul_(scale).to(key.dtype), grad_value.to(value.dtype)


@torch.library.custom_op("transformerlm::causal_attention", mutates_args=())
def traced_attention(query: Tensor, key: Tensor, value: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Return the result of `_BlockedCausalAttention`, and its probabilities in one row, none unless `keep`."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    output, kept = torch.empty_like(value), _room_for_probabilities(query, keep)
    with torch.autocast(query.device.type, enabled=False):
        for heads, rows, keys, mask in _blocks(query, torch.get_num_threads()):
            place = _place(kept, query, heads, rows) if keep else None
            weights = _probabilities(query[heads, rows], key[heads, keys], mask, out=place)  # (heads, rows, keys)
            torch.bmm(weights, value[heads, keys], out=output[heads, rows])
    return output, kept


@torch.library.custom_op("transformerlm::causal_attention_backward", mutates_args=())
def _traced_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; an empty `kept` lets the probabilities be recomputed."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    kept_blocks = (
        (block, _place(kept, query, *block[:2]) if len(kept) else None)
        for block in _blocks(query, torch.get_num_threads())
    )
    with torch.autocast(query.device.type, enabled=False):
        return _gradients(grad_output.contiguous(), query, key, value, output, kept_blocks)


@traced_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return value.new_empty(value.shape), _room_for_probabilities(query, keep)


@_traced_backward.register_fake
def _(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)


@partial(traced_attention.register_autograd, setup_context=_save)
def _backward(ctx: Any, grad_output: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_traced_backward(grad_output, *ctx.saved_tensors), None


def _room_for_probabilities(query: Tensor, keep: bool) -> Tensor:
    num_heads, seq_len, d_k = query.shape
    return query.new_empty(num_heads * num_kept_probabilities(seq_len, d_k) if keep else 0)


def _place(kept: Tensor, query: Tensor, heads: slice, rows: slice) -> Tensor:
    """Return where the probabilities of a block are in `kept`, `(heads, rows, keys)`: rows first, then heads."""
    num_heads = len(query)
    before = sum((block.stop - block.start) * block.stop for block in _row_blocks(rows.start))
    shape = len(range(num_heads)[heads]), rows.stop - rows.start, rows.stop
    return kept[num_heads * before + heads.start * shape[1] * shape[2] :][: math.prod(shape)].view(shape)


def _blocks(query: Tensor, num_threads: int) -> Iterator[_Block]:
    """Yield heads, rows of queries, the keys that these rows may look at, and 0 or -inf for each `(rows, keys)`."""
    num_heads, seq_len, _ = query.shape
    for rows in _row_blocks(seq_len):
        num_rows, num_keys = rows.stop - rows.start, rows.stop
        mask = torch.full((num_rows, num_keys), -math.inf, dtype=query.dtype).triu_(rows.start + 1)
        count = max(1, _BLOCK_SCORES * num_threads // (num_rows * num_keys))
        for head in range(0, num_heads, count):
            yield slice(head, head + count), rows, slice(0, num_keys), mask


def _row_blocks(seq_len: int) -> Iterator[slice]:
    return (slice(start, min(start + _QUERY_ROWS, seq_len)) for start in range(0, seq_len, _QUERY_ROWS))


def _probabilities(query: Tensor, key: Tensor, mask: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return the softmax of the scores, `(heads, rows, keys)`, in `out` if it is given."""
    every_head = mask.expand(len(query), -1, -1)
    scores = torch.baddbmm(every_head, query, key.transpose(1, 2), alpha=_scale(query))
    return torch.softmax(scores, dim=-1, out=out)


def _scale(query: Tensor) -> float:
    return float(query.shape[-1] ** -0.5)
