"""The settings of a model: its sizes and choices, their defaults and checks, and the sizes that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from transformerlm.models.attention import AttentionImplementation
from transformerlm.models.dropout import check_probabilities
from transformerlm.models.layers import FEED_FORWARDS, feed_forward

NormPosition = Literal["pre", "post", "none"]
Position = Literal["rope", "none"]
SAME_FUNCTION = frozenset({"activation_checkpointing", "attention", "document_mask", "dropout", "zero_init_outputs"})
"""The settings that change how a model is computed, trained or begins, not which function its weights are."""
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_context_length")
_SIZES = ("vocab_size", "context_length", "d_model", "num_layers", "num_heads", "d_ff", "num_kv_heads", "d_head")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What a `TransformerLM` is; the fields are the keys of [model] in a TOML file (see docs/configuration.md).

    `num_kv_heads` None becomes `num_heads`, `d_head` None `d_model / num_heads`, and `d_ff` None `default_d_ff`: after
    that they are numbers. Two models with equal settings have the same weights by the same names, and compute the same
    function of them. Raises ValueError when a size is not positive, a choice is unknown, or sizes do not divide.
    """

    vocab_size: int
    context_length: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = None  # type: ignore[assignment]  # __post_init__ turns None into a number
    d_head: int = None  # type: ignore[assignment]  # likewise
    d_ff: int = None  # type: ignore[assignment]  # likewise
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, float] | None = None
    norm_position: NormPosition = "pre"
    position: Position = "rope"
    ffn: str = "swiglu"
    tie_embeddings: bool = False
    qk_norm: bool = False
    attention: AttentionImplementation = "fused"
    document_mask: bool = False
    norm_eps: float = 1e-5
    activation_checkpointing: bool = False
    logit_soft_cap: float | None = None
    zero_init_outputs: bool = False
    dropout: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.d_head is None:
            object.__setattr__(self, "d_head", _default_d_head(self.d_model, self.num_heads))
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", default_d_ff(self.d_model, self.ffn))
        self._check_values()
        self._check_heads()
        check_probabilities(self.dropout or {})
        if self.rope_scaling is not None:
            _check_rope_scaling(self.rope_scaling, self.position)

    @property
    def d_query(self) -> int:
        """The features of all queries of one token."""
        return self.num_heads * self.d_head

    @property
    def d_kv(self) -> int:
        """The features of all keys, or all values, of one token."""
        return self.num_kv_heads * self.d_head

    @property
    def drops(self) -> bool:
        """Whether training drops numbers somewhere."""
        return any((self.dropout or {}).values())

    def dropout_at(self, place: str) -> float:
        """Return the probability with which a number is dropped there, one of `dropout.PLACES`."""
        return (self.dropout or {}).get(place, 0.0)

    def _check_values(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}: expected at least 1, got {getattr(self, name)}")
        for name, choices in _choices().items():
            if getattr(self, name) not in choices:
                raise ValueError(f"model.{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        cap = self.logit_soft_cap
        if cap is not None and not 0.0 < cap < math.inf:
            raise ValueError(f"model.logit_soft_cap: expected a positive number or none, got {cap}")

    def _check_heads(self) -> None:
        num_heads, num_kv_heads = self.num_heads, self.num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"model: num_heads ({num_heads}) is not divisible by num_kv_heads ({num_kv_heads})")
        if self.position == "rope" and self.d_head % 2:
            raise ValueError(f"model: position = rope needs an even d_head, got {self.d_head}")


def _default_d_head(d_model: int, num_heads: int) -> int:
    if num_heads > 0 and d_model % num_heads:
        raise ValueError(
            f"model: d_model ({d_model}) is not divisible by num_heads ({num_heads}), and d_head is not set"
        )
    return d_model // max(1, num_heads)


def default_d_ff(d_model: int, ffn: str = "swiglu") -> int:
    """Return the default feed-forward width: 8/3 d_model, at the nearest multiple of 64, if gated; else 4 d_model.

    The gated layer has three matrices instead of two, so 8/3 gives both the same number of parameters.
    """
    return max(64, round(d_model * 8 / 3 / 64) * 64) if len(feed_forward(ffn).UP) > 1 else 4 * d_model


def _choices() -> dict[str, tuple[str, ...]]:
    """Return the allowed values of each setting that has only a few; those of `ffn` are in the table of layers."""
    return {
        "norm_position": get_args(NormPosition),
        "position": get_args(Position),
        "ffn": tuple(FEED_FORWARDS),
        "attention": get_args(AttentionImplementation),
    }


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
