"""`parallel.shard`: which numbers of ranks it means, and what is refused."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed.ranks import run_ranks
from tests.training.tiny_run import tiny_config, write_tiny_files
from transformerlm.distributed.world import World
from transformerlm.training.build import build_optimizer, build_shards
from transformerlm.training.loop import batch_loss
from transformerlm.training.planning import sharding
from transformerlm.training.planning.micro_batch import memory_by_part
from transformerlm.training.planning.sharding import choose_shard_size, memory_check
from transformerlm.utils.dtypes import autocast

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a tiny run."""
    return write_tiny_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def choose(files, tmp_path):
    """Return the choice for a `parallel.shard`, where the ranks in `enough` are enough to share one copy."""

    def chosen(shard, *, world_size, local_world_size, enough=1):
        config = tiny_config(files, tmp_path, {"parallel.shard": shard})
        sizes = {"world_size": world_size, "local_world_size": local_world_size}
        return choose_shard_size(config, **sizes, fits=lambda size: size >= enough)

    return chosen


@pytest.mark.parametrize(("enough", "expected"), [(1, 1), (2, 8), (8, 8), (9, 16), (17, 24), (25, 48), (49, 48)])
def test_auto_takes_one_then_the_fewest_machines(enough, expected, choose):
    """Sharing costs traffic, so "auto" shares no further than the memory asks; the check of memory has the last word.

    Of six machines, one, two, three or six can share a copy.
    """
    assert choose("auto", world_size=48, local_world_size=8, enough=enough) == expected


def test_auto_omits_machines_that_differ(choose):
    """Six ranks on machines of four and two cannot be cut into machines."""
    assert choose("auto", world_size=6, local_world_size=4, enough=2) == 6


def test_what_is_written_is_taken(choose):
    """A number, the machine and all ranks are taken whether they fit or not."""
    sizes = {"world_size": 16, "local_world_size": 8, "enough": 99}
    assert [choose(shard, **sizes) for shard in (1, 2, 16, "node", "all")] == [1, 2, 16, 8, 16]


@pytest.mark.parametrize("shard", [8, "node", "all", "auto"])
def test_one_rank_shares_with_nobody(shard, choose):
    """The file of a cluster's run trains on one GPU too."""
    assert choose(shard, world_size=1, local_world_size=1, enough=2) == 1


def test_a_number_that_does_not_divide_the_ranks_is_refused(choose):
    """The refusal lists the numbers that do."""
    with pytest.raises(ValueError, match=r"parallel\.shard = 3: .* divides the 8 processes \(1, 2, 4, 8\)"):
        choose(3, world_size=8, local_world_size=8)


def test_node_needs_machines_of_one_size(choose):
    """The refusal names both numbers and the way out."""
    with pytest.raises(ValueError, match=r'"node": .* found others of 6 in all; set parallel\.shard = "all"'):
        choose("node", world_size=6, local_world_size=4)


@pytest.mark.parametrize(("micro_batch_size", "sequences"), [("auto", 1), (2, 2), (None, 3)])
def test_the_check_leaves_a_tenth_free(micro_batch_size, sequences, files, tmp_path):
    """It counts the sequences of a pass: those of the file, one if they are still to be chosen, or a rank's share."""
    config = tiny_config(files, tmp_path, {"training.micro_batch_size": micro_batch_size, "training.batch_size": 8})
    place = {"precision": "fp32", "device": CPU}
    need = memory_by_part(config, micro_batch_size=sequences, num_ranks=3, shard_size=3, **place)["total"]
    for room, expected in ((need / 0.9 + 2, True), (need / 0.9 - 2, False)):
        assert memory_check(config, memory_bytes=int(room), world_size=3, **place)(3) is expected


def test_the_ranks_of_a_machine_share_its_memory(files, tmp_path, monkeypatch):
    """Half of a machine's memory is not enough for a rank that fills most of it."""
    config = tiny_config(files, tmp_path, {"training.micro_batch_size": 1})
    place = {"precision": "fp32", "device": CPU}
    need = memory_by_part(config, micro_batch_size=1, **place)["total"]
    monkeypatch.setattr(sharding, "device_memory_bytes", lambda device: int(1.5 * need))
    for ranks, expected in ((1, True), (2, False)):
        fits = sharding.memory_check_here(config, world=World(world_size=ranks, local_world_size=ranks), **place)
        assert fits(1) is expected


class Storages(TorchDispatchMode):
    """The most bytes that were alive at once in the tensors that operations take and make."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0
        for one in gc.get_objects():
            self._see(one)

    def _see(self, value):
        if type(value) in (torch.Tensor, torch.nn.Parameter) and value.device.type == "cpu":
            storage = value.untyped_storage()
            self.alive[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            self._see(value)
        sizes = [storage.nbytes() for one in self.alive.values() if (storage := one()) is not None]
        self.peak = max(self.peak, sum(sizes))
        return out


def peaks_of_a_step(world, config, settings):
    """Return the peak of the second step of a rank for each (precision, shard_size)."""
    found = []
    for precision, shard_size in settings:
        model, shards = build_shards(config, device=CPU, precision=precision, world=world, shard_size=shard_size)
        optimizer = build_optimizer(model, config, precision=precision, shards=shards)
        ids = torch.randint(0, model.vocab_size, (1, model.context_length))

        def step(model=model, shards=shards, optimizer=optimizer, precision=precision, ids=ids):
            shards.drop_gradients()
            with autocast(CPU, precision):
                _, loss = batch_loss(model, ids, ids)
            loss.backward()
            shards.take_gradients()
            optimizer.step()

        step()
        with Storages() as storages:
            step()
        found.append(storages.peak)
        del model, shards, optimizer, step
        gc.collect()
    return found


@pytest.mark.slow
def test_the_estimate_is_no_less_than_a_rank_takes(files, tmp_path):
    """It is at most a fifth above the tensors that are alive at the peak of a step, whoever shares the model."""
    sizes = {"d_model": 512, "num_layers": 6, "num_heads": 8, "d_ff": 1408, "vocab_size": 4096, "context_length": 64}
    config = tiny_config(files, tmp_path, {f"model.{name}": size for name, size in sizes.items()})
    settings = [("fp32", 2), ("bf16", 2), ("bf16", 1)]
    for (precision, shard_size), peak in zip(settings, run_ranks(peaks_of_a_step, 2, config, settings)[0], strict=True):
        ranks = {"num_ranks": 2, "shard_size": shard_size}
        place = {"precision": precision, "device": torch.device("cuda")}  # without what libraries take on a CPU
        estimate = memory_by_part(config, micro_batch_size=1, **place, **ranks)["total"]
        assert peak <= estimate <= 1.2 * peak, (precision, shard_size, estimate / peak)
