"""The checkpoints of a run as files, looked at without torch: which there are, and whether each is what it says."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformerlm.checkpoints.naming import LINKS
from transformerlm.experiments.run_directories import flat_settings
from transformerlm.utils.files import file_sha256
from transformerlm.utils.json_files import read_json_object, values_sha256

_NAME = re.compile(r"step-(\d{8,})")
_MOST_STATE_BYTES = 64 * 2**20
_MOST_CONFIG_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A checkpoint that was read whole.

    `state` is its `state.json`, `sums` the sha256 of each file that it names, as the file is now, and `config` its
    settings by dotted keys. `problems` says what is damaged, or not what `state.json` says.
    """

    directory: Path
    step: int
    state: Mapping[str, Any]
    sums: Mapping[str, str]
    config: Mapping[str, Any]
    problems: tuple[str, ...]

    @property
    def tensors(self) -> dict[str, str]:
        """The sha256 of each file of weights and of the optimizer's state."""
        return {name: digest for name, digest in self.sums.items() if name.endswith(".safetensors")}


def checkpoint_directories(run_dir: Path) -> dict[int, Path]:
    """Return the checkpoints of a run by their steps, in order; links are none."""
    root = run_dir / "checkpoints"
    found = root.iterdir() if root.is_dir() and not root.is_symlink() else ()
    names = ((_NAME.fullmatch(path.name), path) for path in found if path.is_dir() and not path.is_symlink())
    return dict(sorted((int(match[1]), path) for match, path in names if match))


def linked_names(run_dir: Path) -> dict[str, str]:
    """Return the names of the checkpoints that `latest` and `best` stand for; a link that is not there has none."""
    names = {}
    for link in LINKS:
        with suppress(OSError):
            names[link] = os.readlink(run_dir / "checkpoints" / link)
    return names


def state_of(checkpoint: Path) -> Mapping[str, Any]:
    """Return what a checkpoint's `state.json` says; nothing where that cannot be read."""
    try:
        return read_json_object(checkpoint / "state.json", max_bytes=_MOST_STATE_BYTES)
    except (OSError, ValueError):
        return {}


def read_checkpoint(directory: Path, step: int) -> SavedCheckpoint:
    """Read a checkpoint and hash each of its files; what is wrong with it is in `problems`."""
    problems, sums, state = [], {}, {}
    try:
        state = read_json_object(directory / "state.json", max_bytes=_MOST_STATE_BYTES)
        if state.get("state_sha256") != values_sha256(state, kept_in="state_sha256"):
            problems.append("state.json was changed: its values do not have the sha256 recorded with them")
    except (OSError, ValueError) as error:
        problems.append(f"state.json cannot be read: {error}")
    promised = state.get("sha256")
    for name, digest in (promised if isinstance(promised, dict) else {}).items():
        try:
            sums[name] = _own_sha256(directory, name)
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror or error}")
            continue
        if sums[name] != digest:
            problems.append(f"{name} was changed: expected sha256 {str(digest)[:12]}..., found {sums[name][:12]}...")
    if state and state.get("step") != step:
        problems.append(f"expected a state of step {step}, found {state.get('step')}")
    if not any(name.endswith(".safetensors") for name in sums):
        problems.append("state.json names no file of weights")
    config = _config(directory / "config.toml")
    if not config:
        problems.append("config.toml cannot be read")
    return SavedCheckpoint(
        directory=directory, step=step, state=state, sums=sums, config=config, problems=tuple(problems)
    )


def _own_sha256(directory: Path, name: str) -> str:
    """Return the sha256 of a file of the checkpoint, which may not lead out of it."""
    path = directory / name
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    if not inside or any(one.is_symlink() for one in (path, *path.parents) if directory in one.parents):
        raise OSError("it leads out of the checkpoint")
    return file_sha256(path)


def _config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_CONFIG_BYTES:
            return {}
        return flat_settings(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}
