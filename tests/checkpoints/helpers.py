"""What the tests of checkpoints share: a tiny model's snapshot, two checkpoints of it, and ways to damage them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.optim import Optimizer

from config.io import dump_toml
from tests.training.tiny_run import TinyFiles, tiny_config
from transformerlm.checkpoints.save import Snapshot, save_checkpoint
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer import Tokenizer
from transformerlm.training.loss import cross_entropy
from transformerlm.training.optim import AdamW, parameter_groups

FILES = [
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "config.toml",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens.json",
]


def make_training(
    files: TinyFiles, changes: dict | None = None, *, steps: int = 2
) -> tuple[TransformerLM, Optimizer, Snapshot]:
    """Return a model after a few steps, its optimizer, and what a checkpoint holds of them and besides."""
    config = tiny_config(files, Path("runs"), changes)
    model = TransformerLM(**config.model.model_dump())
    optimizer = AdamW(parameter_groups(model, weight_decay=0.1), 1e-2)
    for _ in range(steps):
        take_step(model, optimizer)
    tokenizer = Tokenizer.from_directory(files.tokenizer)
    snapshot = Snapshot.of(model, optimizer, tokenizer, config_toml=dump_toml(config), state={"tokens": 7})
    return model, optimizer, snapshot


def make_snapshot(files: TinyFiles, changes: dict | None = None, *, steps: int = 2) -> Snapshot:
    """Return what a checkpoint holds of a model after a few steps."""
    return make_training(files, changes, steps=steps)[2]


def take_step(model: TransformerLM, optimizer: Optimizer) -> None:
    """Make one optimizer step on fixed ids."""
    ids = torch.arange(24).view(2, 12)
    cross_entropy(model(ids), ids + 1).backward()
    optimizer.step()
    optimizer.zero_grad()


def two_checkpoints(root: Path, files: TinyFiles) -> tuple[Path, Path]:
    """Save steps 1 and 2 of a run, and return their directories."""
    snapshot = make_snapshot(files)
    return save_checkpoint(root, 1, snapshot), save_checkpoint(root, 2, snapshot)


def flip_bit(path: Path) -> None:
    """Flip the lowest bit of a digit or letter in the middle of a file: damage that still parses as text."""
    data = bytearray(path.read_bytes())
    binary = path.suffix == ".safetensors"
    place = next(i for i in range(len(data) // 2, len(data)) if binary or data[i : i + 1].isalnum())
    data[place] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    """Cut off the second half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fill_with_zeros(path: Path) -> None:
    """Replace the second half of a file by zeros, and more where it is zero anyway."""
    data = path.read_bytes()
    begin = len(data.rstrip(b"\0")) // 2
    path.write_bytes(data[:begin] + bytes(len(data) - begin))


DAMAGES = {"flipped": flip_bit, "cut": truncate, "zeroed": fill_with_zeros, "missing": Path.unlink}


class Killed(BaseException):
    """Represents the moment at which the process stops."""
