"""Hostile files, made by code: each is a good file of ours with one lie in it, and the command that will read it.

An attacker signs what he writes, so wherever a file has a checksum the lie is made first and the checksum after it,
unless the checksum is the point.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config.io import dump_toml
from tests.training.tiny_run import TinyFiles, tiny_config, write_tiny_files
from transformerlm.checkpoints.save import Snapshot, save_checkpoint
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer import Tokenizer
from transformerlm.training.optim import AdamW, parameter_groups
from transformerlm.utils.json_files import values_sha256
from transformerlm.utils.seed import rng_state

DEEP = "[" * 1_000_000


@dataclass(frozen=True)
class Good:
    """What the lies are put into: a text, a tokenizer, token files and a checkpoint that are all in order."""

    files: TinyFiles
    checkpoint: Path


class Payload:
    """An object whose unpickling makes a file: if that file is there, code from a stranger has run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


@dataclass(frozen=True)
class Case:
    """One hostile file: `build` writes it below a folder and returns the arguments of `command`."""

    name: str
    command: str
    blames: str  # what the error line must name
    build: Callable[[Path, Good], list[str]]


CASES: list[Case] = []


def case(name: str, command: str, blames: str) -> Callable[[Callable[[Path, Good], list[str]]], None]:
    """Put a function that writes a hostile file into the corpus."""

    def register(build: Callable[[Path, Good], list[str]]) -> None:
        CASES.append(Case(name, command, blames, build))

    return register


def make_good(home: Path) -> Good:
    """Write the good files."""
    home.mkdir()
    files = write_tiny_files(home)
    config = tiny_config(files, home)
    model = TransformerLM(**config.model.model_dump())
    optimizer = AdamW(parameter_groups(model, weight_decay=0.1), 1e-3)
    model(torch.arange(8)[None]).sum().backward()
    optimizer.step()
    tokenizer = Tokenizer.from_directory(files.tokenizer)
    facts = [json.loads(path.with_suffix(".json").read_text()) for path in (files.train, files.valid)]
    data = {"train_sha256": facts[0]["sha256"], "valid_sha256": facts[1]["sha256"]}
    state = {
        "tokens": 128,
        "best_val_loss": 5.0,
        "best_step": 1,
        "wandb_id": None,
        "rng": rng_state(),
        "data": {**data, "tokenizer_sha256": tokenizer.fingerprint()},
    }
    root = home / "run" / "checkpoints"
    snapshot = Snapshot.of(model, optimizer, tokenizer, config_toml=dump_toml(config), state=state)
    return Good(files, save_checkpoint(root, 1, snapshot))


# --- checkpoints ---------------------------------------------------------------------------------------------------


def copy_checkpoint(home: Path, good: Good) -> Path:
    """Copy the good checkpoint to where a run of `home` has it."""
    target = home / "run" / "checkpoints" / good.checkpoint.name
    shutil.copytree(good.checkpoint, target)
    return target


def sign(directory: Path, changes: dict[str, Any] | None = None) -> None:
    """Make the checksums of a checkpoint those of its files, and change values of its state."""
    state = json.loads((directory / "state.json").read_text())
    names = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    sums = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names if name != "state.json"}
    state = {**state, "sha256": sums, **(changes or {})}
    write_state(directory, state)


def write_state(directory: Path, state: dict[str, Any]) -> None:
    """Write a `state.json` that has its own checksum right."""
    (directory / "state.json").write_text(
        json.dumps({**state, "state_sha256": values_sha256(state, kept_in="state_sha256")})
    )


def infer(directory: Path) -> list[str]:
    """Return the arguments of `infer` that read a checkpoint."""
    return [f"--checkpoint={directory}", "--prompt", "Ada", "--sampling.max_new_tokens=1", "--device=cpu"]


def evaluate(directory: Path, good: Good) -> list[str]:
    """Return the arguments of `eval` that read a checkpoint."""
    return [f"--checkpoint={directory}", f"--input={good.files.text}", "--device=cpu", "--resamples=0"]


def resume(home: Path, good: Good) -> list[str]:
    """Return the arguments of `train` that resume the run of `home`."""
    config = home / "train.toml"
    config.write_text(dump_toml(tiny_config(good.files, home, {"checkpoint.resume": "required"})))
    return [f"--config={config}"]


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_safetensors(path: Path, header: dict[str, Any] | bytes, data: bytes, *, length: int | None = None) -> None:
    """Write a file from its parts, with a length of the header that may be a lie."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)


# --- token files ---------------------------------------------------------------------------------------------------


def npy(header: str | bytes, data: bytes = b"", *, version: bytes = b"\x01\x00", length: int | None = None) -> bytes:
    """Return an `.npy` file from its parts."""
    encoded = header.encode() if isinstance(header, str) else header
    kind = "<H" if version[0] == 1 else "<I"
    return b"\x93NUMPY" + version + struct.pack(kind, len(encoded) if length is None else length) + encoded + data


def train_on(home: Path, good: Good, data: bytes | np.ndarray, facts: dict[str, Any] | str | None = None) -> list[str]:
    """Write a token file with a sidecar and right checksums, and return the arguments of `train`."""
    path = home / "data.npy"
    if isinstance(data, np.ndarray):
        np.save(path, data)
    else:
        path.write_bytes(data)
    honest = json.loads(good.files.train.with_suffix(".json").read_text())
    honest["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    if not isinstance(facts, str):
        values = {**honest, **(facts or {})}
        facts = json.dumps({**values, "sidecar_sha256": values_sha256(values, kept_in="sidecar_sha256")})
    path.with_suffix(".json").write_text(facts)
    config = home / "train.toml"
    config.write_text(dump_toml(tiny_config(good.files, home, {"data.train": str(path), "data.valid": None})))
    return [f"--config={config}"]


# --- tokenizers and texts ------------------------------------------------------------------------------------------


def make_data(home: Path, good: Good, *, text: Path | None = None, tokenizer: Path | None = None) -> list[str]:
    """Return the arguments of `make-data` for a text and a tokenizer, the good ones where none is given."""
    return [
        f"--input={text or good.files.text}",
        f"--tokenizer={tokenizer or good.files.tokenizer}",
        f"--train={home / 'out.npy'}",
    ]


def train_tokenizer(home: Path, text: Path) -> list[str]:
    """Return the arguments of `train-tokenizer` for a text."""
    return [f"--input={text}", f"--output_dir={home / 'tokenizer'}", "--tokenizer.vocab_size=300"]


def change_tokenizer(home: Path, good: Good, name: str, change: Callable[[str], str | bytes]) -> list[str]:
    """Copy the tokenizer with one of its files changed, and return the arguments of `make-data` that read it."""
    folder = home / "tokenizer"
    shutil.copytree(good.files.tokenizer, folder)
    content = change((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return make_data(home, good, tokenizer=folder)
