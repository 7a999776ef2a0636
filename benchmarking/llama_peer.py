"""The peer `huggingface`: transformers' LlamaForCausalLM with the sizes, and where asked the weights, of our model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_NEEDED = {"norm_position": "pre", "position": "rope", "ffn": "swiglu", "qk_norm": False, "logit_soft_cap": None}

_LAYER_NAMES = {
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


def why_not(hparams: Mapping[str, Any]) -> str | None:
    """Return the choice of our model that LLaMA does not have, such as `norm_position = "post"`, or None."""
    return next((f"{name} = {hparams[name]!r}" for name, value in _NEEDED.items() if hparams[name] != value), None)


def build_llama(hparams: Mapping[str, Any]) -> nn.Module:
    """Return a LlamaForCausalLM with random weights; `hparams` are those of `TransformerLM.hparams()`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    theta = hparams["rope_theta"]
    # transformers 5 gave the base of the wavelengths another place; each version ignores the other's.
    rope: dict[str, Any] = {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    config = LlamaConfig(
        vocab_size=hparams["vocab_size"],
        hidden_size=hparams["d_model"],
        intermediate_size=hparams["d_ff"],
        num_hidden_layers=hparams["num_layers"],
        num_attention_heads=hparams["num_heads"],
        num_key_value_heads=hparams["num_kv_heads"],
        max_position_embeddings=hparams["context_length"],
        rms_norm_eps=hparams["norm_eps"],
        tie_word_embeddings=hparams["tie_embeddings"],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **rope,
    )
    model: nn.Module = LlamaForCausalLM(config)  # type: ignore[no-untyped-call, unused-ignore]
    return model


def copy_weights(llama: nn.Module, weights: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> None:
    """Copy our weights into a LlamaForCausalLM; raise RuntimeError when names or shapes do not fit."""
    converted = {"model.embed_tokens.weight": weights["token_embeddings.weight"]}
    converted["model.norm.weight"] = weights["ln_final.weight"]
    converted["lm_head.weight"] = weights.get("lm_head.weight", weights["token_embeddings.weight"])
    heads = {"attn.q_proj": hparams["num_heads"], "attn.k_proj": hparams["num_kv_heads"]}
    for layer in range(hparams["num_layers"]):
        for ours, theirs in _LAYER_NAMES.items():
            weight = weights[f"layers.{layer}.{ours}.weight"]
            weight = _halves_from_pairs(weight, heads[ours]) if ours in heads else weight
            converted[f"model.layers.{layer}.{theirs}.weight"] = weight
    llama.load_state_dict(converted)


def _halves_from_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder a projection's rows: we rotate features (2i, 2i+1) together, LLaMA's code there (i, i + d/2)."""
    rows, columns = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, columns)
    return torch.cat(pairs.unbind(2), dim=1).reshape(rows, columns)
