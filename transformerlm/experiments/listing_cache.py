"""What was read of the runs below a directory, kept for the next time in a file outside of them.

It is under `$XDG_CACHE_HOME/transformerlm/runs` (else `~/.cache`), one file for each directory of runs. Each entry
names the files that it was read from, by number, size and time; one that no longer fits is read again. So the loss of
this file, or a damaged one, costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformerlm.experiments.run_directories import Known, RunSummary
from transformerlm.experiments.run_scan import RunScan
from transformerlm.utils.json_files import read_limited

_FORMAT = 1  # of another one nothing is read
_MOST_BYTES = 200_000_000


@dataclass
class Kept:
    """What is known of each run's directory: its summary, its scan, its settings with the key of their file."""

    summaries: dict[Path, Known]
    scans: dict[Path, RunScan]
    settings: dict[Path, tuple[list[int], dict[str, Any]]]


def cache_path(root: Path) -> Path:
    """Return the file for a directory of runs."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:24]
    return Path(home) / "transformerlm" / "runs" / f"{name}.json"


def load_kept(root: Path) -> Kept:
    """Return what was kept of the runs below a directory; nothing where that cannot be read."""
    kept = Kept({}, {}, {})
    try:
        tree = json.loads(read_limited(cache_path(root), max_bytes=_MOST_BYTES))
        if tree["format"] != _FORMAT or tree["root"] != str(root.absolute()):
            return kept
        for name, entry in tree["runs"].items():
            path = root / name
            kept.summaries[path] = (tuple(entry["key"]), RunSummary(**entry["summary"]))
            kept.scans[path] = RunScan(**entry["scan"])
            if entry["settings"]:
                kept.settings[path] = (entry["settings_key"], entry["settings"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Kept({}, {}, {})
    return kept


def save_kept(root: Path, kept: Kept, *, names: Mapping[Path, str]) -> None:
    """Write what is known of the runs in `names`; where that is not possible, the next list takes longer."""
    runs = {}
    for path, (key, summary) in kept.summaries.items():
        if path in names and path in kept.scans:
            settings_key, settings = kept.settings.get(path, ([], {}))
            runs[names[path]] = {
                "key": key,
                "summary": asdict(summary),
                "scan": asdict(kept.scans[path]),
                "settings_key": settings_key,
                "settings": settings,
            }
    path = cache_path(root)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError, ValueError):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps({"format": _FORMAT, "root": str(root.absolute()), "runs": runs}))
        unfinished.replace(path)
    with suppress(OSError):
        unfinished.unlink(missing_ok=True)
