"""A run that cannot work is refused before it starts, with both numbers and the repair."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
import torch

from tests.training.tiny_run import VOCAB_SIZE, tiny_config, write_tiny_files
from transformerlm.distributed.world import World
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.tokenizer import Tokenizer
from transformerlm.training.build import sequences_per_pass
from transformerlm.training.planning import preflight
from transformerlm.training.planning.micro_batch import memory_by_part

CPU = torch.device("cpu")


def check(files, changes=None, *, tokenizer=None):
    """Run the check of the data for a configuration."""
    preflight.check_dataset(
        TokenDataset(files.train),
        config=tiny_config(files, files.text.parent, changes),
        tokenizer=tokenizer or Tokenizer.from_directory(files.tokenizer),
        key="data.train",
    )


def check_memory(config, *, world_size=1):
    """Run the check of the memory on a CPU in fp32."""
    size = sequences_per_pass(config.training, world_size)
    return preflight.check_memory(config, micro_batch_size=size, device=CPU, precision="fp32")


def test_data_that_fits_passes(files):
    """The data of a real build passes, up to a context one shorter than the file."""
    check(files)
    check(files, {"model.context_length": TokenDataset(files.train).num_tokens - 1})


def test_too_little_data_is_refused(files):
    """A file with no room for one window is refused with its length and the length it needs."""
    num_tokens = TokenDataset(files.train).num_tokens
    with pytest.raises(ValueError, match=rf"data\.train: .* {num_tokens} tokens, fewer than .* = {num_tokens + 1};"):
        check(files, {"model.context_length": num_tokens})


def test_another_tokenizer_is_refused(files, tmp_path):
    """Data of one tokenizer with the directory of another is refused, naming both fingerprints."""
    other = write_tiny_files(tmp_path, seed=1)
    tokenizer = Tokenizer.from_directory(other.tokenizer)
    made_with = TokenDataset(files.train).tokenizer_sha256
    with pytest.raises(ValueError, match="run transformerlm-make-data again") as caught:
        check(files, tokenizer=tokenizer)
    assert made_with[:12] in str(caught.value)
    assert tokenizer.fingerprint()[:12] in str(caught.value)


def test_a_tokenizer_larger_than_the_model_is_refused(files):
    """A tokenizer with more ids than the model is refused with both sizes; a smaller one is fine."""
    tokenizer = Tokenizer.from_directory(files.tokenizer)
    preflight.check_vocab_size(tokenizer, VOCAB_SIZE)
    with pytest.raises(ValueError, match=rf"\({VOCAB_SIZE - 1}\) is smaller than the tokenizer's \({VOCAB_SIZE}\)"):
        preflight.check_vocab_size(tokenizer, VOCAB_SIZE - 1)


def test_a_model_larger_than_the_memory_is_refused(files, monkeypatch):
    """The refusal names the estimate, the memory, the largest part and what to change."""
    config = tiny_config(files, files.text.parent)
    parts = check_memory(config)
    assert parts["total"] == sum(size for name, size in parts.items() if name != "total")
    monkeypatch.setattr(preflight, "device_memory_bytes", lambda device: parts["total"])
    check_memory(config)
    monkeypatch.setattr(preflight, "device_memory_bytes", lambda device: parts["total"] - 1)
    with pytest.raises(ValueError, match=r"needs about \d+ MB, but cpu has \d+ MB; most of it is .*micro_batch_size"):
        check_memory(config)


@pytest.mark.parametrize(
    ("room", "changes", "advice", "none_of"),
    [
        ("weights", {}, "use a smaller model or vocabulary; weights, gradients and optimizer alone", "lower"),
        ("total", {}, r"lower training\.micro_batch_size \(8\), set model\.activation_checkpointing", "alone"),
        ("total", {"training.micro_batch_size": 1}, r"set model\.activation_checkpointing = true, or use", "lower"),
        ("total", {"model.activation_checkpointing": True}, r"lower training\.micro_batch_size \(8\), or use", "set"),
    ],
)
def test_advice_on_memory_is_what_helps(room, changes, advice, none_of, files, monkeypatch):
    """The advice names smaller passes where they help, and nothing that is in use already."""
    config = tiny_config(files, files.text.parent, changes)
    parts = check_memory(config)
    monkeypatch.setattr(preflight, "device_memory_bytes", lambda device: parts[room] - 1)
    with pytest.raises(ValueError, match=advice) as caught:
        check_memory(config)
    assert f"{none_of} " not in str(caught.value).partition("): ")[2]


def test_a_smaller_micro_batch_or_more_processes_need_less_memory(files):
    """The advice of the refusal does help."""
    whole, part = (tiny_config(files, files.text.parent, {"training.micro_batch_size": size}) for size in (None, 2))
    total = check_memory(whole)["total"]
    assert check_memory(part)["total"] < total
    assert check_memory(whole, world_size=4)["total"] < total


def test_ranks_that_share_a_model_need_less_memory(files, monkeypatch):
    """A model that does not fit one rank fits two that share it; on a CPU each of them has half of the memory."""
    config = tiny_config(files, files.text.parent, {"model.d_model": 256, "model.num_layers": 24})
    place = {"micro_batch_size": 1, "device": torch.device("cuda"), "precision": "bf16"}
    whole = memory_by_part(config, **place)["total"]
    monkeypatch.setattr(preflight, "device_memory_bytes", lambda device: int(0.8 * whole))
    two = World(world_size=2, local_world_size=2)
    assert preflight.check_memory(config, world=two, shard_size=2, **place)["gathered"] > 0
    with pytest.raises(ValueError, match=r"alone are too much.*; more GPUs can share them: see docs/distributed\.md"):
        preflight.check_memory(config, **place)
    tiny, size = tiny_config(files, files.text.parent), {"micro_batch_size": 1, "device": CPU, "precision": "fp32"}
    monkeypatch.setattr(preflight, "device_memory_bytes", lambda device: memory_by_part(tiny, **size)["total"] + 1)
    preflight.check_memory(tiny, **size)
    with pytest.raises(ValueError, match=r"but cpu has \d+ MB for each process; most of it"):
        preflight.check_memory(tiny, world=two, **size)


def test_a_full_disk_is_refused(files, tmp_path, monkeypatch):
    """The refusal names the free room and the room that two checkpoints need."""
    large = tiny_config(files, tmp_path, {"model.d_model": 2048, "model.num_layers": 16})
    preflight.check_disk(tmp_path, tiny_config(files, tmp_path))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**9, 10**9))
    with pytest.raises(OSError, match=r"1\.0 GB free, but two checkpoints need \d\.\d GB; free some space"):
        preflight.check_disk(tmp_path, large)


def test_a_run_directory_need_not_exist_yet(files, tmp_path):
    """The nearest existing directory decides about the disk, so a refused run leaves no empty directory."""
    preflight.check_disk(tmp_path / "not" / "yet", tiny_config(files, tmp_path))
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(("size", "text"), [(1.5e9, "1.5 GB"), (3e8, "300 MB"), (0, "0 MB"), (999e6, "999 MB")])
def test_sizes_read_well(size, text):
    """Sizes are shown in the unit that suits them."""
    assert preflight.gigabytes(size) == text
