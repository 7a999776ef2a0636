"""The baseline `nanogpt_style`: a GPT written with torch.nn only, in the style of nanoGPT.

It has one matrix for query, key and value, learned positions, LayerNorm and GELU. Its matrices have as many numbers as
those of the LLaMA-like model of the same sizes, so both compute the same products; the operations between them differ,
and are cheaper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarking.peers.llama import other_choice


def why_not(hparams: Mapping[str, Any]) -> str | None:
    """Return a choice of our model with which its matrices are other ones, such as `num_kv_heads = 1`, or None."""
    d_head = hparams["d_model"] / hparams["num_heads"]
    ours = {"num_kv_heads": hparams["num_heads"], "d_head": d_head, "ffn": "swiglu", "tie_embeddings": False}
    return other_choice(hparams, ours)


class PlainBlock(nn.Module):
    """Attention and a feed-forward layer, each after a LayerNorm; `(batch, seq, d_model)` in and out."""

    def __init__(self, d_model: int, num_heads: int, d_hidden: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.ln1, self.ln2 = nn.LayerNorm(d_model, bias=False), nn.LayerNorm(d_model, bias=False)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.up = nn.Linear(d_model, d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, d_model = x.shape
        heads = self.qkv(self.ln1(x)).view(batch, seq, 3 * self.num_heads, -1).transpose(1, 2)  # (batch, 3 h, seq, d)
        query, key, value = heads.chunk(3, dim=1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).reshape(batch, seq, d_model))
        return x + self.down(F.gelu(self.up(self.ln2(x))))  # type: ignore[no-any-return]


class PlainGPT(nn.Module):
    """Ids `(batch, seq)` to logits `(batch, seq, vocab_size)`; `d_ff` is that of the gated model to compare with."""

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        d_ff: int,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.positions = nn.Embedding(context_length, d_model)
        # Two matrices instead of three.
        self.blocks = nn.ModuleList(PlainBlock(d_model, num_heads, 3 * d_ff // 2) for _ in range(num_layers))
        self.ln = nn.LayerNorm(d_model, bias=False)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.tokens(token_ids) + self.positions(torch.arange(token_ids.shape[1], device=token_ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))  # type: ignore[no-any-return]
