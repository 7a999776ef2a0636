"""What a model's page holds of a model and its tokenizer: arrays by their names, as the page's engine reads them.

The matrices are those that `transformerlm-infer` multiplies with at `precision = "int8"`: query, key and value stacked,
the two of SwiGLU likewise; then 8 bits a number and a scale for up to 512 of a row. The embedding is fp32, as there:
infer rounds a prompt's vectors to bfloat16, and where they differ a little before that, many of them differ by a step
after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from transformerlm.models.layers import feed_forward, rope_factors
from transformerlm.models.settings import SAME_FUNCTION, ModelSettings
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer.pretokenize import code_points
from transformerlm.tokenizer.tokenizer import Tokenizer

Parts = dict[str, np.ndarray]

# What the engine computes; of a setting with a few values, these values.
_CHOICES = {"ffn": ("swiglu", "silu"), "norm_position": ("pre", "post", "none"), "position": ("rope", "none")}
_SETTINGS = {
    "context_length", "d_ff", "d_head", "d_model", "logit_soft_cap", "norm_eps", "num_heads", "num_kv_heads",
    "num_layers", "qk_norm", "rope_scaling", "rope_theta", "tie_embeddings", "vocab_size",
}  # fmt: skip
# The settings that the engine reads; the others are in the arrays.
_READ = (
    "context_length", "d_ff", "d_head", "d_model", "ffn", "logit_soft_cap", "norm_eps", "norm_position", "num_heads",
    "num_kv_heads", "num_layers",
)  # fmt: skip
_MOST, _GROUP, _BLOCK = 127, 512, 32  # as `Int8Linear` has them


def check_known(settings: ModelSettings) -> None:
    """Refuse a model with a setting that the page's engine has not been taught: it would write another text.

    Raises:
        ValueError: names each setting.
    """
    names = {field.name for field in fields(settings)}
    problems = [f"model.{name}" for name in sorted(names - _SETTINGS - _CHOICES.keys() - SAME_FUNCTION)]
    problems += [
        f"model.{name} = {getattr(settings, name)!r}"
        for name, values in _CHOICES.items()
        if getattr(settings, name) not in values
    ]
    if problems:
        raise ValueError(f'format "html": {", ".join(problems)} is not computed by the page yet')


def engine_settings(settings: ModelSettings) -> dict[str, Any]:
    """Return the settings that the engine reads, by their names in [model]."""
    return {name: getattr(settings, name) for name in _READ}


def model_parts(model: TransformerLM, *, vocab_size: int) -> Parts:
    """Return the arrays of a model, without the ids from `vocab_size` on, which its tokenizer does not have."""
    settings, weights = model.settings, {name.removesuffix(".weight"): w for name, w in model.state_dict().items()}
    embedding = weights["token_embeddings"]
    parts = {"embedding": embedding[:vocab_size].float().numpy()}
    for layer in range(settings.num_layers):
        prefix = f"layers.{layer}."
        own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        parts |= {f"{layer}.{name}": part for name, part in _layer_parts(own, settings).items()}
    parts |= _quantised("head", weights.get("lm_head", embedding)[:vocab_size])
    if "ln_final" in weights:
        parts["ln_final"] = _gain(weights["ln_final"])
    if settings.position == "rope":
        parts["frequencies"] = _frequencies(settings)
    return parts


def _layer_parts(weights: Mapping[str, Tensor], settings: ModelSettings) -> Parts:
    qkv = torch.cat([weights[f"attn.{name}_proj"] for name in ("q", "k", "v")])
    up = torch.cat([weights[f"ffn.{name}"] for name in feed_forward(settings.ffn).UP])
    parts = {
        **_quantised("qkv", qkv),
        **_quantised("output", weights["attn.output_proj"]),
        **_quantised("up", up),
        **_quantised("down", weights["ffn.w2"]),
    }
    parts |= {name: _gain(weights[name]) for name in ("ln1", "ln2") if name in weights}
    if settings.qk_norm:
        rows = [weights["attn.q_norm"]] * settings.num_heads + [weights["attn.k_norm"]] * settings.num_kv_heads
        parts["head_gains"] = torch.cat(rows).float().numpy()
    return parts


def _gain(weight: Tensor) -> np.ndarray:
    """Return a norm's gain times the root of d_model, by which what the page divides by is too great."""
    return (weight.float() * float(weight.numel() ** 0.5)).numpy()


def _quantised(name: str, weight: Tensor) -> Parts:
    """Return whole numbers for a matrix `(rows, columns)`, and scales: what `Int8Linear` keeps of it.

    The numbers are `(groups, rows, size)`, those of equally large groups of columns, the last filled up with zeros.
    Scales, `(groups, rows)`, are rounded to bfloat16 before the weights are divided by them: no error of their own.
    """
    rows, columns = weight.shape
    groups = -(-columns // _GROUP)
    size = -(-columns // (groups * _BLOCK)) * _BLOCK
    wide = F.pad(weight.float(), (0, groups * size - columns)).view(rows, groups, size).transpose(0, 1)
    # A group of zeros has the scale `tiny` instead of 0, by which nothing can be divided.
    scales = (wide.abs().amax(dim=2) / _MOST).clamp_min(torch.finfo(torch.float32).tiny).to(torch.bfloat16).float()
    levels = (wide / scales.unsqueeze(2)).round().clamp(-_MOST, _MOST).to(torch.int8)
    return {f"{name}.levels": levels.numpy(), f"{name}.scales": scales.numpy()}


def _frequencies(settings: ModelSettings) -> np.ndarray:
    """Return the radians by which each pair of a head's features turns from a position to the next, fp64."""
    pairs = torch.arange(0, settings.d_head, 2, dtype=torch.float64) / settings.d_head
    frequencies = settings.rope_theta**-pairs
    if settings.rope_scaling is not None:
        frequencies = frequencies / rope_factors(settings.rope_theta, settings.d_head, **settings.rope_scaling)
    return frequencies.numpy()


def tokenizer_parts(tokenizer: Tokenizer) -> Parts:
    """Return the bytes of all tokens and where each ends, the merges as ids, special ids, and the kinds of characters.

    The kinds are ranges of code points, first and last: a browser has another table of Unicode than this program.
    """
    tokens = [tokenizer.vocab[index] for index in range(tokenizer.vocab_size)]
    ids = {token: index for index, token in enumerate(tokens)}
    merges = [(ids[left], ids[right], ids[left + right]) for left, right in tokenizer.merges]
    return {
        "tokens": np.frombuffer(b"".join(tokens), np.uint8),
        "token_ends": np.cumsum([len(token) for token in tokens], dtype=np.uint32),
        "merges": np.array(merges, np.uint32).reshape(-1),
        "special": np.array(sorted(tokenizer.special_token_ids.values()), np.uint32),
        "letters": _ranges(r"\p{L}"),
        "numbers": _ranges(r"\p{N}"),
        "spaces": _ranges(r"\s"),
    }


def _ranges(kind: str) -> np.ndarray:
    return np.array(code_points(kind), np.uint32).reshape(-1)
