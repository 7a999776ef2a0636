"""Our model and Hugging Face's Llama: the same architecture under other names, and with other rows of q and k.

Our rotary embedding turns neighbours, the features (2i, 2i+1) of a head; theirs turns (i, i + d/2). So the rows of each
head's q and k are put in another order; attention's products are the same sums.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# What a model must be to be a Llama, and why another choice is none.
REQUIRED = {
    "norm_position": ("pre", "Llama has its norms before each layer"),
    "position": ("rope", "Llama has rotary positions"),
    "ffn": ("swiglu", "Llama has a gated feed-forward layer"),
    "qk_norm": (False, "Llama has no norms of queries and keys"),
    "logit_soft_cap": (None, "Llama does not bound its logits"),
}
# Keys of a config.json that change what a model computes, and the values with which it is ours.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "architectures": (["LlamaForCausalLM"], None),
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}
_ROPE: dict[str, tuple[Any, ...]] = {"rope_type": ("default", None), "type": ("default", None)}
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
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_is_llama(hparams: Mapping[str, Any]) -> None:
    """Refuse a model that no Llama computes the same as.

    Raises:
        ValueError: names each setting that makes it another architecture.
    """
    reasons = [
        f"model.{name}: expected {json.dumps(expected)}, found {json.dumps(hparams[name])} ({reason})"
        for name, (expected, reason) in REQUIRED.items()
        if hparams[name] != expected
    ]
    if reasons:
        raise ValueError(f"this model is no Llama, so that no tool would compute the same: {'; '.join(reasons)}")


def to_config(hparams: Mapping[str, Any], *, dtype: str, eos_token_id: int | None) -> dict[str, Any]:
    """Return the `config.json` of a model; the rotary base stands twice, as tools read the one or the other."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": hparams["vocab_size"],
        "hidden_size": hparams["d_model"],
        "intermediate_size": hparams["d_ff"],
        "num_hidden_layers": hparams["num_layers"],
        "num_attention_heads": hparams["num_heads"],
        "num_key_value_heads": hparams["num_kv_heads"],
        "head_dim": hparams["d_model"] // hparams["num_heads"],
        "max_position_embeddings": hparams["context_length"],
        "rms_norm_eps": hparams["norm_eps"],
        "rope_theta": hparams["rope_theta"],
        "rope_parameters": {"rope_type": "default", "rope_theta": hparams["rope_theta"]},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": hparams["tie_embeddings"],
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "torch_dtype": _DTYPES[dtype],
        "use_cache": True,
    }


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of the model that a `config.json` describes.

    Raises:
        ValueError: it describes another model; names each key.
    """
    rope = config.get("rope_parameters") or {}
    problems = [_found(key, config.get(key), values) for key, values in _PLAIN.items()]
    if isinstance(rope, dict):
        problems += [_found(f"rope_parameters.{key}", rope.get(key), values) for key, values in _ROPE.items()]
        problems += [f"rope_parameters.{key}: expected none" for key in rope.keys() - {*_ROPE, "rope_theta"}]
        if "rope_theta" in rope and "rope_theta" in config:
            problems.append(_found("rope_theta", config["rope_theta"], (rope["rope_theta"],)))
    else:
        problems.append(_found("rope_parameters", rope, ({},)))
    problems += [f"{key}: expected a number, found none" for key in _SIZES if config.get(key) is None]
    if not any(problems):
        problems.append(_check_head_dim(config))
    if any(problems):
        raise ValueError("; ".join(filter(None, problems)))
    return {
        **{ours: config[theirs] for theirs, ours in _SIZES.items()},
        "num_kv_heads": config.get("num_key_value_heads"),
        "context_length": config.get("max_position_embeddings", 2048),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }


def _found(key: str, value: Any, expected: tuple[Any, ...]) -> str:
    if value in expected:
        return ""
    return f"{key}: expected {json.dumps(expected[0])}, found {json.dumps(value)[:80]}"


def _check_head_dim(config: Mapping[str, Any]) -> str:
    width, heads, found = config["hidden_size"], config["num_attention_heads"], config.get("head_dim")
    whole = type(width) is int and type(heads) is int and heads > 0
    if found is None or not whole or found == width / heads:
        return ""
    return f"head_dim: expected hidden_size / num_attention_heads = {width / heads:g}, found {json.dumps(found)[:80]}"


def weight_names(num_layers: int, *, tie_embeddings: bool) -> dict[str, str]:
    """Return their name of each of our weights."""
    names = {"token_embeddings.weight": "model.embed_tokens.weight"}
    for layer in range(num_layers):
        for ours, theirs in _LAYER.items():
            names[f"layers.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    names["ln_final.weight"] = "model.norm.weight"
    return names if tie_embeddings else {**names, "lm_head.weight": "lm_head.weight"}


def halves_from_pairs(name: str, weight: Tensor, d_head: int) -> Tensor:
    """Return their order of the rows of our weight `name`; only q and k `(heads * d_head, d_model)` change."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    return weight.reshape(-1, d_head // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def pairs_from_halves(name: str, weight: Tensor, d_head: int) -> Tensor:
    """Undo `halves_from_pairs`."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    return weight.reshape(-1, 2, d_head // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
