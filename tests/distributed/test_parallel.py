"""Two gloo ranks on this machine, compared with a single process that sees the whole batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from transformerlm.distributed import parallel
from transformerlm.distributed.parallel import average_gradients, broadcast_parameters
from transformerlm.distributed.world import (
    World,
    all_reduce_min,
    all_reduce_sum,
    barrier,
    init_from_env,
    is_main,
    shutdown,
)

ROOT = Path(__file__).parents[2]

RANK_PROGRAM = """
import sys
import torch
from torch import nn
from transformerlm.distributed import parallel
from transformerlm.distributed.parallel import *
from transformerlm.distributed.world import *

torch.set_num_threads(1)
parallel._BUCKET_BYTES = 64  # several buckets even for this small a model
world = init_from_env()
torch.manual_seed(100 + world.rank)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
model.register_buffer("scale", torch.full((2,), float(world.rank)))
model.unused = nn.Parameter(torch.ones(2))
broadcast_parameters(model, world)
inputs, targets = torch.load(sys.argv[1], weights_only=True)
mine = slice(0, 7) if is_main(world) else slice(7, 10)
nn.functional.cross_entropy(model(inputs[mine]), targets[mine]).backward()
if is_main(world):
    model.unused.grad = torch.full((2,), 10.0)
average_gradients(model.parameters(), world, share=inputs[mine].shape[0] / 10)
count = torch.tensor(inputs[mine].shape[0])
total = all_reduce_sum(count, world)
assert count == inputs[mine].shape[0], "the argument was changed"
least = torch.tensor(all_reduce_min(8 - world.rank, world))
result = {"state": model.state_dict(), "grads": [p.grad for p in model.parameters()], "total": total, "least": least}
torch.save(result, f"{sys.argv[2]}/{world.rank}.pt")
barrier(world)
shutdown(world)
print(world)
"""


def _run_two_ranks(folder: Path) -> tuple[list[dict], list[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM, str(folder / "batch.pt"), str(folder)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)], printed


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], list[str], torch.Tensor, torch.Tensor]:
    folder = tmp_path_factory.mktemp("ranks")
    inputs, targets = torch.randn(10, 4), torch.randint(0, 3, (10,))
    torch.save((inputs, targets), folder / "batch.pt")
    return (*_run_two_ranks(folder), inputs, targets)


def test_averaged_gradients_equal_the_whole_batch(two_ranks):
    """Ranks with unequal numbers of rows, weighted by their shares, get the gradients of one process with all rows."""
    results, _, inputs, targets = two_ranks
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    model.load_state_dict({key: value for key, value in results[0]["state"].items() if key not in ("scale", "unused")})
    nn.functional.cross_entropy(model(inputs), targets).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    for result in results:
        unused, *averaged = result["grads"]
        torch.testing.assert_close(averaged, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(unused, torch.full((2,), 7.0))


def test_ranks_begin_and_stay_equal(two_ranks):
    """After the broadcast, parameters and buffers are those of rank 0 everywhere; so are the averaged gradients."""
    (first, second), _, _, _ = two_ranks
    assert first["state"].keys() == second["state"].keys()
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key
    assert torch.equal(first["state"]["scale"], torch.zeros(2))
    assert all(torch.equal(a, b) for a, b in zip(first["grads"], second["grads"], strict=True))


def test_sum_over_ranks(two_ranks):
    """A sum, and the smallest number, reach every rank, and each rank knows its place."""
    results, printed, _, _ = two_ranks
    assert [result["total"].item() for result in results] == [10, 10]
    assert [result["least"].item() for result in results] == [7, 7]
    places = [f"World(rank={rank}, local_rank={rank}, world_size=2)" for rank in range(2)]
    assert [line.strip() for line in printed] == places


def test_world_of_one_is_free(monkeypatch):
    """Without torchrun's variables nothing is initialised and no call changes or copies a tensor."""
    monkeypatch.delenv("RANK", raising=False)
    world = init_from_env()
    assert world == World()
    assert is_main(world)
    assert not world.is_distributed
    model = nn.Linear(2, 2)
    model.weight.grad = torch.ones(2, 2)
    broadcast_parameters(model, world)
    average_gradients(model.parameters(), world, share=0.0)
    barrier(world)
    shutdown(world)
    tensor = torch.ones(1)
    assert all_reduce_sum(tensor, world) is tensor
    assert all_reduce_min(3, world) == 3
    assert torch.equal(model.weight.grad, torch.ones(2, 2))
    assert model.bias.grad is None
    assert not torch.distributed.is_initialized()


def test_one_rank_under_torchrun_needs_no_group(monkeypatch):
    """`torchrun --nproc-per-node=1` is a world of one."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert init_from_env() == World()


@pytest.mark.parametrize("value", [None, "", "two", "-1"])
def test_half_described_world_is_refused(monkeypatch, value):
    """RANK without a usable WORLD_SIZE names the variable and says how to start."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if value is not None:
        monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(ValueError, match=r"WORLD_SIZE: expected a whole number.*torchrun"):
        init_from_env()


def test_buckets_keep_order_size_and_kind(monkeypatch):
    """Buckets are cut at the size limit and where the dtype changes; one large gradient has its own."""
    monkeypatch.setattr(parallel, "_BUCKET_BYTES", 16)
    sizes = [2, 2, 1, 100, 3]
    gradients = [torch.zeros(size) for size in sizes] + [torch.zeros(1, dtype=torch.bfloat16)]
    buckets = list(parallel._buckets(gradients))
    assert [[len(gradient) for gradient in bucket] for bucket in buckets] == [[2, 2], [1], [100], [3], [1]]
