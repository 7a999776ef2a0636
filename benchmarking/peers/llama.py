"""The peer `huggingface`: a transformers model with the sizes and, if asked, the weights of our model.

It is their Llama, or their Qwen3 for a model with norms of queries and keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from transformerlm.interop import llama as names
from transformerlm.models.settings import ModelSettings

# By default their texts would end at id 2.
_NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def why_not(hparams: Mapping[str, Any]) -> str | None:
    """Return a choice of our model that neither LLaMA nor Qwen3 has, such as `norm_position = "post"`, or None."""
    required = names.REQUIRED.items()
    return next((f"{name} = {hparams[name]!r}" for name, (value, _) in required if hparams[name] != value), None)


def build_llama(hparams: Mapping[str, Any]) -> nn.Module:
    """Return a transformers model with random weights; `hparams` are those of `TransformerLM.hparams()`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = names.to_config(ModelSettings(**hparams), dtype="fp32", ids=_NO_IDS)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))  # type: ignore[no-untyped-call, unused-ignore]
    return model


def copy_weights(llama: nn.Module, weights: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> None:
    """Copy our weights into a model of `build_llama`; raise RuntimeError if names or shapes do not fit."""
    d_head = hparams["d_model"] // hparams["num_heads"]
    converted = {
        theirs: names.halves_from_pairs(ours, weights.get(ours, weights["token_embeddings.weight"]), d_head)
        for ours, theirs in names.weight_names(ModelSettings(**{**hparams, "tie_embeddings": False})).items()
    }
    llama.load_state_dict(converted)
