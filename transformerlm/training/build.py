"""What a run is built of, by its configuration: model, optimizer, the sizes of its batches, the bytes of its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from config.train import TrainConfig, TrainingConfig
from transformerlm.distributed.parallel import broadcast_parameters
from transformerlm.distributed.world import World
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.training.muon import Muon, muon_groups
from transformerlm.training.optim import SGD, AdamW, parameter_groups
from transformerlm.utils.dtypes import Precision
from transformerlm.utils.seed import seed_everything


def build_model(config: TrainConfig, *, device: torch.device, world: World) -> TransformerLM:
    """Seed all random generators, and return the model with initial weights, the same on every rank."""
    seed_everything(config.training.seed)
    model = TransformerLM(**config.model.model_dump()).to(device)
    broadcast_parameters(model, world)
    return model


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


def sequences_per_pass(training: TrainingConfig, world_size: int) -> int:
    """Return how many sequences one process passes through the model at once.

    Raises:
        ValueError: it is "auto", which `planning.micro_batch.resolve` replaces by a number.
    """
    if training.micro_batch_size == "auto":
        raise ValueError(
            'training.micro_batch_size: expected a number, found "auto"; choose one with micro_batch.resolve'
        )
    return training.micro_batch_size or max(1, training.batch_size // world_size)


def num_accumulation_steps(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return how many micro-batches each rank passes through the model in one step.

    Raises:
        ValueError: the batch cannot be divided evenly.
    """
    per_round = micro_batch_size * world_size
    if batch_size % per_round:
        raise ValueError(
            f"training.batch_size ({batch_size}) is not divisible by micro_batch_size x processes "
            f"({micro_batch_size} x {world_size})"
        )
    return batch_size // per_round


def num_validation_windows(config: TrainConfig, num_tokens: int) -> int:
    """Return how many windows a validation takes from a file of `num_tokens`: those of `eval_tokens`, at least one."""
    context_length = config.model.context_length
    return min(max(1, config.training.eval_tokens // context_length), (num_tokens - 1) // context_length)


def token_bytes(tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> Tensor:
    """Return the number of UTF-8 bytes of each id `(vocab_size,)`: 0 for special tokens and for ids without a token."""
    lengths = tokenizer.token_byte_lengths()
    return torch.tensor(lengths + [0] * (vocab_size - len(lengths)), device=device)
