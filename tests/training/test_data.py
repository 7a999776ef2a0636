"""Batches as pure functions of (seed, step), and token files that must be what their sidecars say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from transformerlm.training import to_device
from transformerlm.training.data import get_batch, sample_starts, sequential_batches

TOKENS = np.arange(1000, dtype=np.uint16)
BATCH = {"batch_size": 12, "context_length": 8, "seed": 3, "step": 7}


def test_targets_are_inputs_shifted_by_one() -> None:
    """Inputs and targets are int64, contiguous, `(batch, seq)`, and each target is the token after its input."""
    inputs, targets = get_batch(TOKENS, **BATCH)
    assert inputs.shape == targets.shape == (12, 8)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert inputs.is_contiguous()
    assert targets.is_contiguous()


def test_batch_is_a_pure_function_of_seed_and_step() -> None:
    """The same (seed, step) gives the same batch, whatever the global generators; others give other batches."""
    first = get_batch(TOKENS, **BATCH)[0]
    np.random.seed(0)
    torch.manual_seed(123)
    assert torch.equal(get_batch(TOKENS, **BATCH)[0], first)
    assert not torch.equal(get_batch(TOKENS, **{**BATCH, "step": 8})[0], first)
    assert not torch.equal(get_batch(TOKENS, **{**BATCH, "seed": 4})[0], first)


def test_starts_are_pinned_numbers() -> None:
    """The stream never changes: a checkpoint resumed with another numpy must see the same data."""
    starts = sample_starts(10_000, batch_size=5, context_length=16, seed=42, step=1)
    assert starts.dtype == np.int64
    assert starts.tolist() == [7814, 8608, 5587, 1130, 9530]


@pytest.mark.parametrize(("world_size", "num_micro_batches"), [(1, 1), (1, 3), (4, 1), (2, 3), (5, 1), (1, 12)])
def test_parts_put_together_are_the_batch(world_size: int, num_micro_batches: int) -> None:
    """Ranks and micro-batches share the windows of (seed, step): none is lost, doubled or foreign."""
    whole = torch.cat(get_batch(TOKENS, **BATCH), dim=1)
    parts = [
        torch.cat(
            get_batch(
                TOKENS,
                **BATCH,
                rank=rank,
                world_size=world_size,
                micro_batch=micro_batch,
                num_micro_batches=num_micro_batches,
            ),
            dim=1,
        )
        for rank in range(world_size)
        for micro_batch in range(num_micro_batches)
    ]
    assert torch.equal(torch.cat(parts), whole)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_every_window_is_reachable_and_none_passes_the_end() -> None:
    """Over many steps each start from 0 to len - context_length - 1 occurs, about equally often."""
    starts = np.concatenate(
        [sample_starts(20, batch_size=64, context_length=8, seed=0, step=step) for step in range(200)]
    )
    counts = np.bincount(starts, minlength=12)
    assert len(counts) == 12
    assert counts.min() > 0.85 * 12_800 / 12
    assert counts.max() < 1.15 * 12_800 / 12


def test_data_of_one_window_always_gives_it() -> None:
    """context_length + 1 tokens are just enough."""
    inputs, targets = get_batch(TOKENS[:9], **BATCH)
    assert torch.equal(inputs, torch.arange(8).expand(12, 8))
    assert torch.equal(targets, torch.arange(1, 9).expand(12, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 1000}, r"1000 tokens are too few for a window of context_length \+ 1 = 1001"),
        ({"world_size": 13}, "a batch of 12 windows cannot be cut into 13 ranks"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"micro_batch": 3, "num_micro_batches": 3}, "micro_batch 3 of 3"),
        ({"step": -1}, "seed 3 and step -1"),
    ],
)
def test_impossible_batches_are_refused(changes: dict[str, Any], message: str) -> None:
    """Each error shows the numbers that do not fit."""
    with pytest.raises(ValueError, match=message):
        get_batch(TOKENS, **{**BATCH, **changes})


def test_large_ids_survive() -> None:
    """uint32 ids above 2^31 become the same int64."""
    tokens = np.full(20, 2**32 - 1, dtype=np.uint32)
    assert int(get_batch(tokens, **BATCH)[0].max()) == 2**32 - 1


def test_a_cuda_device_gets_narrow_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent to it has the two bytes an id of the file; what comes out is the batch of a CPU."""
    sent: list[Any] = []
    send = to_device._sent
    monkeypatch.setattr(to_device, "_sent", lambda ids, device: (sent.append(ids), send(ids, torch.device("cpu")))[1])
    found = get_batch(TOKENS, **BATCH, device="cuda")
    assert [(ids.dtype, ids.shape) for ids in sent] == [(np.uint16, (12, 9))]
    for one, other in zip(found, get_batch(TOKENS, **BATCH), strict=True):
        assert torch.equal(one, other)
    assert len(sent) == 1, "a CPU's ids are widened as they are read"


def test_sequential_batches_visit_each_target_once_in_order() -> None:
    """The windows do not overlap, the last batch is smaller, and only a rest shorter than a window is omitted."""
    batches = list(sequential_batches(TOKENS[:100], batch_size=4, context_length=7))
    assert [len(inputs) for inputs, _ in batches] == [4, 4, 4, 2]
    targets = torch.cat([targets for _, targets in batches])
    assert targets.flatten().tolist() == list(range(1, 99))
    inputs = torch.cat([inputs for inputs, _ in batches])
    assert inputs.flatten().tolist() == list(range(98))


def test_sequential_batches_stop_at_the_limit() -> None:
    """max_windows limits the windows, whatever the batches; too little data is an error at once."""
    first = next(sequential_batches(TOKENS, batch_size=5, context_length=7))[0]
    for batch_size in (1, 2, 4, 100):
        batches = list(sequential_batches(TOKENS, batch_size=batch_size, context_length=7, max_windows=5))
        assert torch.equal(torch.cat([inputs for inputs, _ in batches]), first)
    with pytest.raises(ValueError, match="7 tokens are too few"):
        next(sequential_batches(TOKENS[:7], batch_size=4, context_length=7))


@pytest.mark.gpu
def test_batch_arrives_on_the_gpu() -> None:
    """Pinned and copied, the batch on a CUDA device equals the one on the CPU."""
    found = get_batch(TOKENS, **BATCH, device="cuda")
    assert found[0].device.type == "cuda"
    assert torch.equal(found[1].cpu(), get_batch(TOKENS, **BATCH)[1])


@pytest.mark.parametrize(("batch_size", "world_size", "count"), [(8, 3, 3), (4, 3, 2), (12, 8, 2), (12, 5, 3)])
def test_every_rank_has_its_share_though_parts_are_empty(batch_size: int, world_size: int, count: int) -> None:
    """Together the ranks have each window once; their shares differ by one; an empty part keeps in step."""
    sizes = {"batch_size": batch_size, "world_size": world_size, "num_micro_batches": count}
    whole, _ = get_batch(TOKENS, **{**BATCH, "batch_size": batch_size})
    parts = [
        [get_batch(TOKENS, **{**BATCH, **sizes, "rank": rank, "micro_batch": m}) for m in range(count)]
        for rank in range(world_size)
    ]
    shares = [sum(len(targets) for _, targets in own) for own in parts]
    assert sum(shares) == batch_size
    assert max(shares) - min(shares) <= 1
    read = [inputs for own in parts for inputs, targets in own if len(targets)]
    assert torch.equal(torch.cat(read), whole)
    assert all(len(inputs) == max(1, len(targets)) for own in parts for inputs, targets in own)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_out_a_validation(world_size: int) -> None:
    """Together they have each window once; each makes as many passes of one size."""
    settings = {"batch_size": 4, "context_length": 8, "max_windows": 22}
    shared = [list(sequential_batches(TOKENS, rank=r, world_size=world_size, **settings)) for r in range(world_size)]
    assert len({len(batches) for batches in shared}) == 1
    targets = torch.cat([targets for batches in shared for _, targets in batches])
    whole = torch.cat([targets for _, targets in sequential_batches(TOKENS, **settings)])
    assert sorted(targets.tolist()) == sorted(whole.tolist())
    if world_size > 1:
        assert {len(inputs) for batches in shared for inputs, _ in batches} == {4}
