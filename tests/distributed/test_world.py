"""What ranks tell each other: texts, errors, sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import run_ranks
from transformerlm.distributed import world
from transformerlm.distributed.launcher import Launch
from transformerlm.distributed.world import (
    World,
    all_reduce_min,
    all_reduce_sum,
    gather_text,
    init_from_env,
    is_main,
    shutdown,
    together,
)


def _texts(world: World) -> tuple[list[str], ...]:
    return gather_text("\u00e9" * world.rank, world), gather_text("", world), gather_text("\udcff", world)


def _one_fails(world: World, folder: Path) -> str:
    try:
        with together(world):
            if world.rank == 1:
                raise OSError(28, "No space left on device", str(folder))
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _sums(world: World) -> tuple[float, float, int, str]:
    count = torch.tensor(3.0 + world.rank)
    total = all_reduce_sum(count, world)
    return float(count), float(total), all_reduce_min(8 - world.rank, world), str(world)


def test_sum_over_ranks():
    """A sum, and the smallest number, reach every rank; the argument stays as it is; each rank knows its place."""
    found = run_ranks(_sums, 2)
    assert found == [(3.0 + rank, 7.0, 7, f"World(rank={rank}, local_rank={rank}, world_size=2)") for rank in range(2)]


def test_every_rank_gets_the_texts_of_all():
    """Texts of several lengths, empty ones and those of odd bytes too, arrive whole and in order."""
    expected = ["", "\u00e9", "\u00e9\u00e9"]
    assert run_ranks(_texts, 3) == [(expected, [""] * 3, ["\\udcff"] * 3)] * 3


def test_one_ranks_error_is_everybodys(tmp_path):
    """The rank that fails raises its own error; the others say which rank it was."""
    found = run_ranks(_one_fails, 3, tmp_path)
    assert found[1] == f"OSError: [Errno 28] No space left on device: '{tmp_path}'"
    assert found[0] == found[2] == f"OSError: rank 1 of 3: {tmp_path}: No space left on device"


def test_a_world_of_one_talks_to_itself():
    """Nothing is sent; an error passes as it is."""
    assert gather_text("alone", World()) == ["alone"]
    with pytest.raises(ValueError, match="mine"), together(World()):
        raise ValueError("mine")


def test_world_of_one_is_free(monkeypatch):
    """Without torchrun's variables nothing is initialised and no call changes or copies a tensor."""
    monkeypatch.delenv("RANK", raising=False)
    world = init_from_env()
    assert world == World()
    assert is_main(world)
    assert not world.is_distributed
    shutdown(world)
    tensor = torch.ones(1)
    assert all_reduce_sum(tensor, world) is tensor
    assert all_reduce_min(3, world) == 3
    assert not torch.distributed.is_initialized()


def test_one_rank_under_torchrun_needs_no_group(monkeypatch):
    """`torchrun --nproc-per-node=1` is a world of one."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert init_from_env() == World()


@pytest.mark.parametrize(("device", "expected"), [("cpu", None), ("mps", None), ("auto", "cuda:1"), ("cuda", "cuda:1")])
def test_ranks_take_a_gpu_only_where_they_are_to(device, expected, monkeypatch):
    """Ranks on the CPU need no GPU each; one GPU by its number cannot be that of all ranks."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    launch = Launch(rank=1, local_rank=1, world_size=2, local_world_size=2)
    found = world._own_device(launch, device)
    assert (found and str(found), taken) == (expected, [1] if expected else [])
    with pytest.raises(ValueError, match=r'training.device: expected "cuda", of which each of the 2 .* found "cuda:0"'):
        world._own_device(launch, "cuda:0")


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


@pytest.mark.parametrize("backends", ["cpu:gloo,cuda:nccl", "gloo"])
@pytest.mark.parametrize("has_failed", [True, False])
def test_a_rank_that_failed_alone_does_not_wait_for_the_others(backends, has_failed, monkeypatch):
    """They may be inside an exchange on their GPUs, which NCCL would wait for; the end of Python would, too."""
    called = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: called.append("destroyed"))
    monkeypatch.setattr("atexit.register", lambda function: called.append(function.__name__))
    shutdown(World(0, 0, 2, 2), has_failed=has_failed)
    assert called == ["_end_at_once" if has_failed and "nccl" in backends else "destroyed"]


@pytest.mark.parametrize(("shown", "each", "number"), [(1, "1", 0), (4, "1", 3), (4, None, 3)])
def test_a_task_that_sees_its_own_gpu_alone_takes_that(shown, each, number, monkeypatch):
    """`srun --gpus-per-task=1` shows each task one GPU; else the local rank is the GPU's number."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: shown)
    monkeypatch.setattr(torch.cuda, "set_device", lambda found: None)
    if each is None:
        monkeypatch.delenv("SLURM_GPUS_PER_TASK", raising=False)
    else:
        monkeypatch.setenv("SLURM_GPUS_PER_TASK", each)
    found = world._own_device(Launch(3, 3, 4, 4), "cuda")
    assert found == torch.device("cuda", number)
