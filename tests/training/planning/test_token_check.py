"""Each byte of the data is read once, over all ranks, and what one rank finds ends all of them."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.ranks import run_ranks
from tests.token_files.shards import write_shards
from tests.training.tiny_run import tiny_config, write_tiny_files
from transformerlm.distributed.world import World
from transformerlm.token_files.dataset import TokenDataset, TokenFile
from transformerlm.tokenizer import Tokenizer
from transformerlm.training.planning import token_check
from transformerlm.training.planning.token_check import check_tokens, deal

HEADER_BYTES = 128


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a tiny run."""
    return write_tiny_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of five shards of different sizes, one of them listed twice, with ids below 1,000."""
    rng = np.random.default_rng(0)
    parts = [rng.integers(1000, size=size).astype(np.uint16) for size in (5000, 100_000, 1, 70_000, 40_000)]
    return write_shards(tmp_path_factory.mktemp("data") / "train.shards", parts, order=[0, 1, 1, 2, 3, 4])


class Reader:
    """A file that counts what is read from it."""

    def __init__(self, file, counts, name):
        self._file, self._counts, self._name = file, counts, name

    def __enter__(self):
        return self

    def __exit__(self, *details):
        self._file.close()

    def read(self, size=-1):
        data = self._file.read(size)
        self._counts[self._name] += len(data)
        return data


def resident_bytes(name):
    """Return how much of a mapped file this process has looked at."""
    blocks = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    mapped = [block for block in blocks if name in block.partition("\n")[0]]
    return sum(int(size) for block in mapped for size in re.findall(r"^Rss: +(\d+) kB", block, flags=re.MULTILINE))


def datasets_of(config):
    """Open the data of a configuration."""
    paths = {"data.train": config.data.train, "data.valid": config.data.valid}
    return {key: TokenDataset(path) for key, path in paths.items() if path}


def check(config, tokenizer, world):
    """Check the data of a configuration as a run does before it starts."""
    check_tokens(datasets_of(config), config=config, tokenizer=tokenizer, world=world)


def bytes_read(world, config, tokenizer):
    """Return how many bytes of each `.npy` a rank reads in the check, and assert that it looks at none by a map."""
    datasets, counts, plain = datasets_of(config), Counter(), Path.open

    def counting(path, *arguments, **keywords):
        file = plain(path, *arguments, **keywords)
        return Reader(file, counts, str(path)) if path.suffix == ".npy" else file

    Path.open = counting
    try:
        check_tokens(datasets, config=config, tokenizer=Tokenizer.from_directory(tokenizer), world=world)
    finally:
        Path.open = plain
    assert resident_bytes(".npy") == 0
    return dict(counts)


@pytest.mark.parametrize("world_size", [1, 3])
def test_over_all_ranks_each_byte_is_read_once(world_size, files, shards, tmp_path):
    """Each file, a shard that is listed twice too, is read by one rank, from end to end, besides its header."""
    config = tiny_config(files, tmp_path, {"data.train": str(shards), "model.vocab_size": 1000})
    read = run_ranks(bytes_read, world_size, config, files.tokenizer)  # new processes have no files of other tests open
    expected = [*shards.glob("*[0-9].npy"), files.valid]
    assert sorted(name for one in read for name in one) == sorted(str(path) for path in expected)
    for path in expected:
        (found,) = (one[str(path)] for one in read if str(path) in one)
        assert path.stat().st_size <= found <= path.stat().st_size + HEADER_BYTES
    assert all(read)  # the work is shared out


def refusal(world, config, tokenizer):
    """Return the error with which the check ends on a rank."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the caller looks at the text
        check(config, Tokenizer.from_directory(tokenizer), world)
    return str(caught.value)


def test_what_one_rank_finds_ends_all_of_them(files, shards, tmp_path):
    """The rank that reads the damaged shard says so; the other quotes it, and neither waits."""
    rotten = shutil.copytree(shards, tmp_path / "train.shards")
    config = tiny_config(files, tmp_path, {"data.train": str(rotten), "model.vocab_size": 1000})
    shard = rotten / "00003.npy"
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    messages = run_ranks(refusal, 2, config, files.tokenizer)
    assert all(f"{shard}: sha256 is " in message for message in messages)
    assert sum(message.startswith("rank ") for message in messages) == 1


def test_rotten_data_are_refused_before_they_are_used(tmp_path):
    """A flipped bit, a page of zeros and a cut in a token file are each refused in one line that says what to do."""
    damages = {
        "flipped": lambda data: data[:3000] + bytes([data[3000] ^ 1]) + data[3001:],
        "zeroed": lambda data: data[:1024] + bytes(2048) + data[3072:],
        "cut": lambda data: data[:4000],
    }
    files = write_tiny_files(tmp_path)
    config, tokenizer = tiny_config(files, tmp_path), Tokenizer.from_directory(files.tokenizer)
    whole = files.train.read_bytes()
    for damage in damages.values():
        files.train.write_bytes(damage(whole))
        with pytest.raises(ValueError, match=r"train\.npy: .*run transformerlm-make-data again") as caught:
            check(config, tokenizer, World())
        assert "\n" not in str(caught.value)
    files.train.write_bytes(whole)
    check(config, tokenizer, World())


def test_ids_beyond_the_vocabulary_are_refused(files, tmp_path):
    """The refusal of an id without an embedding names the file, the id and the model's vocab_size."""
    tokenizer, largest = Tokenizer.from_directory(files.tokenizer), int(TokenDataset(files.train).tokens.max())
    check(tiny_config(files, tmp_path, {"model.vocab_size": largest + 1}), tokenizer, World())
    with pytest.raises(ValueError, match=rf"data\.\w+: .* the id {largest}, but model\.vocab_size is {largest}; set"):
        check(tiny_config(files, tmp_path, {"model.vocab_size": largest}), tokenizer, World())


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 100])
def test_files_are_dealt_out_evenly(num_ranks):
    """Each file goes to one rank, and no rank has more than its share and one file."""
    sizes = [int(size) for size in np.random.default_rng(0).integers(1, 1000, size=50)]
    dealt = deal(sizes, num_ranks)
    assert sorted(index for one in dealt for index in one) == list(range(50))
    loads = [sum(sizes[index] for index in one) for one in dealt]
    assert max(loads) - min(loads) <= max(sizes)


def test_ranks_meet_while_one_of_them_reads_for_long(files, tmp_path, monkeypatch):
    """A rank that reads a large file comes back after each round, so that the others do not take it for lost."""
    rounds = []
    monkeypatch.setattr(token_check, "all_reduce_sum", lambda tensor, world: rounds.append(int(tensor)) or tensor)
    monkeypatch.setattr(TokenFile, "check_blocks", lambda file: iter([1, 1, 1]))
    config = tiny_config(files, tmp_path, {"data.valid": None})
    monkeypatch.setattr(token_check, "together", lambda world: nullcontext())
    check(config, Tokenizer.from_directory(files.tokenizer), World(world_size=2, timeout=-1.0))
    assert rounds == [1, 1, 1, 0]
