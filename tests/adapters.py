"""The adapter functions of Stanford CS336 assignment 1: thin calls into the public API, no logic of their own.

The course's own test files, laid beside this one, import it as `.adapters`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from typing import IO, Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from transformerlm.checkpoints.optimizer_state import load_training_state, save_training_state
from transformerlm.models import attention, functional, layers
from transformerlm.models.transformer import TransformerBlock, TransformerLM
from transformerlm.tokenizer.bpe_trainer import train_bpe
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.training.data import get_batch
from transformerlm.training.loss import cross_entropy
from transformerlm.training.optim import AdamW, clip_grad_norm
from transformerlm.training.schedule import cosine


def run_linear(d_in: int, d_out: int, weights: Tensor, in_features: Tensor) -> Tensor:
    return _loaded(layers.Linear(d_in, d_out), {"weight": weights})(in_features)


def run_embedding(vocab_size: int, d_model: int, weights: Tensor, token_ids: Tensor) -> Tensor:
    return _loaded(layers.Embedding(vocab_size, d_model), {"weight": weights})(token_ids)


def run_swiglu(
    d_model: int, d_ff: int, w1_weight: Tensor, w2_weight: Tensor, w3_weight: Tensor, in_features: Tensor
) -> Tensor:
    weights = {"w1.weight": w1_weight, "w2.weight": w2_weight, "w3.weight": w3_weight}
    return _loaded(layers.SwiGLU(d_model, d_ff), weights)(in_features)


def run_scaled_dot_product_attention(Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None = None) -> Tensor:
    return functional.scaled_dot_product_attention(Q, K, V, mask)


def run_multihead_self_attention(
    d_model: int,
    num_heads: int,
    q_proj_weight: Tensor,
    k_proj_weight: Tensor,
    v_proj_weight: Tensor,
    o_proj_weight: Tensor,
    in_features: Tensor,
) -> Tensor:
    weights = _projections(q_proj_weight, k_proj_weight, v_proj_weight, o_proj_weight)
    return _loaded(attention.MultiHeadSelfAttention(d_model, num_heads), weights)(in_features)


def run_multihead_self_attention_with_rope(
    d_model: int,
    num_heads: int,
    max_seq_len: int,
    theta: float,
    q_proj_weight: Tensor,
    k_proj_weight: Tensor,
    v_proj_weight: Tensor,
    o_proj_weight: Tensor,
    in_features: Tensor,
    token_positions: Tensor | None = None,
) -> Tensor:
    rope = layers.RotaryEmbedding(theta, d_model // num_heads, max_seq_len)
    weights = _projections(q_proj_weight, k_proj_weight, v_proj_weight, o_proj_weight)
    module = _loaded(attention.MultiHeadSelfAttention(d_model, num_heads, rope=rope), weights)
    return module(in_features, token_positions=token_positions)


def run_rope(d_k: int, theta: float, max_seq_len: int, in_query_or_key: Tensor, token_positions: Tensor) -> Tensor:
    return layers.RotaryEmbedding(theta, d_k, max_seq_len)(in_query_or_key, token_positions)


def run_transformer_block(
    d_model: int,
    num_heads: int,
    d_ff: int,
    max_seq_len: int,
    theta: float,
    weights: dict[str, Tensor],
    in_features: Tensor,
) -> Tensor:
    rope = layers.RotaryEmbedding(theta, d_model // num_heads, max_seq_len)
    return _loaded(TransformerBlock(d_model, num_heads, d_ff, rope=rope), weights)(in_features)


def run_transformer_lm(
    vocab_size: int,
    context_length: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    d_ff: int,
    rope_theta: float,
    weights: dict[str, Tensor],
    in_indices: Tensor,
) -> Tensor:
    model = TransformerLM(
        vocab_size=vocab_size,
        context_length=context_length,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        d_ff=d_ff,
        rope_theta=rope_theta,
    )
    return _loaded(model, weights)(in_indices)


def run_rmsnorm(d_model: int, eps: float, weights: Tensor, in_features: Tensor) -> Tensor:
    return _loaded(layers.RMSNorm(d_model, eps), {"weight": weights})(in_features)


def run_silu(in_features: Tensor) -> Tensor:
    return functional.silu(in_features)


def run_get_batch(
    dataset: npt.NDArray[Any], batch_size: int, context_length: int, device: str
) -> tuple[Tensor, Tensor]:
    where = {"seed": random.getrandbits(63), "step": 0, "device": device}
    return get_batch(dataset, batch_size=batch_size, context_length=context_length, **where)


def run_softmax(in_features: Tensor, dim: int) -> Tensor:
    return functional.softmax(in_features, dim)


def run_cross_entropy(inputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(inputs, targets)


def run_gradient_clipping(parameters: Iterable[nn.Parameter], max_l2_norm: float) -> None:
    clip_grad_norm(parameters, max_l2_norm)


def get_adamw_cls() -> type[torch.optim.Optimizer]:
    return AdamW


def run_get_lr_cosine_schedule(
    it: int, max_learning_rate: float, min_learning_rate: float, warmup_iters: int, cosine_cycle_iters: int
) -> float:
    return cosine(
        it,
        learning_rate=max_learning_rate,
        min_learning_rate=min_learning_rate,
        warmup_steps=warmup_iters,
        max_steps=cosine_cycle_iters,
    )


def run_save_checkpoint(
    model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, out: str | os.PathLike[str] | IO[bytes]
) -> None:
    save_training_state(model, optimizer, iteration, out)


def run_load_checkpoint(
    src: str | os.PathLike[str] | IO[bytes], model: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    return load_training_state(src, model, optimizer)


def get_tokenizer(
    vocab: dict[int, bytes], merges: list[tuple[bytes, bytes]], special_tokens: list[str] | None = None
) -> Tokenizer:
    return Tokenizer(vocab, merges, special_tokens)


def run_train_bpe(
    input_path: str | os.PathLike[str], vocab_size: int, special_tokens: list[str], **kwargs: Any
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    return train_bpe(input_path, vocab_size, special_tokens, **kwargs)


def _projections(query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> dict[str, Tensor]:
    return {
        "q_proj.weight": query,
        "k_proj.weight": key,
        "v_proj.weight": value,
        "output_proj.weight": output,
    }


def _loaded(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(weights)
    return module
