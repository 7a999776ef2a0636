"""The keys of dropout as a function of seed, step, row and place, and whole runs that drop numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cli.prepare_run import prepare_run
from cli.train import train
from tests.training.tiny_run import step_lines, tiny_config
from transformerlm.distributed.world import World
from transformerlm.models.settings import ModelSettings
from transformerlm.training.dropout_keys import dropout_keys

SIZES = {"vocab_size": 50, "context_length": 12, "d_model": 16, "num_layers": 3, "num_heads": 2}
EXPECTED = [-1931247898, 1992736036, -1500169496, 560187260]
DROPS = ModelSettings(**SIZES, dropout={"residual": 0.1})


def keys(rows: range, **changes: Any) -> torch.Tensor:
    found = dropout_keys(DROPS, rows, **{"seed": 7, "step": 5, **changes})
    assert found is not None
    return found


def test_a_row_has_its_keys_whoever_asks_for_it() -> None:
    """The keys of a few rows are those of the whole batch's rows; they are `(num_keys, rows, 2)` in int32."""
    whole = keys(range(8))
    assert (whole.shape, whole.dtype) == ((10, 8, 2), torch.int32)
    assert torch.equal(keys(range(3, 6)), whole[:, 3:6])
    assert torch.equal(keys(range(8)), whole)


def test_no_two_keys_are_alike() -> None:
    """Over seeds, steps, places and rows, all differ."""
    found = [keys(range(8), seed=seed, step=step) for seed in (0, 1, 2**63 - 1) for step in range(1, 20)]
    pairs = torch.cat(found).reshape(-1, 2)
    assert len(torch.unique(pairs, dim=0)) == len(pairs) == 3 * 19 * 80


def test_the_keys_never_change() -> None:
    """A run that resumes with a later version draws on with the same masks."""
    assert keys(range(1)).flatten()[:4].tolist() == EXPECTED


def test_a_model_that_drops_nothing_needs_no_keys() -> None:
    """Neither without the section nor with zeros in it."""
    for dropout in (None, {"residual": 0.0}):
        assert dropout_keys(ModelSettings(**SIZES, dropout=dropout), range(4), seed=0, step=1) is None


@pytest.mark.parametrize(("world_size", "size"), [(1, 8), (1, 3), (2, 2), (3, 1)])
def test_ranks_and_micro_batches_share_out_the_keys_as_they_share_the_batch(world_size, size, files, tmp_path):
    """One after the other, their keys are those of the whole batch, row for row beside their windows."""
    config = tiny_config(files, tmp_path, {"model.dropout": {"residual": 0.1}})
    inputs, found = [], []
    run = prepare_run(config, tmp_path / "run", world=World())
    for rank in range(world_size):
        trainer = run.trainer(world=World(rank=rank, world_size=world_size), micro_batch_size=size)
        parts = zip(trainer.micro_batches(4), trainer.dropout_keys(4), strict=True)
        for (windows, targets), one in parts:
            assert one.shape[1] == len(windows)
            inputs.append(windows[: len(targets)])
            found.append(one[:, : len(targets)])
    whole = run.trainer()
    assert torch.equal(torch.cat(inputs), whole.micro_batches(4)[0][0])
    assert torch.equal(torch.cat(found, dim=1), whole.dropout_keys(4)[0])


def test_micro_batches_change_the_losses_by_rounding_only(files, tmp_path):
    """Runs that drop numbers log the same losses with 8x1 and 4x2 sequences, and others than without dropout."""
    losses = {}
    for name, changes in {
        "whole": {"model.dropout": {"attention": 0.2, "residual": 0.2}},
        "parts": {"model.dropout": {"attention": 0.2, "residual": 0.2}, "training.micro_batch_size": 2},
        "none": {"model.dropout": {"residual": 0.0}},
    }.items():
        train(tiny_config(files, tmp_path / name, {**changes, "training.eval_interval": 0, "checkpoint.interval": 0}))
        losses[name] = [line["metrics.loss"] for line in step_lines(tmp_path / name / "run")]
    assert losses["parts"] == pytest.approx(losses["whole"], rel=1e-5)
    assert losses["none"] != pytest.approx(losses["whole"], rel=1e-3)
