"""Training states in one file: what goes in comes out, also for other optimizers, and nothing is executed."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from transformerlm.checkpoints.optimizer_state import (
    load_training_state,
    optimizer_state_from_tensors,
    optimizer_state_to_tensors,
    save_training_state,
)
from transformerlm.training.optim import SGD, AdamW

OPTIMIZERS = [
    lambda p: AdamW(p, lr=0.01, betas=(0.8, 0.9)),
    lambda p: SGD(p, lr=0.01, momentum=0.9),
    lambda p: torch.optim.AdamW(p, lr=0.01),
    lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    lambda p: torch.optim.SGD(p, lr=0.01),
]


class Tied(nn.Module):
    """A small model with a weight under two names, a buffer and a transposed parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.randn(3, 2).T)
        self.register_buffer("count", torch.tensor(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))) @ self.scale.T


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_resumed_equals_uninterrupted(make: Any, tmp_path: Path) -> None:
    """Saved after 5 of 10 steps and loaded into fresh objects, training ends bit for bit where it would have."""
    straight = Tied()
    optimizer = make(straight.parameters())
    train(straight, optimizer, range(5))
    save_training_state(straight, optimizer, 5, tmp_path / "state")
    train(straight, optimizer, range(5, 10))

    resumed = Tied()
    other = make(resumed.parameters())
    assert load_training_state(tmp_path / "state", resumed, other) == 5
    train(resumed, other, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_binary_file_objects_work_like_paths(tmp_path: Path) -> None:
    """A file object and a path get the same bytes, and nothing unfinished is left beside the path."""
    model = Tied()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, range(2))
    buffer = io.BytesIO()
    save_training_state(model, optimizer, 2, buffer)
    save_training_state(model, optimizer, 2, tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == buffer.getvalue()
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    buffer.seek(0)
    assert load_training_state(buffer, Tied(), AdamW(Tied().parameters())) == 2


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_optimizer_state_survives_json_and_tensors(make: Any) -> None:
    """The plain part really is JSON, and both parts together restore the state dict, including tuples and None."""
    model = Tied()
    optimizer = make(model.parameters())
    train(model, optimizer, range(3))
    tensors, plain = optimizer_state_to_tensors(optimizer)
    found = optimizer_state_from_tensors(tensors, json.loads(json.dumps(plain)))
    expected = copy.deepcopy(optimizer.state_dict())
    assert found["state"].keys() == expected["state"].keys()
    torch.testing.assert_close(found["state"], expected["state"], rtol=0, atol=0)
    assert found["param_groups"] == expected["param_groups"]


def test_optimizer_without_state_is_saved_too(tmp_path: Path) -> None:
    """Before the first step there are no moments; the file is still whole."""
    model = Tied()
    save_training_state(model, AdamW(model.parameters(), lr=0.5), 0, tmp_path / "state")
    other = AdamW(model.parameters(), lr=0.1)
    assert load_training_state(tmp_path / "state", model, other) == 0
    assert other.param_groups[0]["lr"] == 0.5


def test_state_that_is_not_plain_is_refused() -> None:
    """A value that JSON and tensors cannot hold is an error that names it, not a pickle."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = AdamW([parameter])
    optimizer.state[parameter]["secret"] = object()
    with pytest.raises(ValueError, match=r"state.0.secret is a object; expected a tensor"):
        optimizer_state_to_tensors(optimizer)


def test_missing_tensor_is_named() -> None:
    """The plain part alone cannot be loaded."""
    model = Tied()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, range(1))
    tensors, plain = optimizer_state_to_tensors(optimizer)
    del tensors["state.1.exp_avg"]
    with pytest.raises(ValueError, match=r"tensor state.1.exp_avg is missing"):
        optimizer_state_from_tensors(tensors, plain)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    """An empty file, noise, a pickle, or safetensors from elsewhere give an error, and no code is run."""
    from safetensors.torch import save

    path = tmp_path / "state"
    for content in (b"", b"noise" * 10, pickle.dumps({"a": 1}), (2**40).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            load_training_state(path, Tied(), AdamW(Tied().parameters()))
    path.write_bytes(save({"x": torch.zeros(1)}))
    with pytest.raises(ValueError, match="expected format 'transformerlm-training-state-1', found None"):
        load_training_state(path, Tied(), AdamW(Tied().parameters()))
