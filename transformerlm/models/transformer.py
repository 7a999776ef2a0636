"""The decoder-only Transformer language model: ids in, logits out.

It knows plain keyword arguments and tensors; no config, no optimizer, no tokenizer. The block is that of LLaMA (Touvron
et al. 2023): RMSNorm before each sub-layer, rotary positions, SwiGLU; the keywords switch single choices off for
ablations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from profiling import nvtx
from transformerlm.models.attention import ATTENTION_IMPLEMENTATIONS, AttentionImplementation, MultiHeadSelfAttention
from transformerlm.models.estimates import count_parameters, default_d_ff, flops_per_token
from transformerlm.models.kv_cache import KVCache, LayerCache
from transformerlm.models.layers import (
    FEED_FORWARDS,
    Embedding,
    Linear,
    RMSNorm,
    RotaryEmbedding,
    feed_forward,
    soft_cap,
)

NormPosition = Literal["pre", "post", "none"]
Position = Literal["rope", "none"]


class TransformerBlock(nn.Module):
    """Self-attention and a feed-forward layer, each with a residual connection; `(batch, seq, d_model)` in and out.

    `norm_position` is "pre" for `x + f(norm(x))`, "post" for `norm(x + f(x))`, "none" for `x + f(x)`. `ffn` names
    one of `FEED_FORWARDS`. Further keywords go to `MultiHeadSelfAttention`.
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm_position = norm_position
        self.attn = MultiHeadSelfAttention(d_model, num_heads, norm_eps=norm_eps, **attention, **place)
        self.ffn = feed_forward(ffn)(d_model, d_ff, **place)
        has_norms = norm_position != "none"
        self.ln1: nn.Module = RMSNorm(d_model, norm_eps, **place) if has_norms else nn.Identity()
        self.ln2: nn.Module = RMSNorm(d_model, norm_eps, **place) if has_norms else nn.Identity()

    def forward(self, x: Tensor, *, token_positions: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        x = self._residual(x, self.ln1, lambda h: self._attend(h, token_positions, cache))
        return self._residual(x, self.ln2, self._feed_forward)

    def _residual(self, x: Tensor, norm: nn.Module, layer: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_position == "post":
            return norm(x + layer(x))  # type: ignore[no-any-return]
        return x + layer(norm(x))

    def _attend(self, x: Tensor, token_positions: Tensor | None, cache: LayerCache | None) -> Tensor:
        with nvtx.range("attention", level="fine"):
            return self.attn(x, token_positions=token_positions, cache=cache)  # type: ignore[no-any-return]

    def _feed_forward(self, x: Tensor) -> Tensor:
        with nvtx.range("ffn", level="fine"):
            return self.ffn(x)  # type: ignore[no-any-return]


class TransformerLM(nn.Module):
    """A causal language model: ids `(batch, seq)` to logits `(batch, seq, vocab_size)`.

    `d_ff` defaults to `default_d_ff`, `num_kv_heads` to `num_heads`. `rope_scaling` holds the keywords of
    `rope_factors`, which slow the rotary embedding down for a longer context than that of an earlier training. There is
    a final norm with `norm_position="pre"` only: a "post" block already ends in one, as in the original Transformer,
    and "none" has none at all. With
    `tie_embeddings` the head is the token embedding (Press & Wolf 2017), there is no `lm_head`, and the embedding is
    drawn from N(0, 1 / d_model) instead of N(0, 1): a normed vector then has logits of standard deviation 1, not
    sqrt(d_model). With `logit_soft_cap` the logits are `soft_cap(logits, logit_soft_cap)`. With `zero_init_outputs` the
    last matrix of each sub-layer, `output_proj` and `w2`, begins as zero, so that every block begins as `f(x) = 0`
    beside its residual connection (as in Fixup, Zhang et al. 2019). A tied head then sees each token itself, as it does
    after a "post" norm, and would expect it again: the last norm begins with less weight. Raises ValueError when sizes
    do not divide or a choice is unknown.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        d_ff: int | None = None,
        rope_theta: float = 10000.0,
        rope_scaling: Mapping[str, float] | None = None,
        num_kv_heads: int | None = None,
        norm_position: NormPosition = "pre",
        position: Position = "rope",
        ffn: str = "swiglu",
        tie_embeddings: bool = False,
        qk_norm: bool = False,
        attention: AttentionImplementation = "fused",
        norm_eps: float = 1e-5,
        activation_checkpointing: bool = False,
        logit_soft_cap: float | None = None,
        zero_init_outputs: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hparams = {name: value for name, value in locals().items() if name in HPARAMS}
        hparams["d_ff"] = default_d_ff(d_model, ffn) if d_ff is None else d_ff
        hparams["num_kv_heads"] = num_heads if num_kv_heads is None else num_kv_heads
        check_hparams(hparams)
        self._hparams = hparams
        self.vocab_size, self.context_length, self.d_model = vocab_size, context_length, d_model
        self.activation_checkpointing, self.logit_soft_cap = activation_checkpointing, logit_soft_cap

        place: dict[str, Any] = {"device": device, "dtype": dtype}
        std = d_model**-0.5 if tie_embeddings else 1.0
        self.token_embeddings = Embedding(vocab_size, d_model, std=std, **place)
        # Assigned to each layer too: one module, one pair of tables.
        rope = (
            RotaryEmbedding(rope_theta, d_model // num_heads, context_length, scaling=rope_scaling, device=device)
            if position == "rope"
            else None
        )
        self.layers = nn.ModuleList(
            TransformerBlock(
                d_model,
                num_heads,
                hparams["d_ff"],
                norm_position=norm_position,
                ffn=ffn,
                norm_eps=norm_eps,
                num_kv_heads=num_kv_heads,
                rope=rope,
                qk_norm=qk_norm,
                implementation=attention,
                **place,
            )
            for _ in range(num_layers)
        )
        if zero_init_outputs:
            self._zero_outputs()
        self.ln_final = RMSNorm(d_model, norm_eps, **place) if norm_position == "pre" else None
        self.lm_head = None if tie_embeddings else Linear(d_model, vocab_size, **place)
        if tie_embeddings and (zero_init_outputs or norm_position == "post"):
            self._soften_last_norm()

    def forward(
        self, token_ids: Tensor, *, cache: KVCache | None = None, last_only: bool = False, head: bool = True
    ) -> Tensor:
        """Return the logits after each of `token_ids`; with a cache, they stand behind what it holds and are appended.

        `last_only` gives the logits after the last id alone, `(batch, 1, vocab_size)`, which is enough to generate.
        Without `head` the vectors before the output head are returned, `(batch, seq, d_model)`; see `head_weight`.
        Raises ValueError when the sequence is longer than `context_length`, or than the room left in the cache.
        """
        self._check_length(token_ids, cache)
        x = self.token_embeddings(token_ids)  # (batch, seq, d_model)
        for index, layer in enumerate(self.layers):
            if cache is not None:
                x = layer(x, cache=cache.layers[index])
            elif self.activation_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        x = x[:, -1:] if last_only else x
        if self.ln_final is not None:
            x = self.ln_final(x)
        if not head:
            return x  # type: ignore[no-any-return]
        logits: Tensor = x @ self.head_weight.T
        return logits if self.logit_soft_cap is None else soft_cap(logits, self.logit_soft_cap)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.token_embeddings.weight.device

    @property
    def head_weight(self) -> Tensor:
        """The matrix `(vocab_size, d_model)` that makes logits of vectors; with tied embeddings, theirs."""
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
            num_kv_heads=self._hparams["num_kv_heads"],
            max_length=max_length,
            d_head=self.d_model // self._hparams["num_heads"],
            device=weight.device,
            dtype=weight.dtype if dtype is None else dtype,
        )

    def hparams(self) -> dict[str, Any]:
        """Return the keywords that build this model again, `TransformerLM(**hparams)`, defaults filled in."""
        return dict(self._hparams)

    def extra_repr(self) -> str:
        """Return the number of parameters and the hyper-parameters, for `print(model)`."""
        return f"{self.num_parameters():,} parameters, " + ", ".join(f"{k}={v!r}" for k, v in self._hparams.items())

    def num_parameters(self) -> int:
        """Return the number of trainable numbers; a tied embedding counts once."""
        return count_parameters(self._hparams)

    def num_flops_per_token(self, seq_len: int | None = None) -> int:
        """Return the FLOPs of a forward and backward pass per token, at `seq_len` (default: context_length) tokens."""
        return flops_per_token(self._hparams, self.context_length if seq_len is None else seq_len)

    def _zero_outputs(self) -> None:
        for name, parameter in self.layers.named_parameters():
            if name.endswith(("output_proj.weight", "w2.weight")):
                nn.init.zeros_(parameter)

    def _soften_last_norm(self) -> None:
        """Let the last norm, if any, begin so small that a token's logit for itself is log(vocab_size) / 2."""
        last_norm = self.layers[-1].ln2 if self.ln_final is None else self.ln_final
        if isinstance(last_norm, RMSNorm):
            nn.init.constant_(last_norm.weight, min(1.0, math.log(self.vocab_size) / 2 / math.sqrt(self.d_model)))

    def _check_length(self, token_ids: Tensor, cache: KVCache | None) -> None:
        batch_size, seq_len = token_ids.shape
        if cache is not None:
            cache.check(batch_size, seq_len)
        elif seq_len > self.context_length:
            raise ValueError(f"model: {seq_len} tokens exceed context_length {self.context_length}")


HPARAMS = (
    "vocab_size",
    "context_length",
    "d_model",
    "num_layers",
    "num_heads",
    "d_ff",
    "rope_theta",
    "rope_scaling",
    "num_kv_heads",
    "norm_position",
    "position",
    "ffn",
    "tie_embeddings",
    "qk_norm",
    "attention",
    "norm_eps",
    "activation_checkpointing",
    "logit_soft_cap",
    "zero_init_outputs",
)
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_context_length")
_SIZES = ("vocab_size", "context_length", "d_model", "num_layers", "num_heads", "d_ff", "num_kv_heads")
_CHOICES: dict[str, tuple[str, ...]] = {
    "norm_position": ("pre", "post", "none"),
    "position": ("rope", "none"),
    "ffn": tuple(FEED_FORWARDS),
    "attention": ATTENTION_IMPLEMENTATIONS,
}


def check_hparams(hparams: dict[str, Any]) -> None:
    """Raise ValueError when a size is not positive, a choice is unknown, or sizes do not divide."""
    for name in _SIZES:
        if hparams[name] < 1:
            raise ValueError(f"model.{name}: expected at least 1, got {hparams[name]}")
    for name, choices in _CHOICES.items():
        if hparams[name] not in choices:
            raise ValueError(f"model.{name}: expected one of {', '.join(choices)}, got {hparams[name]!r}")
    cap = hparams["logit_soft_cap"]
    if cap is not None and not 0.0 < cap < math.inf:
        raise ValueError(f"model.logit_soft_cap: expected a positive number or none, got {cap}")
    d_model, num_heads, num_kv_heads = hparams["d_model"], hparams["num_heads"], hparams["num_kv_heads"]
    if d_model % num_heads:
        raise ValueError(f"model: d_model ({d_model}) is not divisible by num_heads ({num_heads})")
    if num_heads % num_kv_heads:
        raise ValueError(f"model: num_heads ({num_heads}) is not divisible by num_kv_heads ({num_kv_heads})")
    if hparams["position"] == "rope" and (d_model // num_heads) % 2:
        sizes = f"d_model ({d_model}) / num_heads ({num_heads}) = {d_model // num_heads}"
        raise ValueError(f"model: position = rope needs an even head size, got {sizes}")
    if hparams["rope_scaling"] is not None:
        _check_rope_scaling(hparams["rope_scaling"], hparams["position"])


def _check_rope_scaling(scaling: Mapping[str, float], position: str) -> None:
    if position != "rope":
        raise ValueError(f"model.rope_scaling: expected none with position = {position}, got {dict(scaling)}")
    if set(scaling) != set(ROPE_SCALING):
        raise ValueError(f"model.rope_scaling: expected {', '.join(ROPE_SCALING)}, got {', '.join(scaling) or 'none'}")
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if not (
        1 <= scaling["factor"] < math.inf and 0 < low < high < math.inf and scaling["original_context_length"] >= 1
    ):
        expected = "factor >= 1, 0 < low_freq_factor < high_freq_factor and original_context_length >= 1"
        raise ValueError(f"model.rope_scaling: expected {expected}, got {dict(scaling)}")
