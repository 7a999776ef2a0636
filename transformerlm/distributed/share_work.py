"""Parts that several processes share out, with nothing in common but a folder: a job array, say.

Share k of N begins with the parts k, k + N, ... Then it helps: it does parts that nobody has done and nobody holds. So
it does not matter when a share starts, whether it is killed, or whether it ever comes: the others, or the same command
later, finish what is left. A lock beside each part keeps two from doing the same. Where the file system has no locks,
both do it and the first one wins (see `work.do_part`). Then several may also publish what the parts make, and must
bear it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from transformerlm.distributed.work import PATIENCE_SECONDS, Part
from transformerlm.utils.lock import try_lock

PLAN = "plan.json"
"""The file that is in the folder of the parts until everything is finished."""

LOCK_SUFFIX = ".lock"

POLL_SECONDS, MAX_POLL_SECONDS = 0.3, 5.0  # between looks at what others have done; longer each time


def own_share(share: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Return this process's place, from 0, and the number of shares.

    They are from `share` ("3/100"), or from SLURM: a job array's task, and within it the process that `srun` started.

    Raises:
        ValueError: neither is there.
    """
    if share is not None:
        place, num_shares = map(int, share.split("/"))
        return place - 1, num_shares
    place, num_shares = 0, 1
    known = False
    if {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"} <= environment.keys():
        task, first, step = (
            int(environment.get(f"SLURM_ARRAY_TASK_{name}", default))
            for name, default in (("ID", 0), ("MIN", 0), ("STEP", 1))
        )
        num_shares = int(environment["SLURM_ARRAY_TASK_COUNT"])
        place = (task - first) // step % num_shares
        known = True
    if {"SLURM_PROCID", "SLURM_NTASKS"} <= environment.keys():
        num_tasks = int(environment["SLURM_NTASKS"])
        place, num_shares = place * num_tasks + int(environment["SLURM_PROCID"]), num_shares * num_tasks
        known = True
    if not known:
        raise ValueError(
            'cluster.share: expected a share such as "3/100", or SLURM\'s variables of a job array or of srun, '
            "found neither"
        )
    return place, num_shares


@contextmanager
def hold(path: Path) -> Iterator[bool]:
    """Hold a lock that is named after `path` if no other process does, and say so; its file goes at the end.

    Raises:
        FileNotFoundError: the folder has gone.
    """
    name = path.with_name(path.name + LOCK_SUFFIX)
    with name.open("a+b") as file:
        held = try_lock(file, name)
        try:
            yield held
        finally:
            if held:
                with suppress(OSError):
                    name.unlink()


def do_share(
    do: Callable[[Part], str], parts: Sequence[Part], *, folder: Path, share: str | None, wait: bool
) -> Iterator[str]:
    """Do this process's share of the parts and then what is left, and yield the names of those done here.

    It ends when nothing is left that no other process holds; with `wait`, when nothing is left at all. It ends, too,
    when another process has finished everything and removed the folder.
    """
    place, num_shares = own_share(share, os.environ)
    own = parts[place % num_shares :: num_shares]
    names = {part.name for part in own}
    start = len(parts) * place // num_shares  # helpers begin at different places
    others = [part for part in [*parts[start:], *parts[:start]] if part.name not in names]
    left = [*own, *others]
    last_change = time.monotonic()
    pause = POLL_SECONDS
    while left:
        try:
            for part in left:
                if (folder / part.name).exists():
                    continue
                with hold(folder / part.name) as held:
                    if not held or (folder / part.name).exists():
                        continue
                    if not (folder / PLAN).exists():  # it goes before the parts: they are done, and being removed
                        return
                    yield do(part)
                    last_change, pause = time.monotonic(), POLL_SECONDS
            there = {entry.name for entry in folder.iterdir()}
        except OSError:  # of a part that another process was removing, too
            if (folder / PLAN).exists():
                raise
            return
        left = [part for part in left if part.name not in there]
        if left and not wait and time.monotonic() - last_change > PATIENCE_SECONDS:
            return
        if left:
            time.sleep(pause)
            pause = min(2 * pause, MAX_POLL_SECONDS)
