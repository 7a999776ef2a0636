"""Which checkpoint of a run to take over next, while a training writes, prunes and damages them.

The run belongs to the training: nothing in it is renamed, written or locked. A checkpoint that cannot be used is told
once, and looked at again only when one of its files changes. One that cannot be read now is told once and tried again,
less and less often.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, Literal, TypeVar

from transformerlm.checkpoints.directory import list_checkpoints, resolve, step_of
from transformerlm.checkpoints.naming import LINKS, run_of
from transformerlm.checkpoints.validation import CheckpointError

LoadedT = TypeVar("LoadedT")
Identity = tuple[tuple[str, int, int], ...]

_TRIES = 3
_LONGEST_PAUSE = 64  # looks; a try reads the whole checkpoint, beside a training that needs the machine


class CheckpointNotNowError(CheckpointError):
    """A checkpoint that cannot be read now, as by an error of the disk or for lack of memory; it may well be whole."""


def checkpoints_of(path: Path) -> Path:
    """Return the folder with the checkpoints of the run that `path` names, as a run, `RUN/best` or a checkpoint.

    Raises:
        ValueError: `path` is a checkpoint that is not in a run.
    """
    path = path.absolute()
    if path.name not in LINKS and (path / "state.json").is_file():
        if not any(one == path for one in list_checkpoints(path.parent)):
            raise ValueError(f"{path}: expected a run to follow, found a checkpoint outside of one")
        return path.parent
    return run_of(path) / "checkpoints"


class Following(Generic[LoadedT]):
    """Looks at a run's checkpoints, and loads the newest or the best one when it is another than before.

    Args:
        root: the folder with the checkpoints; it need not be there yet.
        which: the one to take.
        load: what makes something of a checkpoint's directory; a CheckpointError says that it cannot be used, and a
            CheckpointNotNowError that it cannot be used now.
        skip: is told the name of a checkpoint that cannot be used, and why.
    """

    def __init__(
        self,
        root: Path,
        which: Literal["newest", "best"],
        *,
        load: Callable[[Path], LoadedT],
        skip: Callable[[str, str], None],
    ) -> None:
        self._root, self._which, self._load, self._skip = root, which, load, skip
        self._current: tuple[int, Identity] | None = None
        self._unusable: set[Identity] = set()
        self._looks = 0
        self._not_now: dict[Identity, tuple[int, int]] = {}  # the look that tries it again, and the pause after that
        self._told: set[tuple[str, type[CheckpointError]]] = set()

    def look(self) -> LoadedT | None:
        """Return what `load` made of the checkpoint to take over; None: there is none."""
        self._looks += 1
        for _ in range(_TRIES):
            candidates = self._candidates()
            for place, directory in enumerate(candidates):
                before = identity(directory)
                if before is None or before in self._unusable or self._looks < self._not_now.get(before, (0, 1))[0]:
                    continue
                if self._current is not None and (
                    before == self._current[1] or (place > 0 and step_of(directory) <= self._current[0])
                ):
                    return None  # what is left is older than what there is
                loaded = self._try(directory, before)
                if loaded is not None:
                    return loaded
            if candidates == self._candidates():
                return None  # else one was removed, or came, while we read
        return None

    def _try(self, directory: Path, before: Identity) -> LoadedT | None:
        try:
            loaded = self._load(directory)
        except CheckpointError as error:
            if identity(directory) == before:  # else it was removed or changed while it was read, which is no damage
                self._pass_over(directory.name, before, error)
            return None
        self._current = (step_of(directory) if self._which == "newest" else 0), before  # a copied `best` is no link
        return loaded

    def _pass_over(self, name: str, found: Identity, error: CheckpointError) -> None:
        reason = str(error)
        if isinstance(error, CheckpointNotNowError):
            pause = self._not_now.get(found, (0, 1))[1]
            self._not_now[found] = self._looks + pause, min(2 * pause, _LONGEST_PAUSE)
            reason += "; it is tried again"
        else:
            self._unusable.add(found)
        if (name, type(error)) not in self._told:
            self._told.add((name, type(error)))
            self._skip(name, reason)

    def _candidates(self) -> list[Path]:
        """Return the checkpoints that may be taken, the first choice first."""
        try:
            if self._which == "newest":
                return list_checkpoints(self._root)
            return [resolve(self._root / "best")]
        except (CheckpointError, OSError):  # no best one yet, or the folder was removed while it was listed
            return []


def identity(directory: Path) -> Identity | None:
    """Return names, sizes and times of a checkpoint's files, which differ when one was written; None: it is not there.

    One without a `state.json` is not there yet: it is being copied.
    """
    try:
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        found = tuple(
            (str(path.relative_to(directory)), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files
        )
    except OSError:  # removed while we looked
        return None
    return found if any(name == "state.json" for name, _, _ in found) else None
