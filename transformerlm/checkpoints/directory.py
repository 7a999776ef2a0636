"""The checkpoints of a run as directories: naming, finding, pruning and setting them aside, `latest` and `best`."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformerlm.checkpoints.naming import LINKS
from transformerlm.checkpoints.validation import (
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotSharedError,
    agreed,
    read_state,
    verify,
)
from transformerlm.distributed.world import World, gather_text, is_main

_NAME = re.compile(r"step-(\d{8,})")
_MAX_LINK_BYTES = 256


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


def newest_whole(
    root: Path,
    *,
    warn: Callable[[str], None] = warnings.warn,
    world: World = World(),  # noqa: B008 (frozen)
) -> Path | None:
    """Return the newest checkpoint that passes `verify`, and set aside damaged newer ones; None: there is none.

    All ranks call this, and share the reading. On rank 0 a warning names each damaged checkpoint and the one that is
    used instead.

    Raises:
        CheckpointFormatError: one has another format, which is not damage.
        CheckpointError: all checkpoints are damaged, or there were some before and none is left; nothing is moved.
        CheckpointUnreadableError: one cannot be read now, which is not damage; nothing is moved.
    """
    newest, damaged = _first_whole(list_checkpoints(root), root, world=world)
    with agreed(world):
        if newest is not None:
            for directory, error in damaged if is_main(world) else ():
                warn(f"{error}; set aside as {set_aside(directory).name}, {newest.name} is used instead")
        elif is_main(world):
            _refuse_none(root, damaged)
    return newest


def _refuse_none(root: Path, damaged: list[tuple[Path, CheckpointError]]) -> None:
    """Refuse a run that has no whole checkpoint, unless it never had one."""
    found = [str(error) for _, error in damaged]
    found += [f"{path}: set aside as damaged before" for path in sorted(root.glob("step-*.bad*"))]
    found += [f"{link}: its checkpoint is gone" for link in (root / name for name in LINKS) if link.is_symlink()]
    if found or _tells_of_checkpoints(root.parent / "metrics.jsonl"):
        raise CheckpointError(
            f"{root}: expected a whole checkpoint to go on from, found {'; '.join(found) or 'none of those it saved'}; "
            f"put back a copy of one, or, to begin anew, remove {root.parent} or choose another logging.run_name"
        )


def _tells_of_checkpoints(metrics: Path) -> bool:
    """Return whether a run's log says that the run saved a checkpoint."""
    if not metrics.is_file():
        return False
    with metrics.open("rb") as lines:
        return any(b'"checkpoint_saved"' in line for line in lines)


def _first_whole(
    directories: list[Path],
    root: Path,
    *,
    world: World = World(),  # noqa: B008 (frozen)
) -> tuple[Path | None, list[tuple[Path, CheckpointError]]]:
    """Return the first that passes `verify`, and those before it with their errors; another format is not damage.

    All are in `root`. The list is rank 0's: on a shared disk, another machine may see a new name a little later.
    """
    found, damaged = _first_verified(directories, root, world=world)
    return None if found is None else found[0], damaged


def _first_verified(
    directories: list[Path],
    root: Path,
    *,
    world: World = World(),  # noqa: B008 (frozen)
    weights_only: bool = False,
) -> tuple[tuple[Path, dict[str, Any]] | None, list[tuple[Path, CheckpointError]]]:
    """Do what `_first_whole` does, and return the state of the checkpoint beside it."""
    damaged: list[tuple[Path, CheckpointError]] = []
    names = gather_text(" ".join(directory.name for directory in directories), world)[0].split()
    for directory in (root / name for name in names):
        try:
            state = verify(directory, world=world, weights_only=weights_only)
        except (CheckpointFormatError, CheckpointNotSharedError):
            raise
        except CheckpointError as error:
            damaged.append((directory, error))
        else:
            return (directory, state), damaged
    return None, damaged


def resolve(path: Path, *, world: World = World()) -> Path:  # noqa: B008 (frozen)
    """Return the checkpoint directory that `path` names: itself, or the newest whole one of a run directory.

    `RUN/best` and `RUN/latest` are the run's `checkpoints/best` and `checkpoints/latest`. Damaged
    checkpoints of a run are skipped with a warning; they stay where they are. All ranks call this.

    Raises:
        CheckpointError: there is none.
    """
    named: Path | None = None
    found: list[Path] = []
    with agreed(world):
        named, found = _candidates(path)
    if named is not None:
        return named
    return _newest_of(path, found, world=world)[0]


def resolve_verified(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint that `path` names, as `resolve` does, and its state.

    Its files are verified, once, but for the optimizer's: this is for those who use the weights.

    Raises:
        CheckpointError: there is none, or the one that is named is damaged.
    """
    named, found = _candidates(path)
    if named is not None:
        return named, verify(named, weights_only=True)
    return _newest_of(path, found, weights_only=True)


def _newest_of(
    path: Path,
    found: list[Path],
    *,
    world: World = World(),  # noqa: B008 (frozen)
    weights_only: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Return the newest whole one of a run's checkpoints and its state, with a warning for each damaged newer one."""
    newest, damaged = _first_verified(found, found[0].parent, world=world, weights_only=weights_only)
    for _, error in damaged if is_main(world) else ():
        instead = f"{newest[0].name} is used instead" if newest else "there is no older one"
        warnings.warn(f"{error}; {instead}", stacklevel=3)
    if newest is None:
        raise CheckpointError(f"{path}: none of its {len(found)} checkpoints is whole")
    return newest


def _candidates(path: Path) -> tuple[Path | None, list[Path]]:
    """Return the checkpoint that `path` names, or else those of the run directory that it names."""
    if path.name in LINKS and not path.exists() and (path.parent / "checkpoints").is_dir():
        path = path.parent / "checkpoints" / path.name
        if _target(path) is None and not path.is_dir():
            none = "none: none was saved with a validation loss"
            raise CheckpointError(f"{path.parent.parent}: expected one checkpoint to be {path.name}, found {none}")
    if path.name in LINKS and (path.is_symlink() or path.is_file()):
        path = _pointed_at(path)
    if path.is_file():
        raise CheckpointError(
            f"{path}: expected a checkpoint's directory, found a file (a .pt or .bin holds a pickle, which can run "
            "code when it is loaded, and is not read)"
        )
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint or run directory; train one with transformerlm-train")
    if (path / "state.json").is_file():
        return path, []
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = list_checkpoints(root)
    if not found:
        raise CheckpointError(f"{path}: expected a checkpoint (with state.json) or a run directory, found neither")
    return None, found


def _pointed_at(link: Path) -> Path:
    name = _target(link) or ""
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{link}: expected it to name a checkpoint beside it (step-...), found {name[:80]!r}")
    return link.with_name(name)


def _target(link: Path) -> str | None:
    """Return the name that `latest` or `best` holds; each is a symbolic link, or a file in place of one."""
    if link.is_symlink():
        return os.readlink(link)
    return link.open("rb").read(_MAX_LINK_BYTES).decode("utf-8", "replace").strip() if link.is_file() else None


def point(link: Path, target: Path) -> None:
    """Make `link` point to `target`, a directory beside it: as a symbolic link, or else a file that holds its name."""
    if link.is_dir() and not link.is_symlink():
        set_aside(link)
    temporary = link.with_name(f"{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target.name, target_is_directory=True)
    except OSError:  # Windows without the right to make links, some network drives
        temporary.write_text(target.name, encoding="utf-8")
    temporary.replace(link)


def prune(root: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints and the one that `best` points to."""
    best = _target(root / "best")
    for directory in list_checkpoints(root)[keep:]:
        if directory.name != best:
            # Renamed first: a directory that is half removed must not look like a checkpoint.
            doomed = directory.rename(directory.with_name(f"{directory.name}.tmp-removed"))
            shutil.rmtree(doomed, ignore_errors=True)


def set_aside(directory: Path) -> Path:
    """Rename a damaged checkpoint to a free name that ends in `.bad`, so that nothing uses or overwrites it."""
    for number in range(1, 10_000):
        target = directory.with_name(f"{directory.name}.bad{'' if number == 1 else number}")
        if not target.exists():
            return directory.rename(target)
    raise CheckpointError(f"{directory}: cannot be set aside: too many .bad directories beside it; remove some")


def restore_links(root: Path) -> None:
    """Turn `latest` and `best` back into links if a copy that followed links has left directories in their place.

    Such a directory is a checkpoint like any other. If the checkpoint of its step is missing or damaged, it takes that
    place; if that checkpoint is whole, the directory is removed.
    """
    for link in (root / name for name in LINKS):
        if link.is_symlink() or not link.is_dir():
            continue
        try:
            own = root / step_name(read_state(link)["step"])
        except CheckpointFormatError:
            raise
        except CheckpointError:
            set_aside(link)
            continue
        if own.exists() and _first_whole([own], root)[0]:
            shutil.rmtree(link)
        else:
            if own.exists():
                set_aside(own)
            link.rename(own)
        point(link, own)


def remove_leftovers(root: Path) -> None:
    """Remove what a killed save or clean-up left below `root`."""
    for path in root.glob("*.tmp*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
