"""Our model and Hugging Face's Llama: the same architecture with other names, and another order of q's and k's rows.

With norms of queries and keys it is their Qwen3, which is otherwise a Llama. Our rotary embedding rotates neighbours,
the features (2i, 2i+1) of a head; theirs rotates (i, i + d/2). So the rows of each head's q and k, and the gains of
their norms, change order; attention's dot products are the same sums.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from transformerlm.models.settings import SAME_FUNCTION, ModelSettings

if TYPE_CHECKING:  # it needs regex and safetensors, and the GPU suite builds this peer where there is only torch
    from transformerlm.checkpoints.document_ids import DocumentIds

Architecture = Literal["llama", "qwen3"]
CLASSES: dict[Architecture, str] = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What makes a model a Llama or a Qwen3, and why it must.
REQUIRED = {
    "norm_position": ("pre", "they have their norms before each layer"),
    "position": ("rope", "they have rotary positions"),
    "ffn": ("swiglu", "they have a gated feed-forward layer"),
    "logit_soft_cap": (None, "they do not bound their logits"),
}
# The other settings that are written; those of `SAME_FUNCTION` need no place.
_WRITTEN = {
    "context_length", "d_ff", "d_head", "d_model", "norm_eps", "num_heads", "num_kv_heads", "num_layers", "qk_norm",
    "rope_scaling", "rope_theta", "tie_embeddings", "vocab_size",
}  # fmt: skip
# Keys of a config.json that change what a model computes, and the values that our model has.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "model_type": tuple(CLASSES),
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}
# The values that transformers uses if a file omits a key.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
_ORIGINAL = "original_max_position_embeddings"
# The keys of Llama 3.1's scaling; transformers 4 reads it from rope_scaling, transformers 5 from rope_parameters too.
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context_length": _ORIGINAL,
}
_TYPE_KEYS = ("rope_type", "type")
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}
_LAYER = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "ffn.w1": "mlp.gate_proj",
    "ffn.w2": "mlp.down_proj",
    "ffn.w3": "mlp.up_proj",
    "ln1": "input_layernorm",
    "ln2": "post_attention_layernorm",
}
_NORMS = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
_TURNED = ("q_proj.weight", "k_proj.weight", "q_norm.weight", "k_norm.weight")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def architecture_of(settings: ModelSettings) -> Architecture:
    """Return the name of the architecture that computes the same as a model with these settings.

    Raises:
        ValueError: there is none; the message names each setting that no such architecture has.
    """
    reasons = [
        f"model.{name}: expected {json.dumps(expected)}, found {json.dumps(getattr(settings, name))} ({reason})"
        for name, (expected, reason) in REQUIRED.items()
        if getattr(settings, name) != expected
    ]
    unknown = {field.name for field in fields(settings)} - REQUIRED.keys() - _WRITTEN - SAME_FUNCTION
    reasons += [f"model.{name}: expected none, as no file has a place for it" for name in sorted(unknown)]
    if reasons:
        raise ValueError(f"this model is no Llama or Qwen3, and no tool would compute the same: {'; '.join(reasons)}")
    return "qwen3" if settings.qk_norm else "llama"


def to_config(settings: ModelSettings, *, dtype: str, ids: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `config.json` of a model, with the `ids` that `to_ids` returns.

    The rotary base and its scaling are written twice, because some tools read one place and some the other.
    """
    architecture = architecture_of(settings)
    rope: dict[str, Any] = {"rope_type": "default"}
    if (scaling := settings.rope_scaling) is not None:
        rope = {"rope_type": "llama3", **{theirs: scaling[ours] for ours, theirs in _SCALING.items()}}
    return {
        "architectures": [CLASSES[architecture]],
        "model_type": architecture,
        "vocab_size": settings.vocab_size,
        "hidden_size": settings.d_model,
        "intermediate_size": settings.d_ff,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_kv_heads,
        "head_dim": settings.d_head,
        "max_position_embeddings": settings.context_length,
        "rms_norm_eps": settings.norm_eps,
        "rope_theta": settings.rope_theta,
        "rope_parameters": {**rope, "rope_theta": settings.rope_theta},
        **({} if scaling is None else {"rope_scaling": rope}),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": settings.tie_embeddings,
        **ids,
        "torch_dtype": _DTYPES[dtype],
        "use_cache": True,
    }


def to_ids(document_ids: DocumentIds) -> dict[str, Any]:
    """Return the keys of `config.json` and `generation_config.json` that say where documents begin and end.

    A model without a padding token of its own gets none: transformers would never train that token's embedding, and
    without one it pads with the end token anyway.
    """
    ends = document_ids.eos_token_ids
    return {
        "bos_token_id": document_ids.bos_token_id,
        "eos_token_id": list(ends) if len(ends) > 1 else document_ids.eos_token_id,
        "pad_token_id": document_ids.pad_token_id,
    }


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of the model that a `config.json` describes.

    Raises:
        ValueError: it describes another model; the message names each key.
    """
    problems = [_found(key, config.get(key), values) for key, values in _PLAIN.items()]
    if not problems[0]:
        config = {**_DEFAULTS[config["model_type"]], **config}
        problems += _other_layers(config)
    rope, rope_problems = _read_rope(config)
    problems += rope_problems
    problems += [f"{key}: expected a number, found none" for key in _SIZES if config.get(key) is None]
    if any(problems):
        raise ValueError("; ".join(filter(None, problems)))
    return {
        **{ours: config[theirs] for theirs, ours in _SIZES.items()},
        "num_kv_heads": config.get("num_key_value_heads"),
        "d_head": None if _has_usual_heads(config) else config.get("head_dim"),
        "context_length": config["max_position_embeddings"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        **rope,
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "qk_norm": config["model_type"] == "qwen3",
    }


def _has_usual_heads(config: Mapping[str, Any]) -> bool:
    head_dim, num_heads = config.get("head_dim"), config["num_attention_heads"]
    return type(head_dim) is int and type(num_heads) is int and head_dim * num_heads == config["hidden_size"]


def _read_rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return base and scaling of the rotary embedding, which a file may hold in two places, and any problems there."""
    bases, scalings = [config["rope_theta"]] if "rope_theta" in config else [], []
    problems: list[str] = []
    for place in ("rope_parameters", "rope_scaling"):
        rope = config.get(place) or {}
        if not isinstance(rope, dict):
            problems.append(_found(place, rope, ({},)))
        elif rope:
            problems += _rope_problems(place, rope)
            bases += [rope["rope_theta"]] if "rope_theta" in rope else []
            scalings.append({theirs: rope.get(theirs) for theirs in _SCALING.values()} if _is_scaled(rope) else None)
    problems += [_found("rope_theta", base, (bases[-1],)) for base in bases]
    problems += [_found("rope_scaling", scaling, (scalings[0],)) for scaling in scalings]
    base, found = bases[-1] if bases else 10_000.0, scalings[0] if scalings else None
    if found is None:
        return {"rope_theta": base, "rope_scaling": None}, problems
    if (original := config.get(_ORIGINAL)) is not None:  # transformers looks here first
        problems.append(_found(_ORIGINAL, original, (found[_ORIGINAL],)))
    scaling = {ours: found[theirs] for ours, theirs in _SCALING.items()}
    return {"rope_theta": base, "rope_scaling": scaling}, problems


def _is_scaled(rope: Mapping[str, Any]) -> bool:
    return bool(rope.get("rope_type", rope.get("type")) == "llama3")


def _rope_problems(place: str, rope: Mapping[str, Any]) -> list[str]:
    types = ("llama3",) if _is_scaled(rope) else ("default", None)
    problems = [_found(f"{place}.rope_type", rope.get(key, types[0]), types) for key in _TYPE_KEYS]
    names = set(_SCALING.values()) if _is_scaled(rope) else set()
    problems += [f"{place}.{key}: expected none" for key in sorted(rope.keys() - names - {*_TYPE_KEYS, "rope_theta"})]
    return problems + [
        f"{place}.{key}: expected a number, found none" for key in sorted(names) if rope.get(key) is None
    ]


def _other_layers(config: Mapping[str, Any]) -> list[str]:
    """Return any problems with the keys that Llama and Qwen3 do not share; Qwen3 may name a window without using it."""
    architecture = config["model_type"]
    layers = config.get("layer_types") or []
    problems = [_found("architectures", config.get("architectures"), ([CLASSES[architecture]], None))]
    if architecture == "llama":
        problems.append(_found("sliding_window", config.get("sliding_window"), (None,)))
    if layers and set(map(str, layers if isinstance(layers, list) else [layers])) != {"full_attention"}:
        problems.append(f'layer_types: expected "full_attention" for each, found {json.dumps(layers)[:80]}')
    return problems


def _found(key: str, value: Any, expected: tuple[Any, ...]) -> str:
    if value in expected:
        return ""
    return f"{key}: expected {json.dumps(expected[0])}, found {json.dumps(value)[:80]}"


def weight_names(settings: ModelSettings) -> dict[str, str]:
    """Return their name for each of our weights."""
    names = {"token_embeddings.weight": "model.embed_tokens.weight"}
    parts = {**_LAYER, **(_NORMS if settings.qk_norm else {})}
    for layer in range(settings.num_layers):
        for ours, theirs in parts.items():
            names[f"layers.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    names["ln_final.weight"] = "model.norm.weight"
    return names if settings.tie_embeddings else {**names, "lm_head.weight": "lm_head.weight"}


def halves_from_pairs(name: str, weight: Tensor, d_head: int) -> Tensor:
    """Return our weight `name` with its rows in their order; only those of q and k `(heads * d_head, ...)` change."""
    if not name.endswith(_TURNED):
        return weight
    # (heads, d_head / 2, 2, ...) -> (heads, 2, d_head / 2, ...): first the even features of a head, then the odd ones
    return weight.reshape(-1, d_head // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def pairs_from_halves(name: str, weight: Tensor, d_head: int) -> Tensor:
    """Undo `halves_from_pairs`."""
    if not name.endswith(_TURNED):
        return weight
    return weight.reshape(-1, 2, d_head // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
