"""One part of a larger work: a folder with its files and facts that is there whole or not at all.

A part is a name, a function and plain arguments. The function fills a folder of its own and returns a few facts. The
folder is flushed to the disk together with its facts and then renamed. So the first of two processes that do the same
part wins, and no part is replaced while somebody reads it. `parts_folder` does a list of them.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformerlm.utils import files
from transformerlm.utils.json_files import read_json_object

Facts = dict[str, Any]
"""What is known of a part that is done: a small JSON object."""

UNFINISHED = ".tmp-"
"""What follows the name of a part, or of a plan, while it is being written."""

PATIENCE_SECONDS = 3.0
"""How long a network file system may take to show a new name."""

_POLL_SECONDS = 0.1
_FACTS = "part.json"
_MAX_FACTS_BYTES = 1 << 24


@dataclass(frozen=True)
class Part:
    """One part of the work.

    `function(folder, **arguments)` writes files into an empty folder and returns facts. It is at the top level of a
    module and its arguments can be pickled, since another machine may call it; the same arguments give the same files.
    `name` names the part's folder.
    """

    name: str
    function: Callable[..., Facts]
    arguments: Mapping[str, Any]


def do_part(folder: Path, plan: str, part: Part) -> str:
    """Do one part unless it is done, and return its name; `plan` is the sha256 of the plan that it belongs to."""
    place = folder / part.name
    if read_facts(place, plan=plan) is not None:
        return part.name
    unfinished = folder / f"{part.name}{UNFINISHED}{who()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        facts = part.function(unfinished, **part.arguments)
        files_in_it = [path for path in unfinished.rglob("*") if path.is_file()]
        sizes = {path.relative_to(unfinished).as_posix(): path.stat().st_size for path in files_in_it}
        record = {"plan": plan, "sizes": sizes, "facts": facts}
        (unfinished / _FACTS).write_text(json.dumps(record), encoding="utf-8")
        files.sync_tree(unfinished)
        try:
            unfinished.rename(place)
        except OSError:
            if read_facts(place, plan=plan) is None:  # no other process has done the same part meanwhile
                raise
        files.sync(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return part.name


def read_facts(place: Path, *, plan: str) -> Facts | None:
    """Return the facts of a part that is done; None, and nothing is left of it, where it does not fit the plan.

    A file that is missing is waited for: the part got its name with all its files, but a network file system may show
    them a little later.

    Raises:
        OSError: the part cannot be read; it stays as it is.
    """
    end = time.monotonic() + PATIENCE_SECONDS
    while place.is_dir():
        try:
            record = read_json_object(place / _FACTS, max_bytes=_MAX_FACTS_BYTES)
            sizes = record.get("sizes", {})
            if record.get("plan") == plan and all((place / name).stat().st_size == sizes[name] for name in sizes):
                facts: Facts = record["facts"]
                return facts
        except FileNotFoundError:
            if time.monotonic() < end:
                time.sleep(_POLL_SECONDS)
                continue
        except ValueError:  # no JSON
            pass
        shutil.rmtree(place, ignore_errors=True)
        break
    return None


def who() -> str:
    """Return a name that no other thread of no other process on no other machine has."""
    return f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"


def has_died(name: str) -> bool:
    """Return whether a name that ends in `UNFINISHED` and `who()` is of a process of this machine that has gone."""
    host, *numbers = name.rpartition(UNFINISHED)[2].rsplit("-", 2)
    if host != socket.gethostname() or len(numbers) != 2:
        return False
    try:
        os.kill(int(numbers[0]), 0)
    except (ProcessLookupError, ValueError):
        return True
    except OSError:
        return False
    return False


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
