"""Losses that can be compared between machines: their weights and texts are the same everywhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarking.gpu import losses
from benchmarking.gpu.shapes import SMALL, TINY
from transformerlm.models.transformer import TransformerLM

TEXT = [25, 10, 3, 37, 39, 63, 8, 0]
WEIGHTS = [-0.2601657211780548, 0.29626280069351196, 0.2739837169647217]


def test_texts_and_weights_never_change() -> None:
    """The first numbers of both, as they were when the kept losses were made."""
    assert losses.text(TINY, 1)[0, :8].tolist() == TEXT
    model = losses.fill(TransformerLM(**TINY.model()))
    assert model.layers[0].attn.q_proj.weight[0, :3].tolist() == pytest.approx(WEIGHTS, rel=1e-6)


def test_a_text_can_be_learnt_and_differs_from_step_to_step() -> None:
    """Three quarters of the ids are one of four successors of the id before; each step has a text of its own."""
    shape = replace(TINY, batch_size=200)
    first, second = losses.text(shape, 1), losses.text(shape, 2)
    assert first.shape == (200, 17)
    assert not np.array_equal(first, second)
    followers: dict[int, list[int]] = {}
    for row in first:
        for a, b in zip(row[:-1].tolist(), row[1:].tolist(), strict=True):
            followers.setdefault(a, []).append(b)
    common = max(followers.values(), key=len)
    top_four = sorted((common.count(b) for b in set(common)), reverse=True)[:4]
    assert sum(top_four) / len(common) > 0.7


def test_losses_fall_and_come_again() -> None:
    """The losses are the same on every run, for any size of micro-batches."""
    once = list(losses.losses(TINY, device="cpu", precision="fp32", steps=20))
    cut = replace(TINY, micro_batch_size=2)
    assert list(losses.losses(cut, device="cpu", precision="fp32", steps=20)) == pytest.approx(once, abs=1e-5)
    assert once[-1] < once[0] - 0.1


def test_the_kept_losses_are_of_that_many_steps() -> None:
    """They begin near the loss of guessing among all ids, and fall."""
    kept = losses.kept_losses()
    assert len(kept) == losses.STEPS
    assert kept[0] == pytest.approx(np.log(SMALL.vocab_size), abs=0.2)
    assert kept[-1] < kept[0] - 3
