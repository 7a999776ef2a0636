"""A checkpoint's parts, back in memory: its configuration, tokenizer, weights and optimizer state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from config.io import load_config
from config.train import TrainConfig
from transformerlm.checkpoints.optimizer_state import optimizer_state_from_tensors
from transformerlm.checkpoints.validation import (
    CheckpointError,
    as_checkpoint_error,
    check_finite,
    check_optimizer_state,
    check_size,
    check_weights,
    read_header,
    verify,
)
from transformerlm.models.estimates import count_parameters
from transformerlm.models.settings import ModelSettings
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer.tokenizer import Tokenizer


def load_config_of(directory: Path) -> TrainConfig:
    """Return the configuration that the checkpoint was trained with."""
    return load_config(TrainConfig, directory / "config.toml")


def load_tokenizer(directory: Path) -> Tokenizer:
    """Return the checkpoint's own tokenizer."""
    return Tokenizer.from_directory(directory / "tokenizer")


def load_model(
    directory: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> TransformerLM:
    """Return the checkpoint's model, verified, in evaluation mode, on `device` and in `dtype` (None: fp32 as saved).

    Raises:
        CheckpointError: anything in the directory is missing or damaged.
    """
    verify(directory)
    settings = ModelSettings(**load_config_of(directory).model.model_dump())
    with as_checkpoint_error():
        check_size(directory / "model.safetensors", count_parameters(settings))
    model = TransformerLM(settings, device="meta")
    # This is what `to_empty` does, which first imports modules for a second.
    model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))  # type: ignore[no-untyped-call]
    load_weights(model, directory)
    return model.to(device=device, dtype=dtype).eval()


def load_weights(model: nn.Module, directory: Path) -> None:
    """Copy the checkpoint's weights into `model`, whose names and shapes must be the same."""
    path = directory / "model.safetensors"
    parameters = dict(model.named_parameters())
    with as_checkpoint_error():
        check_weights(path, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
        weights = _load_tensors(path)
        check_finite(weights, directory)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def load_optimizer(optimizer: Optimizer, directory: Path, state: dict[str, Any]) -> None:
    """Put the checkpoint's optimizer state into `optimizer`, which keeps its own settings (decay and so on).

    Raises:
        CheckpointError: the state does not fit the optimizer.
    """
    path = directory / "optimizer.safetensors"
    with as_checkpoint_error():
        read_header(path)
    tensors = _load_tensors(path)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    with as_checkpoint_error(f"{directory}: the optimizer's state does not fit: "):
        loaded = optimizer_state_from_tensors(tensors, state["optimizer"])
        check_optimizer_state(loaded, optimizer)
        optimizer.load_state_dict(loaded)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None
