"""The baseline `nanochat_style`: cached decoding as in nanochat's engine, with our weights.

It allocates one tensor of keys and values for all layers, and uses `F.linear`, `F.rms_norm` and PyTorch's fused
attention on the unchanged weights. It computes the same function as our model, so that the ids can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformerlm.models.layers import RotaryEmbedding


class NanochatStyle:
    """Greedy generation with a Llama model; `weights` have our names."""

    def __init__(self, weights: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> None:
        self._weights, self._hparams = weights, hparams
        self._d_head = hparams["d_head"]
        embedding = weights["token_embeddings.weight"]
        self._head = weights.get("lm_head.weight", embedding)
        self._place: dict[str, Any] = {"device": embedding.device, "dtype": embedding.dtype}
        self._rope = RotaryEmbedding(
            hparams["rope_theta"],
            self._d_head,
            hparams["context_length"],
            scaling=hparams["rope_scaling"],
            device=embedding.device,
        )

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        """Return `count` new ids for each prompt; all have one length."""
        layers, heads = self._hparams["num_layers"], self._hparams["num_kv_heads"]
        ids = torch.tensor(prompts, device=self._place["device"])
        cache = torch.empty(layers, 2, len(ids), heads, ids.shape[1] + count, self._d_head, **self._place)
        columns, start = [], 0
        for _ in range(count):
            logits = self._forward(ids, cache, start)
            start += ids.shape[1]
            ids = logits[:, -1].argmax(dim=-1, keepdim=True)
            columns.append(ids)
        rows: list[list[int]] = torch.cat(columns, dim=1).tolist()
        return rows

    def _forward(self, ids: Tensor, cache: Tensor, start: int) -> Tensor:
        x = F.embedding(ids, self._weights["token_embeddings.weight"])
        for layer in range(self._hparams["num_layers"]):
            x = x + self._attention(self._norm(x, f"layers.{layer}.ln1"), layer, cache[layer], start)
            x = x + self._feed_forward(self._norm(x, f"layers.{layer}.ln2"), layer)
        return F.linear(self._norm(x[:, -1:], "ln_final"), self._head)

    def _attention(self, x: Tensor, layer: int, cache: Tensor, start: int) -> Tensor:
        names = (f"layers.{layer}.attn.{name}_proj.weight" for name in "qkv")
        query, key, value = (self._split(F.linear(x, self._weights[name])) for name in names)
        if self._hparams["qk_norm"]:
            query, key = (
                self._norm(each, f"layers.{layer}.attn.{name}_norm")
                for each, name in zip((query, key), "qk", strict=True)
            )
        end = start + x.shape[1]
        cache[0, :, :, start:end] = self._rope(key, offset=start)
        cache[1, :, :, start:end] = value
        mixed = F.scaled_dot_product_attention(
            self._rope(query, offset=start),
            cache[0, :, :, :end],
            cache[1, :, :, :end],
            is_causal=x.shape[1] > 1,
            enable_gqa=key.shape[1] < query.shape[1],
        )
        return F.linear(mixed.transpose(1, 2).flatten(2), self._weights[f"layers.{layer}.attn.output_proj.weight"])

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self._d_head).transpose(1, 2)  # (batch, heads, seq, d_head)

    def _feed_forward(self, x: Tensor, layer: int) -> Tensor:
        w1, w2, w3 = (self._weights[f"layers.{layer}.ffn.{name}.weight"] for name in ("w1", "w2", "w3"))
        return F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self._weights[f"{name}.weight"], self._hparams["norm_eps"])
