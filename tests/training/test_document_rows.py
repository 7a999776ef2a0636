"""Rows of whole documents: nothing is lost, nothing is cut without need, and the order is a function of the step."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.train import train
from logger import NoopLogger
from tests.training.tiny_run import TinyFiles, tiny_config
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.tokenizer import Tokenizer
from transformerlm.training.build import build_model, build_optimizer
from transformerlm.training.data import get_batch, sequential_batches
from transformerlm.training.document_rows import DocumentRows, best_fit
from transformerlm.training.loop import train_step
from transformerlm.training.reading import IGNORED
from transformerlm.training.run_data import RunData, reading_of
from transformerlm.training.runtime import Runtime
from transformerlm.training.saved_run import SavedRun
from transformerlm.training.trainer import Trainer
from transformerlm.utils.device import resolve_device

SEPARATOR, ROOM = 0, 16


def _corpus(seed: int = 0, num_documents: int = 60) -> tuple[Any, Any]:
    """Return ids and offsets of documents of 0 to 40 ids; each id but the separator occurs once."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 42, size=num_documents)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    tokens = np.arange(1, offsets[-1] + 1, dtype=np.uint16)
    tokens[offsets[1:] - 1] = SEPARATOR
    return tokens, offsets


def _rows(**changes: Any) -> DocumentRows:
    tokens, offsets = _corpus()
    return DocumentRows(tokens, offsets, **{"context_length": ROOM, "separator_id": SEPARATOR, "seed": 3, **changes})


def _plain_best_fit(lengths: list[int], num_opening: int, room: int) -> list[int]:
    """Return the room that is left in each row, sorted, by the rule as it is written, one piece after the other."""
    left: list[int] = []
    for number, length in enumerate(lengths):
        fitting = [row for row, free in enumerate(left) if free >= length]
        if number < num_opening or not fitting:
            left.append(room - length)
        else:
            left[min(fitting, key=lambda row: left[row])] -= length
    return sorted(left)


@pytest.mark.parametrize("seed", range(8))
def test_best_fit_is_the_rule_as_it_is_written(seed: int) -> None:
    """Placing pieces of one length together leaves the same rooms as placing them one after the other."""
    rng = np.random.default_rng(seed)
    opening = np.sort(rng.integers(1, 20, size=rng.integers(0, 8)))[::-1]
    others = np.sort(rng.integers(1, 21, size=rng.integers(0, 90)))[::-1]
    lengths = np.concatenate([opening, others])
    row_of = best_fit(lengths, num_opening=len(opening), room=20)
    used = np.bincount(row_of, weights=lengths) if len(lengths) else np.zeros(0)
    assert sorted((20 - used).tolist()) == _plain_best_fit(lengths.tolist(), len(opening), 20)


def test_each_id_is_a_target_once_an_epoch() -> None:
    """What is learnt in an epoch are the ids of the data, each as often as it is there; the rest is padding."""
    rows, (tokens, _) = _rows(), _corpus()
    for epoch in (0, 1):
        inputs, targets = rows.read(np.arange(len(rows)) + epoch * len(rows))
        assert np.array_equal(np.sort(targets[targets != IGNORED]), np.sort(tokens))
        assert np.count_nonzero(targets == IGNORED) == rows.num_padding
        assert (inputs[targets == IGNORED] == SEPARATOR).all()


def test_a_document_is_cut_only_if_it_is_longer_than_a_row() -> None:
    """A document that fits is whole in one row, after a separator; a longer one is cut, and its rest begins a row."""
    rows, (tokens, offsets) = _rows(), _corpus()
    inputs, targets = rows.read(np.arange(len(rows)))
    for start, end in pairwise(offsets):
        for first in range(start, end, ROOM):
            piece = tokens[first : min(first + ROOM, end)]
            if len(piece) < 2:
                continue  # an empty document, or the separator of a long one
            row, place = (int(one[0]) for one in np.nonzero(targets == piece[0]))
            assert np.array_equal(targets[row, place : place + len(piece)], piece)
            assert inputs[row, place] == (SEPARATOR if first == start else tokens[first - 1])
            assert place == 0 or first == start
    assert rows.num_cut == np.count_nonzero(np.diff(offsets) > ROOM)


def test_rows_and_neighbours_change_with_the_epoch_alone() -> None:
    """The same place gives the same row, whatever was read before; another epoch or seed gives another order."""
    rows = _rows()
    whole = rows.read(np.arange(2 * len(rows)))
    assert np.array_equal(whole[:, len(rows) - 2 : len(rows) + 2], rows.read(np.arange(len(rows) - 2, len(rows) + 2)))
    first, second = whole[1, : len(rows)], whole[1, len(rows) :]
    assert not np.array_equal(first, second)
    assert {row.tobytes() for row in first} != {row.tobytes() for row in second}
    assert not np.array_equal(_rows(seed=4).read(np.arange(len(rows))), whole[:, : len(rows)])


def test_ranks_and_micro_batches_share_the_rows() -> None:
    """The parts of a batch, put together, are the batch of one process."""
    rows, size = _rows(), {"batch_size": 7, "context_length": ROOM, "seed": 3, "step": 4}
    whole = get_batch(rows, **size)[1]
    parts = [
        get_batch(rows, **size, rank=rank, world_size=2, micro_batch=part, num_micro_batches=2)[1]
        for rank in range(2)
        for part in range(2)
    ]
    assert np.array_equal(np.concatenate(parts), whole)
    in_order = [targets for _, targets in sequential_batches(rows, batch_size=5, context_length=ROOM, max_windows=11)]
    assert [len(batch) for batch in in_order] == [5, 5, 1]


def _trainer(config: Any, run_dir: Path) -> Trainer:
    data = RunData(
        Tokenizer.from_directory(config.data.tokenizer),
        TokenDataset(config.data.train),
        TokenDataset(config.data.valid),
    )
    separator_id = data.tokenizer.special_token_ids["<|endoftext|>"]
    data = RunData(data.tokenizer, data.train, data.valid, separator_id)
    model = build_model(config, device=resolve_device("cpu"))
    runtime = Runtime(
        device=resolve_device("cpu"),
        precision="fp32",
        micro_batch_size=config.training.micro_batch_size or config.training.batch_size,
        logger=NoopLogger(),
    )
    run_dir.mkdir(exist_ok=True)
    return Trainer(
        config, run_dir=run_dir, data=data, model=model, optimizer=build_optimizer(model, config), runtime=runtime
    )


def test_without_the_documents_places_nothing_is_begun(files, tmp_path):
    """The file that says where they are is looked for before anything is written."""
    place = tmp_path / "files"
    shutil.copytree(files.train.parent, place, symlinks=True)
    (place / "train.documents.npy").unlink()
    moved = replace(files, **{name: place / getattr(files, name).name for name in ("train", "valid", "tokenizer")})
    with pytest.raises(FileNotFoundError, match=r"train\.documents\.npy"):
        train(tiny_config(moved, tmp_path / "runs", {"data.packing": "documents", "data.order": "epoch"}))
    assert not (tmp_path / "runs").exists()


DOCUMENTS = {"data.packing": "documents", "data.order": "epoch", "model.document_mask": True, "training.batch_size": 6}


def test_a_run_on_documents_resumes_exactly(files: TinyFiles, tmp_path: Path) -> None:
    """A run that goes on from a checkpoint has the weights of one that was not interrupted; validation is finite."""
    whole = _trainer(tiny_config(files, tmp_path, DOCUMENTS), tmp_path / "whole")
    whole.train()
    half = _trainer(tiny_config(files, tmp_path, {**DOCUMENTS, "training.max_steps": 12}), tmp_path / "half")
    for _ in range(5):
        half.step()
    half.save()
    rest = _trainer(tiny_config(files, tmp_path, DOCUMENTS), tmp_path / "half")
    saved = SavedRun.read(tmp_path / "half" / "checkpoints" / "step-00000005")
    saved.load_into(rest.shards, rest.optimizer)
    rest.state = saved.state(rest.config, rest.data)
    for _ in range(7):
        rest.step()
    assert rest.state.tokens == whole.state.tokens
    for (name, one), other in zip(whole.raw_model.named_parameters(), rest.raw_model.parameters(), strict=True):
        assert one.equal(other), name
    assert 0 < whole.validate().loss < 10


def test_micro_batches_give_the_step_of_the_whole_batch(files: TinyFiles, tmp_path: Path) -> None:
    """The loss is the mean over what is learnt, and the step the same, however rows with padding are cut."""
    results = []
    for size in (None, 2, 1):
        changes = {**DOCUMENTS, "training.micro_batch_size": size, "model.context_length": 64}
        trainer = _trainer(tiny_config(files, tmp_path, changes), tmp_path / f"{size}")
        results.append((trainer.step(), [one.detach().clone() for one in trainer.raw_model.parameters()]))
    for result, weights in results[1:]:
        assert result.tokens == results[0][0].tokens < 6 * 64
        assert result.loss == pytest.approx(results[0][0].loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(results[0][0].grad_norm, rel=1e-4)
        for one, other in zip(weights, results[0][1], strict=True):
            np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-3, atol=1e-5)


def test_a_step_that_learns_nothing_is_not_made(files: TinyFiles, tmp_path: Path) -> None:
    """A micro-batch of padding adds nothing; a step of nothing else is refused, with the weights as they were."""
    trainer = _trainer(tiny_config(files, tmp_path, DOCUMENTS), tmp_path / "run")
    (inputs, targets) = trainer.micro_batches(1)[0]
    nothing = targets * 0 + IGNORED
    step: Any = {"learning_rate": 1e-3, "max_grad_norm": 1.0, "autocast": trainer.autocast, "reading": trainer.reading}
    before = [one.detach().clone() for one in trainer.raw_model.parameters()]
    result = train_step(trainer.raw_model, trainer.optimizer, [(inputs, nothing)], **step)
    assert (result.trouble, result.tokens) == ("nothing_learnt", 0)
    assert all(one.equal(other) for one, other in zip(before, trainer.raw_model.parameters(), strict=True))
    both = train_step(trainer.raw_model, trainer.optimizer, [(inputs, nothing), (inputs, targets)], **step)
    assert both.made
    assert both.tokens == int((targets != IGNORED).sum())


def test_data_without_documents_is_refused(files: TinyFiles, tmp_path: Path) -> None:
    """A mask needs the separator's id, which old token files do not name; the error says what to do."""
    config = tiny_config(files, tmp_path, DOCUMENTS)
    data = RunData(Tokenizer.from_directory(files.tokenizer), TokenDataset(files.train), None)
    with pytest.raises(ValueError, match="document_mask: expected a token file that names its separator"):
        reading_of(data, config=config)
