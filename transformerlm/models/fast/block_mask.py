"""Attention within documents on a GPU, by PyTorch's FlexAttention: blocks of keys that nobody may look at are skipped.

A mask of bools makes PyTorch's other kernels read a table of `seq * seq` for each sequence, and compute what it hides.
FlexAttention (Dong et al. 2024, "Flex Attention: A Programming Model for Generating Optimized Attention Kernels")
compiles the rule "not later, and not before the document's beginning" into the kernel. With short documents in a long
context most blocks are skipped.

Twin of `block_mask`: `transformerlm.models.functional.document_mask`
Twin of `document_attention`: `transformerlm.models.functional.document_attention`
Test: tests/models/fast/test_block_mask.py
Pays: not yet measured; 8 documents of 512 tokens in a context of 4,096 leave a ninth of causal attention's pairs
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


def block_mask(positions: Tensor) -> Any:
    """Return the mask of causal attention within documents; `positions` `(batch, seq)` are the ids' places in them."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch_size, seq_len = positions.shape
    starts = torch.arange(seq_len, device=positions.device) - positions  # (batch, seq), where documents begin

    def may_look(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts[batch, query])

    device = str(positions.device)
    return create_block_mask(may_look, batch_size, None, seq_len, seq_len, device=device)


def document_attention(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    """Return the attention under the mask, `(batch, heads, seq, d)`; key and value may have fewer heads than query."""
    shared = key.shape[-3] != query.shape[-3]
    output: Tensor = _kernel()(query, key, value, block_mask=mask, enable_gqa=shared)
    return output


def _kernel() -> Any:
    """Return FlexAttention: within a compiled model as it is, on CUDA otherwise compiled by itself."""
    from torch.nn.attention.flex_attention import flex_attention

    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return flex_attention
    return _compiled()


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
