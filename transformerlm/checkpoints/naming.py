"""How a path names a run: by itself, by a link, or by something in it. Only names count; nothing here needs torch."""

from __future__ import annotations

from pathlib import Path

LINKS = ("latest", "best")
"""The names in `checkpoints/` that stand for one of the checkpoints, and in a run for those."""


def run_of(path: Path) -> Path:
    """Return the run that a path names, as itself, by `RUN/best`, or by something in its `checkpoints`.

    Only the names count; a checkpoint outside of a run is returned as it is.
    """
    path = path.absolute()
    if path.name in LINKS:
        path = path.parent
    if path.parent.name == "checkpoints":
        path = path.parent
    return path.parent if path.name == "checkpoints" else path
