"""LoRA from scratch (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models").

    y = x W^T + alpha / rank (x A^T) B^T

W is frozen; A, of a few rows, and B, of as many columns, are trained in its place. A begins as random numbers and B as
zeros, so a model begins as the one that it was. `alpha / rank B A` can be added to W once and for all: `plain_weights`
does that, and the plain model computes the same, as fast as before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from transformerlm.models.dropout import dropout
from transformerlm.models.fine_tuning import FineTuning, LoRA, is_lora
from transformerlm.models.layers import Linear
from transformerlm.models.transformer import TransformerLM


class LoRALinear(nn.Module):
    """A linear layer whose `weight` `(out, in)` is frozen, with `lora_a` `(rank, in)` and `lora_b` `(out, rank)`.

    A is drawn from N(0, 1 / in) cut at 3 sigma, so that its outputs are about as large as its inputs; B is zero. In
    training `dropout_key` `(batch, 2)` decides what A does not see of `x` `(batch, ..., in)`; None: it sees all.
    """

    def __init__(self, weight: nn.Parameter, *, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight, self.scale, self.dropout = weight, scale, dropout
        self.dropout_key: Tensor | None = None
        self.lora_a, self.lora_b = (nn.Parameter(weight.new_zeros(shape)) for shape in _shapes(weight, rank))
        std = 1.0 / math.sqrt(weight.shape[1])
        nn.init.trunc_normal_(self.lora_a, std=std, a=-3 * std, b=3 * std)

    def forward(self, x: Tensor) -> Tensor:
        seen = dropout(x, self.dropout, self.dropout_key)
        return x @ self.weight.T + self.scale * ((seen @ self.lora_a.T) @ self.lora_b.T)

    def merged_weight(self) -> Tensor:
        """Return the one matrix `(out, in)` that does the same."""
        return merged(self.weight, self.lora_a, self.lora_b, scale=self.scale)

    def extra_repr(self) -> str:
        """Return the sizes, for `print(model)`."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, rank={len(self.lora_a)}, scale={self.scale:g}"


def merged(weight: Tensor, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    """Return `W + scale B A`; of `weight` and `b` it may be some rows, the same ones."""
    return weight + scale * (b @ a)


def fine_tune(model: TransformerLM, fine_tuning: FineTuning) -> None:
    """Let a training change only the weights that `fine_tuning` says, in place; with LoRA, give the model its matrices.

    Raises:
        ValueError: a pattern means nothing, or nothing would be trained.
    """
    if not fine_tuning:
        return
    if fine_tuning.lora is not None:
        _add_lora(model, fine_tuning.lora)
    trained = fine_tuning.trained(name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the plain model that computes the same: each B A is added to its W."""
    with torch.no_grad():
        layers = {f"{name}.weight": layer.merged_weight() for name, layer in _layers(model).items()}
    return {name: layers.get(name, weight) for name, weight in model.state_dict().items() if not is_lora(name)}


def num_lora_keys(model: nn.Module) -> int:
    """Return how many keys of dropout LoRA needs, for each sequence: after those of the model, one for each layer."""
    return sum(layer.dropout > 0 for layer in _layers(model).values())


def _layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _shapes(weight: Tensor, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (rank, weight.shape[1]), (weight.shape[0], rank)


def _add_lora(model: TransformerLM, lora: LoRA) -> None:
    shapes = {name: tuple(one.shape) for name, one in model.named_parameters()}
    for name in lora.layers(shapes):
        holder, _, last = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear), name
        layer = LoRALinear(linear.weight, rank=lora.rank, scale=lora.scale, dropout=lora.dropout)
        setattr(model.get_submodule(holder), last, layer)
    if lora.dropout:
        layers = list(_layers(model).values())
        model.register_forward_pre_hook(partial(_hand_out_keys, layers=layers), with_kwargs=True)


def _hand_out_keys(
    model: nn.Module, args: tuple[Any, ...], keywords: Mapping[str, Any], *, layers: Sequence[LoRALinear]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give each layer its key before a forward pass, and the model its own keys; none where none are given.

    They stay until the next forward pass, so a backward pass that computes activations again finds them.
    """
    keys = keywords.get("dropout_keys")
    if keys is None and model.training and torch.is_grad_enabled():
        raise ValueError("model: expected dropout_keys, as LoRA has dropout and is in training, got none")
    for number, layer in enumerate(layers):
        layer.dropout_key = None if keys is None else keys[len(keys) - len(layers) + number]
    return args, {**keywords, "dropout_keys": None if keys is None else keys[: len(keys) - len(layers)]}
