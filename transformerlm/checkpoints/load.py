"""A checkpoint's parts, back in memory: its configuration, tokenizer, weights and optimizer state.

Tensors are read a slice at a time, so that a rank needs memory for the rows that are its own and for one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from config.io import load_config
from config.train import TrainConfig
from transformerlm.checkpoints.layout import MODEL, OPTIMIZER
from transformerlm.checkpoints.optimizer_state import optimizer_state_from_tensors
from transformerlm.checkpoints.tensor_files import StoredTensor, read_rows, stored_tensors
from transformerlm.checkpoints.validation import (
    as_checkpoint_error,
    check_finite,
    check_optimizer_state,
    check_size,
    check_weights,
    verify,
)
from transformerlm.distributed.rows import Rows
from transformerlm.models.estimates import count_parameters
from transformerlm.models.fine_tuning import A, B, FineTuning, LoRA, is_lora
from transformerlm.models.lora import merged
from transformerlm.models.settings import ModelSettings
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer.tokenizer import Tokenizer


def load_config_of(directory: Path) -> TrainConfig:
    """Return the configuration that the checkpoint was trained with."""
    return load_config(TrainConfig, directory / "config.toml")


def fine_tuning_of(config: TrainConfig) -> FineTuning:
    """Return which weights a run with this configuration trains."""
    return FineTuning.of(config.fine_tuning.model_dump())


def load_tokenizer(directory: Path) -> Tokenizer:
    """Return the checkpoint's own tokenizer."""
    return Tokenizer.from_directory(directory / "tokenizer")


def load_model(
    directory: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    is_verified: bool = False,
) -> TransformerLM:
    """Return the checkpoint's model, verified, in evaluation mode, on `device` and in `dtype` (None: fp32 as saved).

    It is a plain model, that of a run with LoRA too, whose matrices are merged into the weights beside them.
    `is_verified` says that the caller has just verified the weights, which are then not hashed again.

    Raises:
        CheckpointError: anything in the directory is missing or damaged.
    """
    if not is_verified:
        verify(directory)
    settings = ModelSettings(**load_config_of(directory).model.model_dump())
    with as_checkpoint_error():
        stored = stored_tensors(directory, MODEL)
        facts = {name: one.facts for name, one in stored.items() if not is_lora(name)}
        check_size(directory, facts, count_parameters(settings))
    model = TransformerLM(settings, device="meta")
    # This is what `to_empty` does, which first imports modules for a second.
    model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))  # type: ignore[no-untyped-call]
    load_plain_weights(weights_of(model), directory)
    return model.to(device=device, dtype=dtype).eval()


def weights_of(model: nn.Module) -> dict[str, Rows]:
    """Return each parameter once, whole, under its name: loading rebuilds a tied output head from the embedding."""
    return {name: Rows.whole(parameter) for name, parameter in model.named_parameters()}


def load_weights(weights: Mapping[str, Rows], directory: Path) -> None:
    """Copy the checkpoint's weights into these rows, in place; names and shapes must be those of the checkpoint.

    Raises:
        CheckpointError: they are not, or a weight is not finite.
    """
    with as_checkpoint_error():
        stored = _checked(directory, {name: rows.shape for name, rows in weights.items()})
        _copy(weights, stored, directory)


def load_plain_weights(weights: Mapping[str, Rows], directory: Path) -> None:
    """Copy the checkpoint's weights into these rows of a plain model, in place; LoRA's matrices are merged into them.

    Raises:
        CheckpointError: names or shapes are not those of the checkpoint, or a weight is not finite.
    """
    fine_tuning = fine_tuning_of(load_config_of(directory))
    with as_checkpoint_error():
        plain = {name: rows.shape for name, rows in weights.items()}
        stored = _checked(directory, fine_tuning.extended(plain))
        _copy(weights, stored, directory)
        if fine_tuning.lora is not None:
            _merge(weights, stored, fine_tuning.lora, directory)


def _checked(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    """Return where the checkpoint's weights are, which must have these names and shapes."""
    stored = stored_tensors(directory, MODEL)
    check_weights(directory, {name: one.facts for name, one in stored.items()}, shapes)
    return stored


@torch.no_grad()
def _copy(weights: Mapping[str, Rows], stored: Mapping[str, StoredTensor], directory: Path) -> None:
    for name, values in read_rows(stored, {name: _range(rows) for name, rows in weights.items()}):
        check_finite({name: values}, directory)
        weights[name].local.copy_(values)


@torch.no_grad()
def _merge(weights: Mapping[str, Rows], stored: Mapping[str, StoredTensor], lora: LoRA, directory: Path) -> None:
    """Add to each target's rows its B A: the same rows of B, and all of A."""
    for layer in lora.layers({name: rows.shape for name, rows in weights.items()}):
        rows = weights[f"{layer}.weight"]
        wanted = {f"{layer}.{A}": None, f"{layer}.{B}": _range(rows)}
        found = dict(read_rows(stored, wanted))
        check_finite(found, directory)
        a, b = (found[name].to(rows.local.device) for name in wanted)
        rows.local.copy_(merged(rows.local, a, b, scale=lora.scale))


def load_optimizer(
    optimizer: Optimizer, directory: Path, state: dict[str, Any], *, rows: Sequence[Rows] | None = None
) -> None:
    """Put the checkpoint's optimizer state into `optimizer`, which keeps its own settings (decay and so on).

    `rows` says which part of each of its parameters is here, in the order of its groups; None: all of it.

    Raises:
        CheckpointError: the state does not fit the optimizer.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = [Rows.whole(parameter) for parameter in parameters] if rows is None else rows
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    with as_checkpoint_error():
        stored = stored_tensors(directory, OPTIMIZER)
    with as_checkpoint_error(f"{directory}: the optimizer's state does not fit: "):
        shapes = {name: torch.empty(one.facts.shape, device="meta") for name, one in stored.items()}
        outline = optimizer_state_from_tensors(shapes, state["optimizer"])
        check_optimizer_state(outline, [one.shape for one in own])
        optimizer.load_state_dict({"state": {}, "param_groups": outline["param_groups"]})
        for index, values in state["optimizer"]["state"].items():
            tensors = _OwnRows(stored, own[int(index)])
            parameter = parameters[int(index)]
            decoded = optimizer_state_from_tensors(tensors, {"state": {index: values}, "param_groups": []})
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if isinstance(value, Tensor) and value.ndim else value
                for key, value in decoded["state"][int(index)].items()
            }
    for group, before in zip(optimizer.param_groups, settings, strict=True):
        group.update(before)


class _OwnRows(Mapping[str, Tensor]):
    """The stored tensors of one parameter, of which the rows that are here are read when somebody asks for them."""

    def __init__(self, stored: Mapping[str, StoredTensor], rows: Rows) -> None:
        self._stored, self._rows = stored, rows

    def __getitem__(self, name: str) -> Tensor:
        for _, values in read_rows(self._stored, {name: _range(self._rows)}):
            wide = torch.promote_types(values.dtype, torch.float32) if values.is_floating_point() else values.dtype
            return values.to(wide if values.ndim else values.dtype, copy=True)
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return name in self._stored  # `Mapping` would read it to say so

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _range(rows: Rows) -> range | None:
    return range(rows.first, rows.first + rows.local.shape[0]) if rows.local.ndim else None
