"""`data.order = "epoch"`: each window once an epoch, whoever reads it and whenever the run was resumed."""

from __future__ import annotations

import json
from collections import Counter
from math import factorial

import numpy as np
import pytest

from cli.prepare_run import prepare_run
from cli.train import train
from tests.token_files.shards import as_shards
from tests.training.faults import Killed, kill_at, poison
from tests.training.tiny_run import read_records, step_lines, tiny_config
from transformerlm.distributed.world import World
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.training.data import get_batch
from transformerlm.training.epoch_order import epoch_starts, hashed, permuted

EPOCH = {"data.order": "epoch"}


def starts_of(num_tokens: int, num_windows: int, *, batch_size: int, context_length: int, seed: int = 3) -> np.ndarray:
    """Return the first positions of the first windows of a run."""
    steps = range(1, -(-num_windows // batch_size) + 1)
    sizes = {"batch_size": batch_size, "context_length": context_length, "seed": seed}
    return np.concatenate([epoch_starts(num_tokens, step=step, **sizes) for step in steps])[:num_windows]


@pytest.mark.parametrize("num_tokens", [9, 16, 17, 18, 100, 999, 1000, 1001])
@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_each_window_comes_once_an_epoch(num_tokens: int, batch_size: int) -> None:
    """In each of five epochs the windows are apart and complete, wherever a batch begins and ends."""
    num_windows, left_over = divmod(num_tokens - 1, 8)
    starts = starts_of(num_tokens, 5 * num_windows, batch_size=batch_size, context_length=8).reshape(5, num_windows)
    for epoch in np.sort(starts):
        assert 0 <= epoch[0] <= left_over
        assert np.array_equal(epoch, epoch[0] + 8 * np.arange(num_windows))


def test_epochs_differ_in_order_and_in_where_the_data_is_cut() -> None:
    """The next epoch, like another seed, has another order; the tokens left over are now before, now after."""
    starts = starts_of(1007, 30 * 125, batch_size=25, context_length=8).reshape(30, 125)
    assert {int(epoch.min()) for epoch in starts} == set(range(7))
    orders = {tuple(epoch - epoch.min()) for epoch in starts}
    assert len(orders) == 30
    other = starts_of(1007, 125, batch_size=25, context_length=8, seed=4)
    assert tuple(other - other.min()) not in orders


def test_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    """The numbers never change, and those of step 10^12 are there at once."""
    sizes = {"batch_size": 4, "context_length": 16, "seed": 42}
    assert epoch_starts(10_000, step=1, **sizes).tolist() == [5590, 5974, 9366, 3158]
    expected = [3288992332936, 8405700984808, 7257696654584, 4154804220792]
    assert epoch_starts(10**13, step=10**12, **sizes).tolist() == expected


@pytest.mark.parametrize(
    ("num_tokens", "step", "message"),
    [(100, 0, "a step of at least 1, got 3, 0"), (8, 1, "8 tokens are too few for a window")],
)
def test_impossible_batches_are_refused(num_tokens: int, step: int, message: str) -> None:
    """Steps begin with 1, and the data holds a window."""
    tokens = np.zeros(num_tokens, dtype=np.uint16)
    with pytest.raises(ValueError, match=message):
        get_batch(tokens, batch_size=4, context_length=8, seed=3, step=step, order="epoch")


def test_an_epoch_is_the_same_for_any_ranks_and_micro_batches(files, tmp_path):
    """Read by 1, 2 and 4 ranks in turn, in 4, 2 and 1 micro-batches, an epoch has each window once."""
    config = tiny_config(files, tmp_path, {**EPOCH, "training.micro_batch_size": 2})
    run = prepare_run(config, tmp_path / "run", world=World())
    tokens = np.asarray(run.data.train.tokens)
    num_windows = (len(tokens) - 1) // 16
    worlds = {
        size: [run.trainer(world=World(rank=rank, world_size=size)) for rank in range(size)] for size in (1, 2, 4)
    }
    read = []
    for step in range(1, -(-num_windows // 8) + 1):
        for trainer in worlds[(1, 2, 4)[step % 3]]:
            read += [tuple(row) for inputs, _ in trainer.micro_batches(step) for row in inputs.tolist()]
    first = starts_of(len(tokens), num_windows, batch_size=8, context_length=16, seed=1).min()
    expected = [tuple(tokens[first + 16 * number :][:16].tolist()) for number in range(num_windows)]
    extra = -num_windows % 8  # the last batch begins the next epoch
    assert len(read) == num_windows + extra
    for window in expected:
        read.remove(window)
    assert len(read) == extra


def test_a_resumed_run_reads_what_an_uninterrupted_one_reads(files, tmp_path, monkeypatch):
    """Killed and resumed, a run has the same losses, and its lines say how much of the data has been read."""
    whole, pieces = (tiny_config(files, tmp_path / name, EPOCH) for name in ("whole", "pieces"))
    train(whole)
    with monkeypatch.context() as patch:
        kill_at(patch, step=8)
        with pytest.raises(Killed):
            train(pieces)
    train(pieces)
    lines = [step_lines(tmp_path / name / "run") for name in ("whole", "pieces")]
    found, expected = ({line["step"]: line["metrics.loss"] for line in each} for each in reversed(lines))
    assert found == expected
    epochs = [line["metrics.epoch"] for line in lines[0]]
    assert epochs == pytest.approx([8 * 16 * step / len(TokenDataset(files.train)) for step in range(1, 13)])


def test_the_batch_of_a_skipped_step_is_that_of_the_order(files, tmp_path, monkeypatch):
    """The file of a refused step holds the windows that it trained on."""
    poison(monkeypatch, {4: float("nan")})
    train(tiny_config(files, tmp_path, EPOCH))
    record = json.loads((tmp_path / "run/skipped/step-00000004.json").read_text())
    data = TokenDataset(files.train)
    assert record["starts"] == epoch_starts(len(data), batch_size=8, context_length=16, seed=1, step=4).tolist()


def test_another_order_is_said_when_a_run_is_resumed(files, tmp_path, capsys):
    """As for the seed and the batch size, a line names both values."""
    train(tiny_config(files, tmp_path, {"training.max_steps": 4}))
    capsys.readouterr()
    train(tiny_config(files, tmp_path, EPOCH))
    assert "data.order was draw, now epoch" in capsys.readouterr().err


@pytest.mark.parametrize("order", ["draw", "epoch"])
def test_training_on_shards_is_training_on_one_file(order, files, tmp_path):
    """At any size of a shard, losses and validations are bit for bit those of the one file, in either order."""
    seen = []
    for name, train_on, valid in (
        ("one", files.train, files.valid),
        ("few", as_shards(files.train, tmp_path, shard_tokens=1000), files.valid),
        ("many", as_shards(files.train, tmp_path, shard_tokens=60), as_shards(files.valid, tmp_path, shard_tokens=100)),
    ):
        changes = {"data.order": order, "data.train": str(train_on), "data.valid": str(valid), "training.max_steps": 6}
        train(tiny_config(files, tmp_path / name, {**changes, "training.eval_interval": 3}))
        kept = ("step", "metrics.loss", "metrics.grad_l2_norm", "metrics.val_loss", "metrics.val_bits_per_byte")
        seen.append([{key: line.get(key) for key in kept} for line in read_records(tmp_path / name / "run")])
    assert any(line["metrics.val_loss"] for line in seen[0])
    assert seen[0] == seen[1] == seen[2]


# --- the permutation ---------------------------------------------------------------------------------------------


def order_of(size: int, key: int) -> np.ndarray:
    """Return where the permutation of this key sends 0, 1, ..."""
    return permuted(np.arange(size), size=size, key=np.array([key], dtype=np.uint64))


def test_every_number_is_sent_to_a_place_of_its_own() -> None:
    """For each size below 130, around powers of 2 and squares, and for several keys: each place once."""
    sizes = [*range(1, 130), 1023, 1024, 1025, 99_855, 99_856, 99_857, 65_535, 65_537]
    for size in sizes:
        for key in (0, 1, 2**64 - 1):
            assert np.array_equal(np.sort(order_of(size, key)), np.arange(size)), (size, key)


def test_each_number_may_have_a_key_of_its_own() -> None:
    """Numbers with different keys in one call go where each goes alone."""
    keys = np.array([5, 6, 5, 7], dtype=np.uint64)
    found = permuted(np.array([3, 3, 10, 99]), size=100, key=keys)
    assert found.tolist() == [order_of(100, int(key))[number] for key, number in zip(keys, (3, 3, 10, 99), strict=True)]


def hashed_plainly(*words: int) -> int:
    """Return the hash of words as whole numbers of Python."""
    state = 0
    for word in words:
        state = ((state ^ word) + 0x9E3779B97F4A7C15) % 2**64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            state = (state ^ (state >> shift)) * factor % 2**64
    return state


def permuted_plainly(number: int, *, size: int, key: int) -> int:
    """Return where one number is sent, by the definition."""
    side = next(side for side in range(1, size + 1) if side * side >= size)
    while True:
        left, right = divmod(number, side)
        for turn in range(6):
            left, right = right, (left + hashed_plainly((key + turn) % 2**64, right) // 2) % side
        number = left * side + right
        if number < size:
            return number


def test_the_first_word_of_the_hash_is_that_of_splitmix64() -> None:
    """Hashing 0 gives the published generator's first number from seed 0."""
    assert hashed(0).tolist() == [0xE220A8397B1DCDAF]


@pytest.mark.parametrize("size", [1, 2, 5, 97, 1000, 10**6])
def test_the_arrays_say_what_the_definition_says(size: int) -> None:
    """One number at a time, in whole numbers of Python, leads to the same places: they never change."""
    numbers = np.unique(np.linspace(0, size - 1, 40).astype(np.int64))
    for key in (0, 77, 2**64 - 1):
        found = permuted(numbers, size=size, key=np.array([key], dtype=np.uint64)).tolist()
        assert found == [permuted_plainly(number, size=size, key=key) for number in numbers.tolist()]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_orders_are_equally_likely(size: int) -> None:
    """Over 6,000 keys each order of a few numbers comes about equally often."""
    keys = hashed(np.arange(6000, dtype=np.uint64))
    orders = permuted(np.tile(np.arange(size), (6000, 1)), size=size, key=keys[:, None])
    counts = Counter(map(tuple, orders.tolist()))
    expected = 6000 / factorial(size)
    assert len(counts) == factorial(size)
    assert max(abs(count - expected) for count in counts.values()) < 5 * np.sqrt(expected)


def test_neighbours_are_sent_far_apart() -> None:
    """In a large order a place says nothing about the next one, nor about its number."""
    order = order_of(100_000, 4).astype(np.float64)
    for pair in ((order[:-1], order[1:]), (np.arange(100_000), order), (order[:-317], order[317:])):
        assert abs(np.corrcoef(*pair)[0, 1]) < 0.015
