"""What a run is built of, by its configuration: the optimizer, the cut of its batches, and the bytes of its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from config.train import TrainConfig
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.training.muon import Muon, muon_groups
from transformerlm.training.optim import SGD, AdamW, parameter_groups
from transformerlm.utils.dtypes import Precision


def build_optimizer(model: TransformerLM, config: TrainConfig, *, precision: Precision = "fp32") -> Optimizer:
    """Return the optimizer that the configuration names, over the model's parameters."""
    settings = config.optimizer
    decay, betas = settings.weight_decay, (settings.beta1, settings.beta2)
    if settings.name == "muon":
        momentum = 0.95 if settings.momentum is None else settings.momentum
        groups: Any = muon_groups(model, weight_decay=decay)
        return Muon(
            groups, settings.learning_rate, momentum=momentum, betas=betas, eps=settings.eps, precision=precision
        )
    groups = parameter_groups(model, weight_decay=decay)
    if settings.name == "sgd":
        return SGD(groups, settings.learning_rate, momentum=settings.momentum or 0.0)
    return AdamW(groups, settings.learning_rate, betas=betas, eps=settings.eps)


def num_accumulation_steps(batch_size: int, micro_batch_size: int | None, world_size: int) -> int:
    """Return how many micro-batches each rank runs through for one step.

    Raises:
        ValueError: the batch cannot be divided evenly.
    """
    per_round = (micro_batch_size or batch_size // world_size) * world_size
    if per_round == 0 or batch_size % per_round:
        raise ValueError(
            f"training.batch_size ({batch_size}) is not divisible by micro_batch_size x processes "
            f"({micro_batch_size or 'any'} x {world_size})"
        )
    return batch_size // per_round


def num_validation_windows(config: TrainConfig, num_tokens: int) -> int:
    """Return how many windows of the context a validation looks at in a file: those of `eval_tokens`, one at least."""
    context_length = config.model.context_length
    return min(max(1, config.training.eval_tokens // context_length), (num_tokens - 1) // context_length)


def token_bytes(tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> Tensor:
    """Return the UTF-8 bytes behind each id `(vocab_size,)`: 0 for special tokens and for ids that no token has."""
    lengths = tokenizer.token_byte_lengths()
    return torch.tensor(lengths + [0] * (vocab_size - len(lengths)), device=device)
