"""The peer `litgpt`: Lightning's GPT, set up as a LLaMA with the sizes of our model and random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from benchmarking.peers.llama import other_choice
from benchmarking.peers.llama import why_not as why_not_llama


def why_not(hparams: Mapping[str, Any]) -> str | None:
    """Return a choice of our model that `build_litgpt` does not make, such as `tie_embeddings = True`, or None."""
    ours = {"tie_embeddings": False, "qk_norm": False, "rope_scaling": None}
    return why_not_llama(hparams) or other_choice(hparams, ours)


def build_litgpt(hparams: Mapping[str, Any]) -> nn.Module:
    """Return a litgpt GPT with LLaMA's choices; `hparams` are those of `TransformerLM.hparams()`.

    Its head is never tied to the embedding.
    """
    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config(
        name="bench",
        block_size=hparams["context_length"],
        vocab_size=hparams["vocab_size"],
        padded_vocab_size=hparams["vocab_size"],
        n_layer=hparams["num_layers"],
        n_head=hparams["num_heads"],
        n_query_groups=hparams["num_kv_heads"],
        n_embd=hparams["d_model"],
        head_size=hparams["d_head"],
        intermediate_size=hparams["d_ff"],
        rope_base=int(hparams["rope_theta"]),
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=hparams["norm_eps"],
        mlp_class_name="LLaMAMLP",
    )
    model: nn.Module = GPT(config)
    return model
