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
    return other_choice(hparams, {name: value for name, (value, _) in names.REQUIRED.items()})


def other_choice(hparams: Mapping[str, Any], required: Mapping[str, object]) -> str | None:
    """Return the first choice of our model that is not the required one, such as `norm_position = "post"`, or None."""
    return next((f"{name} = {hparams[name]!r}" for name, value in required.items() if hparams[name] != value), None)


def load_library(hparams: Mapping[str, Any]) -> list[Any]:
    """Return what `build_llama` uses of transformers, which imports each part only when it is asked for it."""
    import transformers

    parts = ("AutoConfig", "AutoModelForCausalLM", *_config_of(hparams)["architectures"])
    return [getattr(transformers, name) for name in parts]


def _config_of(hparams: Mapping[str, Any]) -> dict[str, Any]:
    return names.to_config(ModelSettings(**hparams), dtype="fp32", ids=_NO_IDS)


def build_llama(hparams: Mapping[str, Any]) -> nn.Module:
    """Return a transformers model with random weights; `hparams` are those of `TransformerLM.hparams()`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = _config_of(hparams)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))  # type: ignore[no-untyped-call, unused-ignore]
    return model


def copy_weights(llama: nn.Module, weights: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> None:
    """Copy our weights into a model of `build_llama`; raise RuntimeError if names or shapes do not fit."""
    d_head = hparams["d_head"]
    converted = {
        theirs: names.halves_from_pairs(ours, weights.get(ours, weights["token_embeddings.weight"]), d_head)
        for ours, theirs in names.weight_names(ModelSettings(**{**hparams, "tie_embeddings": False})).items()
    }
    llama.load_state_dict(converted)
