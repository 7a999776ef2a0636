"""A state of training of which each rank holds its rows, as the tests of checkpoints on several ranks need it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from config.io import dump_toml
from tests.checkpoints.helpers import take_step
from tests.training.tiny_run import TinyFiles, tiny_config
from transformerlm.checkpoints.optimizer_state import OptimizerState
from transformerlm.checkpoints.save import Snapshot
from transformerlm.distributed.rows import Rows, own_rows
from transformerlm.distributed.world import World
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer import Tokenizer
from transformerlm.training.muon import Muon, muon_groups

MAX_FILE_BYTES = 40_000
"""Cuts the model's 160 kB into five files and the optimizer's state into seven."""


@dataclass(frozen=True)
class Training:
    """What a rank holds of weights and optimizer; `names` are the weights' names, in the optimizer's order."""

    weights: dict[str, Rows]
    optimizer: Optimizer
    names: list[str]

    def rows(self) -> list[Rows]:
        """Return the rows of the optimizer's parameters, in its order."""
        return [self.weights[name] for name in self.names]

    def snapshot(self, files: TinyFiles) -> Snapshot:
        """Return what a checkpoint holds of it."""
        return Snapshot(
            self.weights,
            OptimizerState.of(self.optimizer, self.rows()),
            Tokenizer.from_directory(files.tokenizer),
            dump_toml(tiny_config(files, Path("runs"))),
            {"tokens": 7},
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return all that is here, by name."""
        states = {
            f"{name}.{key}": torch.as_tensor(value)
            for name, parameter in zip(self.names, self.weights_of_optimizer(), strict=True)
            for key, value in self.optimizer.state[parameter].items()
        }
        return {name: rows.local.detach() for name, rows in self.weights.items()} | states

    def weights_of_optimizer(self) -> list[Tensor]:
        """Return the optimizer's parameters in its order."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def num_bytes(self) -> int:
        """Return the bytes of what is here."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


def whole_training(files: TinyFiles) -> Training:
    """Return a model after two steps of Muon, with a weight of fewer rows than ranks and a state of one number."""
    torch.manual_seed(0)
    model = TransformerLM(**tiny_config(files, Path("runs")).model.model_dump())
    model.register_parameter("few_rows", nn.Parameter(torch.arange(6.0).view(2, 3)))
    optimizer = Muon(muon_groups(model, weight_decay=0.1), 1e-2)
    model.few_rows.grad = torch.ones(2, 3)
    for _ in range(2):
        take_step(model, optimizer)
    optimizer.state[model.few_rows]["count"] = torch.tensor(3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    return Training({name: Rows.whole(parameter) for name, parameter in model.named_parameters()}, optimizer, order)


def own_part(whole: Training, world: World, shard_size: int, *, empty: bool = False) -> Training:
    """Return the rows of a rank; with `empty`, weights of zero and no state, as before a checkpoint is loaded."""
    place = world.rank % shard_size
    weights = {}
    for name, rows in whole.weights.items():
        own = own_rows(rows.shape[0], place, shard_size)
        local = rows.local.detach()[own.start : own.stop].clone()
        weights[name] = Rows(nn.Parameter(local.zero_() if empty else local), rows.shape, own.start)
    names, groups = iter(whole.names), []
    for group in whole.optimizer.param_groups:
        groups.append({**group, "params": [weights[next(names)].local for _ in group["params"]]})
    optimizer = Muon(groups, 1e-2)
    if not empty:
        for name, parameter in zip(whole.names, whole.weights_of_optimizer(), strict=True):
            optimizer.state[weights[name].local] = _own_state(whole.optimizer.state[parameter], weights[name])
    return Training(weights, optimizer, whole.names)


def _own_state(state: dict[str, Any], rows: Rows) -> dict[str, Any]:
    last = rows.first + rows.local.shape[0]
    return {
        key: value[rows.first : last].clone() if isinstance(value, Tensor) and value.ndim else value
        for key, value in state.items()
    }


def total_bytes(training: Training) -> int:
    """Return the bytes of all weights, here and elsewhere."""
    return sum(rows.local.element_size() * math.prod(rows.shape) for rows in training.weights.values())
