"""Checkpoints: directories that are whole or not there, hold no pickle, and need nothing but themselves to be loaded.

    checkpoints/step-00001000/  model.safetensors  optimizer.safetensors  state.json  config.toml  tokenizer/
    checkpoints/latest, best    links to one of them, for people; the code goes by the step in the name

A checkpoint is written beside its place under a name that contains `.tmp`; its files are flushed to disk, then the
directory is renamed, then its parent is flushed, then every file is read back. Only then is it announced, and only then
are older ones removed. `state.json` holds the sha256 of every other file and of its own values; a directory that fails
the check is set aside as `.bad`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from config.io import load_config
from config.train import TrainConfig
from transformerlm.models.estimates import count_parameters
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.training.state_file import optimizer_state_from_tensors, optimizer_state_to_tensors
from transformerlm.training.untrusted import (
    check_contained,
    check_finite,
    check_optimizer_state,
    check_size,
    check_state_types,
    check_weights,
    read_header,
)
from transformerlm.utils import files
from transformerlm.utils.json_files import read_json_object, values_sha256

FORMAT = 1
_LINKS = ("latest", "best")
_NAME = re.compile(r"step-(\d{8,})")
_MAX_STATE_BYTES = 64 * 2**20
_MAX_LINK_BYTES = 256


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another format."""


class CheckpointFormatError(CheckpointError):
    """A checkpoint that another version has written; it may well be whole."""


@dataclass(frozen=True)
class Snapshot:
    """What a training run puts into a checkpoint, besides the step."""

    model: nn.Module
    optimizer: Optimizer
    tokenizer: Tokenizer | None  # none: of a model that was imported without one
    config_toml: str
    state: dict[str, Any]


# --- writing ---------------------------------------------------------------------------------------------------


def save_checkpoint(root: Path, step: int, snapshot: Snapshot) -> Path:
    """Write the checkpoint of `step` below `root` and return its directory, durable and read back.

    Raises:
        OSError: the disk is full, not writable, or does not give back what was written; nothing that looks whole is
            left behind.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = root / step_name(step)
    temporary = root / f"{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        _write_files(temporary, step, snapshot)
        files.sync_tree(temporary)
        if final.exists():
            set_aside(final)
        temporary.rename(final)
        for directory in (root, *root.parents[:2]):  # the run's directory may be new, too
            files.sync(directory)
    except (SafetensorError, OSError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        older = "older checkpoints are whole; " if list_checkpoints(root) else ""
        raise OSError(
            f"{final}: cannot be written: {reason}; {older}free some space and start the same command again"
        ) from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _read_back(final)
    point(root / "latest", final)
    return final


def _read_back(directory: Path) -> None:
    """Compare what the disk holds with the sha256 of what was written, and set the checkpoint aside if it differs."""
    for name in _file_names(directory):
        files.forget_cached(directory / name)
    try:
        verify(directory)
    except CheckpointError as error:
        aside = set_aside(directory)
        raise OSError(
            f"{error}; the disk does not give back what was written: set aside as {aside.name}, "
            "older checkpoints are whole"
        ) from None


def _write_files(directory: Path, step: int, snapshot: Snapshot) -> None:
    save_file(_weights(snapshot.model), directory / "model.safetensors")
    tensors, optimizer = optimizer_state_to_tensors(snapshot.optimizer)
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, directory / "optimizer.safetensors"
    )
    (directory / "config.toml").write_text(snapshot.config_toml, encoding="utf-8")
    for name in ("model.safetensors", "optimizer.safetensors"):  # the library leaves them to their owner alone
        shutil.copymode(directory / "config.toml", directory / name)
    if snapshot.tokenizer is not None:
        snapshot.tokenizer.save(directory / "tokenizer")
    state = {
        "format": FORMAT,
        "step": step,
        **snapshot.state,
        "optimizer": optimizer,
        "sha256": {name: _sha256(directory / name) for name in _file_names(directory)},
    }
    state["state_sha256"] = values_sha256(state, kept_in="state_sha256")
    (directory / "state.json").write_text(json.dumps(state, indent=1, allow_nan=False), encoding="utf-8")


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return each parameter once: a tied output head is rebuilt from the embedding on loading."""
    return {name: parameter.detach().contiguous().cpu() for name, parameter in model.named_parameters()}


def prune(root: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints; the one that `best` points to stays."""
    best = _target(root / "best")
    for directory in list_checkpoints(root)[keep:]:
        if directory.name != best:
            # Renamed first: a directory that is half removed must not look like a checkpoint.
            doomed = directory.rename(directory.with_name(f"{directory.name}.tmp-removed"))
            shutil.rmtree(doomed, ignore_errors=True)


def point(link: Path, target: Path) -> None:
    """Make `link` point to `target`, a directory beside it: by a symbolic link, or else a file that holds its name."""
    if link.is_dir() and not link.is_symlink():
        set_aside(link)
    temporary = link.with_name(f"{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target.name, target_is_directory=True)
    except OSError:  # Windows without the right to make links, some network drives
        temporary.write_text(target.name, encoding="utf-8")
    temporary.replace(link)


def remove_leftovers(root: Path) -> None:
    """Remove what a killed save or clean-up has left below `root`."""
    for path in root.glob("*.tmp*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def restore_links(root: Path) -> None:
    """Make `latest` and `best` links again where a copy that followed links has left directories in their place.

    Such a directory is a checkpoint like any other: it takes the place of its step's where that is missing or damaged,
    and is removed where that is whole.
    """
    for link in (root / name for name in _LINKS):
        if link.is_symlink() or not link.is_dir():
            continue
        try:
            own = root / step_name(read_state(link)["step"])
        except CheckpointFormatError:
            raise
        except CheckpointError:
            set_aside(link)
            continue
        if own.exists() and _first_whole([own])[0]:
            shutil.rmtree(link)
        else:
            if own.exists():
                set_aside(own)
            link.rename(own)
        point(link, own)


def set_aside(directory: Path) -> Path:
    """Rename a damaged checkpoint to a free name that ends in `.bad`, so that it is neither used nor written over."""
    for number in range(1, 10_000):
        target = directory.with_name(f"{directory.name}.bad{'' if number == 1 else number}")
        if not target.exists():
            return directory.rename(target)
    raise CheckpointError(f"{directory}: cannot be set aside: too many .bad directories beside it; remove some")


# --- finding ---------------------------------------------------------------------------------------------------


def step_name(step: int) -> str:
    """Return the directory name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(directory: Path) -> int:
    """Return the step in a checkpoint's directory name."""
    match = _NAME.fullmatch(directory.name)
    assert match is not None, directory
    return int(match[1])


def list_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoints below `root`, newest step first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if _NAME.fullmatch(path.name)), key=step_of, reverse=True)


def newest_whole(root: Path, *, warn: Callable[[str], None] = warnings.warn) -> Path | None:
    """Return the newest checkpoint that passes `verify`, setting aside damaged newer ones; None: there is none.

    Each damaged one is named with the one that is used instead.

    Raises:
        CheckpointFormatError: one is of another format, which is no damage.
        CheckpointError: there are some, and all are damaged, or there were some; what is left stays where it is.
    """
    newest, damaged = _first_whole(list_checkpoints(root))
    if newest is None:
        found = [str(error) for _, error in damaged]
        found += [f"{path}: set aside as damaged before" for path in sorted(root.glob("step-*.bad*"))]
        found += [f"{link}: its checkpoint is gone" for link in (root / name for name in _LINKS) if link.is_symlink()]
        if not found and not _tells_of_checkpoints(root.parent / "metrics.jsonl"):
            return None
        raise CheckpointError(
            f"{root}: expected a whole checkpoint to go on from, found {'; '.join(found) or 'none of those it saved'}; "
            f"put back a copy of one, or, to begin anew, remove {root.parent} or choose another logging.run_name"
        )
    for directory, error in damaged:
        warn(f"{error}; set aside as {set_aside(directory).name}, {newest.name} is used instead")
    return newest


def _tells_of_checkpoints(metrics: Path) -> bool:
    """Whether a run's log says that it has saved some."""
    if not metrics.is_file():
        return False
    with metrics.open("rb") as lines:
        return any(b'"checkpoint_saved"' in line for line in lines)


def _first_whole(directories: list[Path]) -> tuple[Path | None, list[tuple[Path, CheckpointError]]]:
    """Return the first that passes `verify`, and those before it with their errors; another format is no damage."""
    damaged: list[tuple[Path, CheckpointError]] = []
    for directory in directories:
        try:
            verify(directory)
        except CheckpointFormatError:
            raise
        except CheckpointError as error:
            damaged.append((directory, error))
        else:
            return directory, damaged
    return None, damaged


def resolve(path: Path) -> Path:
    """Return the checkpoint directory that `path` names: itself, or the newest whole one of a run directory.

    `RUN/best` and `RUN/latest` are the run's `checkpoints/best` and `checkpoints/latest`. Damaged
    checkpoints of a run are passed over with a warning; they stay where they are.

    Raises:
        CheckpointError: there is none.
    """
    if path.name in _LINKS and not path.exists() and (path.parent / "checkpoints").is_dir():
        path = path.parent / "checkpoints" / path.name
        if _target(path) is None and not path.is_dir():
            none = "none: none was saved with a validation loss"
            raise CheckpointError(f"{path.parent.parent}: expected one checkpoint to be {path.name}, found {none}")
    if path.name in _LINKS and (path.is_symlink() or path.is_file()):
        path = _pointed_at(path)
    if path.is_file():
        raise CheckpointError(
            f"{path}: expected a checkpoint's directory, found a file (a .pt or .bin holds a pickle, which can run "
            "code when it is loaded, and is not read)"
        )
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint or run directory; train one with transformerlm-train")
    if (path / "state.json").is_file():
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = list_checkpoints(root)
    if not found:
        raise CheckpointError(f"{path}: expected a checkpoint (with state.json) or a run directory, found neither")
    newest, damaged = _first_whole(found)
    for _, error in damaged:
        instead = f"{newest.name} is used instead" if newest else "there is no older one"
        warnings.warn(f"{error}; {instead}", stacklevel=2)
    if newest is not None:
        return newest
    raise CheckpointError(f"{path}: none of its {len(found)} checkpoints is whole")


def _pointed_at(link: Path) -> Path:
    name = _target(link) or ""
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{link}: expected it to name a checkpoint beside it (step-...), found {name[:80]!r}")
    return link.with_name(name)


def _target(link: Path) -> str | None:
    """Return the name that `latest` or `best` holds, a symbolic link or a file that stands for one."""
    if link.is_symlink():
        return os.readlink(link)
    return link.open("rb").read(_MAX_LINK_BYTES).decode("utf-8", "replace").strip() if link.is_file() else None


# --- reading ---------------------------------------------------------------------------------------------------


def read_state(directory: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint's `state.json`.

    Raises:
        CheckpointError: it is missing, not JSON, or of another format.
    """
    path = directory / "state.json"
    try:
        state = read_json_object(path, max_bytes=_MAX_STATE_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{error}; damaged") from None
    if type(state.get("format")) is not int:
        raise CheckpointError(f"{path}: expected an object with a format number; damaged")
    if state["format"] != FORMAT:
        raise CheckpointFormatError(f"{path}: expected checkpoint format {FORMAT}, found {state['format']}")
    if type(state.get("step")) is not int or not isinstance(state.get("sha256"), dict):
        raise CheckpointError(f"{path}: expected the keys step and sha256; damaged")
    if state.get("state_sha256") != values_sha256(state, kept_in="state_sha256"):
        raise CheckpointError(f"{path}: its values do not have the sha256 recorded with them; damaged")
    with _as_checkpoint_error(f"{path}: "):
        check_state_types(state)
    return state


def verify(directory: Path) -> dict[str, Any]:
    """Return the checkpoint's state after checking that every file is there and has its recorded sha256.

    Raises:
        CheckpointError: a file is missing, cannot be read, or has changed.
    """
    with _as_checkpoint_error():
        check_contained(directory)
    state = read_state(directory)
    found = set(_file_names(directory)) - {"state.json"}
    for name, expected in state["sha256"].items():
        if name not in found:
            raise CheckpointError(f"{directory}: {name} is missing")
        actual = _sha256(directory / name)
        if actual != expected:
            raise CheckpointError(
                f"{directory}: {name} is damaged: sha256 {actual[:12]}..., recorded {expected[:12]}..."
            )
    missing = {"model.safetensors", "optimizer.safetensors", "config.toml"} - set(state["sha256"])
    if missing:
        raise CheckpointError(f"{directory}: state.json does not list {', '.join(sorted(missing))}")
    return state


def load_config_of(directory: Path) -> TrainConfig:
    """Return the configuration that the checkpoint was trained with."""
    return load_config(TrainConfig, directory / "config.toml")


def load_tokenizer(directory: Path) -> Tokenizer:
    """Return the checkpoint's own tokenizer."""
    return Tokenizer.from_directory(directory / "tokenizer")


def load_model(
    directory: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> TransformerLM:
    """Return the checkpoint's model, verified, in evaluation mode, on `device` and in `dtype` (None: fp32 as saved).

    Raises:
        CheckpointError: anything in the directory is missing or damaged.
    """
    verify(directory)
    hparams = load_config_of(directory).model.model_dump()
    with _as_checkpoint_error():
        check_size(directory / "model.safetensors", count_parameters(hparams))
    model = TransformerLM(**hparams, device="meta")
    # As `to_empty`, which imports a second's worth of modules first.
    model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))  # type: ignore[no-untyped-call]
    load_weights(model, directory)
    return model.to(device=device, dtype=dtype).eval()


def load_weights(model: nn.Module, directory: Path) -> None:
    """Copy the checkpoint's weights into `model`; names and shapes must be the same."""
    path = directory / "model.safetensors"
    parameters = dict(model.named_parameters())
    with _as_checkpoint_error():
        check_weights(path, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
        weights = _load_tensors(path)
        check_finite(weights, directory)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def load_optimizer(optimizer: Optimizer, directory: Path, state: dict[str, Any]) -> None:
    """Put the checkpoint's optimizer state into `optimizer`, which keeps its own settings (decay and so on).

    Raises:
        CheckpointError: the state is not that of such an optimizer.
    """
    path = directory / "optimizer.safetensors"
    with _as_checkpoint_error():
        read_header(path)
    tensors = _load_tensors(path)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    with _as_checkpoint_error(f"{directory}: the optimizer's state does not fit: "):
        loaded = optimizer_state_from_tensors(tensors, state["optimizer"])
        check_optimizer_state(loaded, optimizer)
        optimizer.load_state_dict(loaded)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


@contextmanager
def _as_checkpoint_error(prefix: str = "") -> Iterator[None]:
    """Say of whatever a stranger's file makes go wrong that the checkpoint is at fault."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{prefix}{error.filename}: cannot be read: {error.strerror}") from None
    except KeyError as error:
        raise CheckpointError(f"{prefix}expected the key {error}, found none") from None
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"{prefix}{error}") from None


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None


def _file_names(directory: Path) -> Iterator[str]:
    return (path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
