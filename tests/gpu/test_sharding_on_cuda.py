"""FSDP2 on one CUDA device: a mesh of one rank shows the precision policy and the memory, not the network."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from config.train import TrainConfig
from transformerlm.distributed.sharding import Shards
from transformerlm.distributed.world import World
from transformerlm.training.build import build_model, build_optimizer, build_shards
from transformerlm.training.loop import train_step
from transformerlm.utils.dtypes import autocast

pytestmark = pytest.mark.gpu

SIZES = {"vocab_size": 1000, "context_length": 64, "d_model": 128, "num_layers": 4, "num_heads": 4, "d_ff": 384}


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    """Return the CUDA device of a group of one rank."""
    found = torch.device("cuda", 0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=address, rank=0, world_size=1, device_id=found)
    yield found
    dist.destroy_process_group()


def losses(config: TrainConfig, device: torch.device, *, sharded: bool) -> list[float]:
    """Return the losses of ten steps in bf16."""
    if sharded:
        place: dict[str, Any] = {"device": device, "precision": "bf16", "world": World(), "shard_size": 1}
        model, shards = build_shards(config, **place)
    else:
        model = build_model(config, device=device)
        shards = Shards.whole(model)
    optimizer = build_optimizer(model, config, precision="bf16", shards=shards)
    ids = torch.randint(
        SIZES["vocab_size"], (8, SIZES["context_length"] + 1), generator=torch.Generator().manual_seed(0)
    )
    batch = (ids[:, :-1].to(device), ids[:, 1:].to(device))
    settings: dict[str, Any] = {"max_grad_norm": 1.0, "autocast": partial(autocast, device, "bf16")}
    return [
        train_step(model, optimizer, [batch], learning_rate=1e-3, shards=shards, **settings).loss for _ in range(10)
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_mesh_of_one_gives_the_losses_of_autocast(optimizer: str, device: torch.device) -> None:
    """Weights gathered as bfloat16 are the copies that autocast makes; NCCL moves them from the device to itself."""
    tree = {
        "model": SIZES,
        "data": {"train": "train.npy", "tokenizer": "tokenizer"},
        "training": {"max_steps": 10, "batch_size": 8},
        "optimizer": {"name": optimizer},
    }
    config = TrainConfig.model_validate(tree)
    alone = losses(config, device, sharded=False)
    assert losses(config, device, sharded=True) == pytest.approx(alone, rel=2e-3)
    assert alone[-1] < alone[0] - 0.1
