"""The TOML files that come with the package, by their names: `--config train` is the shipped `train.toml`."""

from __future__ import annotations

import os
from pathlib import Path

from config.errors import ConfigError
from config.io import SHIPPED
from config.suggest import closest


def shipped_files() -> dict[str, Path]:
    """Return the shipped TOML files by name: the path below `config/resources`, without the suffix, `-` for `_`."""
    files = {path.relative_to(SHIPPED).with_suffix("").as_posix(): path for path in sorted(SHIPPED.rglob("*.toml"))}
    return {_name(Path(name)): path for name, path in files.items()}


def _name(path: Path) -> str:
    return path.as_posix().replace("_", "-").rstrip("-")


def find_config(path: Path) -> Path:
    """Return the file that `--config` means: a file of that name, or else the shipped one.

    Only a name without a suffix is looked up among the shipped ones.

    Raises:
        ConfigError: there is neither.
    """
    is_there = os.path.exists(path)  # False, too, for what cannot be a name
    if is_there and not path.is_dir():
        return path
    files = shipped_files()
    if path.suffix:
        name = _name(Path(path.stem))
        if name in files and not is_there:
            raise ConfigError([f"{path}: no such file; --config {name} is the shipped one"])
        return path
    name = _name(path)
    if name in files:
        return files[name]
    if is_there or path.is_absolute():
        return path
    meant = closest(name, files, cutoff=0.6)
    suggestion = f" (did you mean {' or '.join(meant)}?)" if meant else ""
    raise ConfigError(
        [f"--config {path}: no such file, and no shipped one of that name{suggestion}; shipped: {', '.join(files)}"]
    )
