"""`micro_batch_size = "auto"`: what fits, the same on every rank, and the same after a resume."""

from __future__ import annotations

import weakref

import pytest
import torch

from config.train import TrainConfig
from tests.training.tiny_run import tiny_config, write_tiny_files
from transformerlm.distributed.world import World
from transformerlm.training.build import sequences_per_pass
from transformerlm.training.planning import micro_batch
from transformerlm.training.planning.machine import Machine
from transformerlm.training.planning.micro_batch import (
    divisors,
    memory_by_part,
    resolve,
    resolve_elsewhere,
)

CPU = torch.device("cpu")
SETTINGS = {"device": CPU, "precision": "fp32"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a tiny run."""
    return write_tiny_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def auto(files, tmp_path):
    """A configuration of 8 sequences per step with "auto" as its micro-batch."""
    return tiny_config(files, tmp_path, {"training.micro_batch_size": "auto"})


def free(monkeypatch, num_bytes):
    """Pretend that this much memory is free."""
    monkeypatch.setattr(micro_batch, "available_memory_bytes", lambda device: num_bytes)


def total(config, size, num_ranks=1):
    """The estimate for a micro-batch."""
    return memory_by_part(config, micro_batch_size=size, num_ranks=num_ranks, **SETTINGS)["total"]


@pytest.mark.parametrize("size", [8, 4, 2, 1])
def test_the_largest_that_fits_is_taken(size, auto, monkeypatch):
    """It is the largest divisor of the batch whose estimate is within the usable part of the free memory."""
    free(monkeypatch, total(auto, size) / micro_batch._BY_ESTIMATE + 1)
    assert resolve(auto, world=World(), **SETTINGS).training.micro_batch_size == size


@pytest.mark.parametrize(("size", "expected"), [(8, 4), (4, 4), (2, 2)])
def test_elsewhere_it_is_the_largest_share_that_fits_by_the_estimate(size, expected, auto):
    """Each of two processes takes at most half of the batch, within the usable part of its own device."""
    room = int(total(auto, size, num_ranks=2) / micro_batch._BY_ESTIMATE) + 1
    there = Machine("2 x GPU", CPU, room, room, num_processes=2)
    assert resolve_elsewhere(auto, there, precision="fp32").training.micro_batch_size == expected


def test_where_nothing_fits_it_is_one(auto, monkeypatch):
    """The preflight then says what is missing."""
    free(monkeypatch, 1)
    assert resolve(auto, world=World(), **SETTINGS).training.micro_batch_size == 1


def test_the_rest_of_the_configuration_stays(auto):
    """The rest is as the user wrote it, and so is a number of their own."""
    resolved = resolve(auto, world=World(), **SETTINGS)
    assert resolved.training.model_copy(update={"micro_batch_size": "auto"}) == auto.training
    assert resolve(resolved, world=World(), **SETTINGS) is resolved


@pytest.mark.parametrize(("world_size", "expected"), [(2, 4), (4, 2), (8, 1)])
def test_ranks_share_batch_and_memory(world_size, expected, auto, monkeypatch):
    """The number divides each rank's share, the ranks together stay within the memory, and the lowest number counts."""
    monkeypatch.setattr(micro_batch, "all_reduce_min", lambda number, world: number)
    world = World(world_size=world_size, local_world_size=world_size)
    resolved = resolve(auto, world=world, **SETTINGS)
    assert resolved.training.micro_batch_size == expected
    free(monkeypatch, world_size * total(auto, 1, world_size) / micro_batch._BY_ESTIMATE + 1)
    assert resolve(auto, world=world, **SETTINGS).training.micro_batch_size == 1
    monkeypatch.setattr(micro_batch, "all_reduce_min", lambda number, world: 1)
    free(monkeypatch, 10**12)
    assert resolve(auto, world=world, **SETTINGS).training.micro_batch_size == 1


def test_a_batch_that_does_not_divide_is_cut_by_its_largest_share(auto, monkeypatch):
    """Of 8 sequences three ranks have 3, 3 and 2; the number divides 3, here and for a machine that is not here."""
    monkeypatch.setattr(micro_batch, "all_reduce_min", lambda number, world: number)
    chosen = resolve(auto, world=World(world_size=3), **SETTINGS)
    assert chosen.training.micro_batch_size == 3
    assert TrainConfig.model_validate(chosen.model_dump()) == chosen  # every later start reads it from the checkpoint
    there = Machine("3 x GPU", CPU, 10**12, 10**12, num_processes=3)
    assert resolve_elsewhere(auto, there, precision="fp32").training.micro_batch_size == 3


def test_ranks_that_share_a_model_do_not_try_it_whole(auto, monkeypatch):
    """On CUDA a trial would build the whole model on each rank, which sharding is there to avoid."""
    monkeypatch.setattr(micro_batch, "all_reduce_min", lambda number, world: number)
    monkeypatch.setattr(micro_batch, "_largest_that_runs", lambda *_: 7)
    place = {"device": torch.device("cuda"), "precision": "bf16"}
    need = memory_by_part(auto, micro_batch_size=2, num_ranks=2, shard_size=2, **place)["total"]
    free(monkeypatch, need / micro_batch._BY_ESTIMATE + 1)
    world = World(world_size=2)
    assert resolve(auto, world=world, shard_size=2, **place).training.micro_batch_size == 2
    assert resolve(auto, world=world, **place).training.micro_batch_size == 7


def test_only_the_ranks_of_this_machine_share_its_memory(auto, monkeypatch):
    """Of four ranks on two machines, two share the memory that is free here."""
    monkeypatch.setattr(micro_batch, "all_reduce_min", lambda number, world: number)
    free(monkeypatch, 2 * total(auto, 2, num_ranks=4) / micro_batch._BY_ESTIMATE + 2)
    chosen = resolve(auto, world=World(world_size=4, local_world_size=2), **SETTINGS)
    assert chosen.training.micro_batch_size == 2


def test_auto_is_no_number(auto):
    """A program that has not chosen a number gets an error that says so."""
    with pytest.raises(ValueError, match='found "auto"'):
        sequences_per_pass(auto.training, 1)


@pytest.mark.parametrize(("number", "expected"), [(1, [1]), (12, [12, 6, 4, 3, 2, 1]), (49, [49, 7, 1])])
def test_divisors(number, expected):
    """All of them, the largest first, each once."""
    assert divisors(number) == expected


@pytest.mark.parametrize("limit", [3, 1, 0])
def test_a_trial_ends_at_the_first_size_that_runs(limit, auto, monkeypatch):
    """On CUDA each size is tried until none runs out of memory; at the end it is one."""
    tried = []

    def runs(model, size, *_):
        tried.append(size)
        return size <= limit

    monkeypatch.setattr(micro_batch, "_runs", runs)
    chosen = micro_batch._largest_that_runs(auto, divisors(6), CPU, "fp32")
    assert (chosen, tried) == ((3, [6, 3]) if limit == 3 else (1, [6, 3, 2, 1]))


def test_a_trial_leaves_out_what_the_preflight_would_refuse(auto, monkeypatch):
    """Otherwise the run would end with the advice to lower a number that nobody has set."""
    room = memory_by_part(auto, micro_batch_size=2, **SETTINGS)["total"]
    monkeypatch.setattr(micro_batch, "device_memory_bytes", lambda device: room)
    monkeypatch.setattr(micro_batch, "_runs", lambda *_: True)
    assert micro_batch._largest_that_runs(auto, divisors(8), CPU, "fp32") == 2


def test_a_model_too_large_for_the_device_is_not_made(auto, monkeypatch):
    """The preflight refuses it with both numbers, before torch runs out of memory."""
    room = memory_by_part(auto, micro_batch_size=1, **SETTINGS)["total"] - 1
    monkeypatch.setattr(micro_batch, "device_memory_bytes", lambda device: room)
    monkeypatch.setattr(micro_batch, "TransformerLM", lambda **_: pytest.fail("a model was made"))
    assert micro_batch._largest_that_runs(auto, divisors(8), CPU, "fp32") == 1


def test_the_peak_of_a_trial_is_not_the_run_s(auto, monkeypatch):
    """The model of the trial is gone when the peak is reset, on the device where it was."""
    models, found = [], []

    def runs(model, *_):
        models.append(weakref.ref(model))
        return len(models) == 2

    monkeypatch.setattr(micro_batch, "_runs", runs)
    monkeypatch.setattr(micro_batch.memory, "reset_peaks", lambda device: found.append((device, models[-1]())))
    micro_batch._largest_that_runs(auto, divisors(8), CPU, "fp32")
    assert found == [(CPU, None)]


def test_running_out_of_memory_is_an_answer(auto, monkeypatch):
    """A pass without enough memory returns False; another error is an error."""
    model = micro_batch.TransformerLM(**auto.model.model_dump())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert micro_batch._runs(model, 2, 10, CPU, "fp32")
    assert all(parameter.grad is None for parameter in model.parameters())

    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(micro_batch, "batch_loss", full)
    assert not micro_batch._runs(model, 2, 10, CPU, "fp32")


@pytest.mark.gpu
def test_the_choice_on_cuda_trains(files, tmp_path):
    """The size chosen for a batch that does not fit makes a step within the device's memory."""
    from transformerlm.training.planning.calibration import calibrate

    changes = {"model.d_model": 1024, "model.context_length": 1024, "model.num_layers": 8, "model.num_heads": 16}
    changes |= {"training.micro_batch_size": "auto", "training.batch_size": 2**14, "training.device": "cuda"}
    config = tiny_config(files, tmp_path, {**changes, "model.d_ff": 4096})
    device = torch.device("cuda")
    resolved = resolve(config, device=device, precision="bf16", world=World())
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated(), "the trial has left a peak"
    size = resolved.training.micro_batch_size
    assert 1 <= size < 2**14
    training = resolved.training.model_copy(update={"batch_size": size})
    found = calibrate(resolved.model_copy(update={"training": training}), 1, device=device, precision="bf16")
    assert found.peak_bytes <= torch.cuda.get_device_properties(device).total_memory
