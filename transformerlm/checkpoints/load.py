"""A checkpoint's parts, back in memory: its configuration, tokenizer, weights and optimizer state.

Tensors are read a slice at a time, so that a rank needs memory for the rows that are its own and for one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
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
from transformerlm.distributed.rows import Rows
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
    load_weights(weights_of(model), directory)
    return model.to(device=device, dtype=dtype).eval()


def weights_of(model: nn.Module) -> dict[str, Rows]:
    """Return each parameter once, whole, under its name: loading rebuilds a tied output head from the embedding."""
    return {name: Rows.whole(parameter) for name, parameter in model.named_parameters()}


def load_weights(weights: Mapping[str, Rows], directory: Path) -> None:
    """Copy the checkpoint's weights into these rows, in place; names and shapes must be those of the checkpoint.

    Raises:
        CheckpointError: they are not, or a weight is not finite.
    """
    path = directory / "model.safetensors"
    with as_checkpoint_error():
        check_weights(path, {name: rows.shape for name, rows in weights.items()})
        with torch.no_grad():
            for name, rows in weights.items():
                values = _read(path, name, range(rows.first, rows.first + rows.local.shape[0]))
                check_finite({name: values}, directory)
                rows.local.copy_(values)


def load_optimizer(
    optimizer: Optimizer, directory: Path, state: dict[str, Any], *, rows: Sequence[Rows] | None = None
) -> None:
    """Put the checkpoint's optimizer state into `optimizer`, which keeps its own settings (decay and so on).

    `rows` says which part of each of its parameters is here, in the order of its groups; None: all of it.

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
        if rows is not None:
            loaded["state"] = {index: _own(values, rows[index]) for index, values in loaded["state"].items()}
        optimizer.load_state_dict(loaded)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _own(values: dict[str, Any], rows: Rows) -> dict[str, Any]:
    last = rows.first + rows.local.shape[0]
    return {
        key: value[rows.first : last] if isinstance(value, Tensor) and value.ndim else value
        for key, value in values.items()
    }


def _read(path: Path, name: str, rows: range) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            found: Tensor = file.get_slice(name)[rows.start : rows.stop]
            return found
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None
