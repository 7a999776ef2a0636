"""The decoder-only Transformer language model: ids in, logits out.

It knows plain keyword arguments and tensors; no config, no optimizer, no tokenizer. The block is that of LLaMA (Touvron
et al. 2023): RMSNorm before each sub-layer, rotary positions, SwiGLU; the keywords switch single choices off for
ablations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transformerlm.models.attention import AttentionMask, MultiHeadSelfAttention, attention_mask
from transformerlm.models.dropout import KEYS_OF_LAYER, dropout, num_keys
from transformerlm.models.estimates import count_parameters, flops_per_token
from transformerlm.models.functional import soft_cap
from transformerlm.models.kv_cache import KVCache, LayerCache
from transformerlm.models.layers import Embedding, Linear, RMSNorm, RotaryEmbedding, feed_forward
from transformerlm.models.settings import ModelSettings, NormPosition


class TransformerBlock(nn.Module):
    """Self-attention and a feed-forward layer, each with a residual connection; `(batch, seq, d_model)` in and out.

    `norm_position` is "pre" for `x + f(norm(x))`, "post" for `norm(x + f(x))`, "none" for `x + f(x)`. `ffn` names
    one of `FEED_FORWARDS`. `residual_dropout` is the probability of each number that a sub-layer adds to be dropped.
    Further keywords go to `MultiHeadSelfAttention`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        *,
        norm_position: NormPosition = "pre",
        ffn: str = "swiglu",
        norm_eps: float = 1e-5,
        residual_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm_position, self.residual_dropout = norm_position, residual_dropout
        self.attn = MultiHeadSelfAttention(d_model, num_heads, norm_eps=norm_eps, **attention, **place)
        self.ffn = feed_forward(ffn)(d_model, d_ff, **place)
        has_norms = norm_position != "none"
        self.ln1: nn.Module = RMSNorm(d_model, norm_eps, **place) if has_norms else nn.Identity()
        self.ln2: nn.Module = RMSNorm(d_model, norm_eps, **place) if has_norms else nn.Identity()

    def forward(
        self,
        x: Tensor,
        *,
        token_positions: Tensor | None = None,
        mask: AttentionMask | None = None,
        cache: LayerCache | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """Return the block's output for `x` `(batch, seq, d_model)`.

        `token_positions`, `mask` and `cache` are those of `MultiHeadSelfAttention`. With the `dropout_keys` of its
        layer, `(3, batch, 2)`, numbers are dropped.
        """
        keys = [None] * KEYS_OF_LAYER if dropout_keys is None else dropout_keys
        attention: dict[str, Any] = {
            "token_positions": token_positions,
            "mask": mask,
            "cache": cache,
            "dropout_key": keys[0],
        }
        if self.norm_position == "post":
            x = self.ln1(x + dropout(self.attn(x, **attention), self.residual_dropout, keys[1]))
            return self.ln2(x + dropout(self.ffn(x), self.residual_dropout, keys[2]))  # type: ignore[no-any-return]
        x = x + dropout(self.attn(self.ln1(x), **attention), self.residual_dropout, keys[1])
        x = x + dropout(self.ffn(self.ln2(x)), self.residual_dropout, keys[2])
        return x  # noqa: RET504  # so that the block is two lines of one form


class TransformerLM(nn.Module):
    """A causal language model: ids `(batch, seq)` to logits `(batch, seq, vocab_size)`.

    It is built from a `ModelSettings`, or from the keywords of one: `vocab_size`, `context_length`, `d_model`,
    `num_layers`, `num_heads`, and optionally `num_kv_heads`, `d_head`, `d_ff`, `rope_theta` and the choices below.

    - `rope_scaling` holds the keywords of `rope_factors`, which slow the rotary embedding down for a longer context
      than that of an earlier training.
    - There is a final norm with `norm_position="pre"` only: a "post" block already ends in one, as in the original
      Transformer, and "none" has none at all.
    - With `tie_embeddings` the head is the token embedding (Press & Wolf 2017), there is no `lm_head`, and the
      embedding is drawn from N(0, 1 / d_model) instead of N(0, 1): a normed vector then has logits of standard
      deviation 1, not sqrt(d_model).
    - With `logit_soft_cap` the logits are `soft_cap(logits, logit_soft_cap)`.
    - With `zero_init_outputs` the last matrix of each sub-layer, `output_proj` and `w2`, begins as zero, so that every
      block begins as `f(x) = 0` beside its residual connection (as in Fixup, Zhang et al. 2019). A tied head then sees
      each token itself, as it does after a "post" norm, and would expect it again: the last norm begins with less
      weight.
    - With `document_mask` training must say where documents are, by `document_positions`. A text that is generated is a
      document by itself, and needs none.
    - `dropout` holds a probability for each of `dropout.PLACES`; one that is absent is 0. Numbers are dropped in a
      forward pass that gets `dropout_keys`, and in no other.

    Raises ValueError when sizes do not divide or a choice is unknown.
    """

    def __init__(
        self,
        settings: ModelSettings | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__()
        if settings is None:
            settings = ModelSettings(**keywords)
        elif keywords:
            raise ValueError(f"model: expected settings or keywords, got settings and {', '.join(keywords)}")
        self.settings = settings
        self.vocab_size, self.context_length = settings.vocab_size, settings.context_length
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        d_model, tied = settings.d_model, settings.tie_embeddings

        self.token_embeddings = Embedding(self.vocab_size, d_model, std=d_model**-0.5 if tied else 1.0, **place)
        rope = _rotary_embedding(settings, device)
        self.layers = nn.ModuleList(_block(settings, rope, place) for _ in range(settings.num_layers))
        if settings.zero_init_outputs:
            self._zero_outputs()
        has_final_norm = settings.norm_position == "pre"
        self.ln_final = RMSNorm(d_model, settings.norm_eps, **place) if has_final_norm else None
        self.lm_head = None if tied else Linear(d_model, self.vocab_size, **place)
        if tied and (settings.zero_init_outputs or settings.norm_position == "post"):
            self._soften_last_norm()

    def forward(
        self,
        token_ids: Tensor,
        *,
        cache: KVCache | None = None,
        last_only: bool = False,
        head: bool = True,
        document_positions: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """Return the logits after each of `token_ids`; with a cache, the ids follow what it holds and are appended.

        `last_only` gives the logits after the last id alone, `(batch, 1, vocab_size)`, which is enough to generate.
        Without `head` the vectors before the output head are returned, `(batch, seq, d_model)`; see `head_weight`.
        `document_positions` `(batch, seq)`, those of `functional.document_positions`, keep attention within documents.
        `dropout_keys` are a key for each sequence and each place that drops numbers, `(num_keys, batch, 2)` in int32:
        see `transformerlm.models.dropout`. Raises ValueError when the sequence is longer than `context_length`, or than
        the room left in the cache, for document positions together with a cache, and in training for a model with
        `document_mask` and no positions, or with dropout and no keys.
        """
        self._check_length(token_ids, cache)
        self._check_documents(document_positions, cache)
        keys = self._keys_by_layer(dropout_keys)
        x = self.token_embeddings(token_ids)  # (batch, seq, d_model)
        if dropout_keys is not None:
            x = dropout(x, self.settings.dropout_at("embedding"), dropout_keys[0])
        where: dict[str, Any] = {"token_positions": document_positions, "mask": None}
        if document_positions is not None:
            where["mask"] = attention_mask(document_positions, self.layers[0].attn)  # type: ignore[arg-type]
        caches = [None] * len(self.layers) if cache is None else cache.layers
        recompute = cache is None and self.settings.activation_checkpointing and self.training
        recompute = recompute and torch.is_grad_enabled()
        for layer, layer_cache, layer_keys in zip(self.layers, caches, keys, strict=True):
            inputs = {"cache": layer_cache, "dropout_keys": layer_keys, **where}
            if recompute:  # nothing in a layer draws from a generator: dropout follows from its key
                x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False, **inputs)
            else:
                x = layer(x, **inputs)
        x = x[:, -1:] if last_only else x
        if self.ln_final is not None:
            x = self.ln_final(x)
        if not head:
            return x  # type: ignore[no-any-return]
        logits: Tensor = x @ self.head_weight.T
        cap = self.settings.logit_soft_cap
        return logits if cap is None else soft_cap(logits, cap)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.token_embeddings.weight.device

    @property
    def head_weight(self) -> Tensor:
        """The matrix `(vocab_size, d_model)` that turns vectors into logits: the embedding's, if they are tied."""
        head: Linear | Embedding = self.token_embeddings if self.lm_head is None else self.lm_head
        return head.weight

    def make_cache(
        self, batch_size: int, max_length: int | None = None, *, dtype: torch.dtype | None = None
    ) -> KVCache:
        """Return an empty cache for `batch_size` sequences of at most `max_length` (default: `context_length`) tokens.

        `dtype` defaults to that of the weights. Raises ValueError when max_length exceeds context_length.
        """
        max_length = self.context_length if max_length is None else max_length
        if max_length > self.context_length:
            raise ValueError(
                f"KV cache: max_length {max_length} exceeds the model's context_length {self.context_length}"
            )
        weight = self.token_embeddings.weight
        return KVCache(
            num_layers=len(self.layers),
            batch_size=batch_size,
            num_kv_heads=self.settings.num_kv_heads,
            max_length=max_length,
            d_head=self.settings.d_head,
            device=weight.device,
            dtype=weight.dtype if dtype is None else dtype,
        )

    def hparams(self) -> dict[str, Any]:
        """Return the keywords that build this model again, `TransformerLM(**hparams)`, defaults filled in."""
        return asdict(self.settings)

    def extra_repr(self) -> str:
        """Return the number of parameters and the settings, for `print(model)`."""
        settings = ", ".join(f"{name}={value!r}" for name, value in asdict(self.settings).items())
        return f"{self.num_parameters():,} parameters, {settings}"

    def num_parameters(self) -> int:
        """Return the number of trainable numbers; a tied embedding counts once."""
        return count_parameters(self.settings)

    def num_flops_per_token(self, seq_len: int | None = None) -> int:
        """Return the FLOPs of a forward and backward pass per token, at `seq_len` (default: context_length) tokens."""
        return flops_per_token(self.settings, self.context_length if seq_len is None else seq_len)

    def _keys_by_layer(self, dropout_keys: Tensor | None) -> Sequence[Tensor | None]:
        """Return each layer's keys `(3, batch, 2)`, of those of the whole model; None where nothing is dropped."""
        num_layers = len(self.layers)
        if dropout_keys is None:
            if self.settings.drops and self.training and torch.is_grad_enabled():
                raise ValueError("model: expected dropout_keys, as the model has dropout and is in training, got none")
            return [None] * num_layers
        if len(dropout_keys) != num_keys(num_layers):
            raise ValueError(f"model: expected {num_keys(num_layers)} rows of dropout_keys, got {len(dropout_keys)}")
        return list(torch.split(dropout_keys[1:], KEYS_OF_LAYER))

    def _check_documents(self, document_positions: Tensor | None, cache: KVCache | None) -> None:
        if document_positions is not None and cache is not None:
            raise ValueError("model: expected document_positions or a cache, got both")
        if document_positions is None and self.settings.document_mask and self.training and torch.is_grad_enabled():
            raise ValueError(
                "model: expected document_positions, as the model has document_mask and is in training, got none"
            )

    def _zero_outputs(self) -> None:
        for name, parameter in self.layers.named_parameters():
            if name.endswith(("output_proj.weight", "w2.weight")):
                nn.init.zeros_(parameter)

    def _soften_last_norm(self) -> None:
        """Let the last norm, if any, begin so small that a token's logit for itself is log(vocab_size) / 2."""
        last_norm = self.layers[-1].ln2 if self.ln_final is None else self.ln_final
        if isinstance(last_norm, RMSNorm):
            gain = math.log(self.vocab_size) / 2 / math.sqrt(self.settings.d_model)
            nn.init.constant_(last_norm.weight, min(1.0, gain))

    def _check_length(self, token_ids: Tensor, cache: KVCache | None) -> None:
        batch_size, seq_len = token_ids.shape
        if cache is not None:
            cache.check(batch_size, seq_len)
        elif seq_len > self.context_length:
            raise ValueError(f"model: {seq_len} tokens exceed context_length {self.context_length}")


def _rotary_embedding(settings: ModelSettings, device: torch.device | str | None) -> RotaryEmbedding | None:
    """Return the one module, with one pair of tables, that all layers share."""
    if settings.position == "none":
        return None
    return RotaryEmbedding(
        settings.rope_theta, settings.d_head, settings.context_length, scaling=settings.rope_scaling, device=device
    )


def _block(settings: ModelSettings, rope: RotaryEmbedding | None, place: dict[str, Any]) -> TransformerBlock:
    return TransformerBlock(
        settings.d_model,
        settings.num_heads,
        settings.d_ff,
        norm_position=settings.norm_position,
        ffn=settings.ffn,
        norm_eps=settings.norm_eps,
        num_kv_heads=settings.num_kv_heads,
        d_head=settings.d_head,
        rope=rope,
        qk_norm=settings.qk_norm,
        implementation=settings.attention,
        dropout=settings.dropout_at("attention"),
        residual_dropout=settings.dropout_at("residual"),
        **place,
    )
