"""Work that was cut into independent parts: each is done once, by any process, and a kill costs the parts in hand.

All parts are in one folder, `OUTPUT.parts/`, beside a plan: the settings that the parts depend on, and the list that
the parts come from. The same command goes on with what is done, on any number of machines; other settings are refused.

Who does the parts is a `ClusterConfig`: this process with a mapping of the caller's (local), the workers of a Ray
cluster (`ray_work`), or several processes that see the same folder (`share_work`). The parts are the same, and so are
their files.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from config.schemas import ClusterConfig
from transformerlm.distributed.ray_work import check_ray, do_on_ray
from transformerlm.distributed.share_work import LOCK_SUFFIX, PLAN, do_share, hold, own_share
from transformerlm.distributed.work import UNFINISHED, Facts, Part, do_part, has_died, read_facts, remove, who
from transformerlm.utils import files
from transformerlm.utils.json_files import read_json_object, values_sha256
from transformerlm.utils.lock import try_lock

FORMAT = 1
_LOCK = ".lock"
_MAX_PLAN_BYTES = 1 << 30
_TRIES = 5
_MAX_SHOWN = 200  # characters of a value that differs

Mapper = Callable[[Callable[[Part], str], Iterable[Part]], Iterable[str]]
"""Calls a function with each part and yields its results, as `map` does; the function can be pickled."""


def check_cluster(cluster: ClusterConfig) -> None:
    """Refuse what cannot work here, before anything is written.

    Raises:
        ValueError: Ray is not installed, or nothing says which share this process does.
    """
    if cluster.on == "ray":
        check_ray()
    if cluster.on == "share":
        own_share(cluster.share, os.environ)


def is_abandoned(path: Path) -> bool:
    """Return whether a folder of parts is one whose removal was interrupted: its plan, which goes first, is gone."""
    return (path / _LOCK).exists() and not (path / PLAN).exists()


def finish_removal(path: Path) -> None:
    """Remove a folder that `is_abandoned`, unless a process is just removing it, or opening it anew."""
    with suppress(FileNotFoundError), (path / _LOCK).open("r+b") as lock:
        if try_lock(lock, path / _LOCK) and is_abandoned(path):
            remove(path)


def is_planned(path: Path, settings: Mapping[str, Any]) -> bool:
    """Return whether a folder of parts has a plan, and it is of these settings."""
    with suppress(OSError, ValueError):
        plan = read_json_object(path / PLAN, max_bytes=_MAX_PLAN_BYTES)
        return bool(plan.get("settings") == json.loads(json.dumps(settings)))
    return False


class PartsFolder:
    """The folder of the parts, held for as long as the `with` block lasts.

    Args:
        path: the folder, which is created if missing.
        settings: a JSON object with all that the parts depend on; what is in the folder must be of the same settings.
        list_items: called where there is no plan yet; returns the JSON values that the parts are made from. Later
            calls, and the other processes, read them from the plan as `items`.
        cluster: who does the parts. With "share" several processes hold the folder at once.
        restart: throw away parts of other settings instead of refusing them; not with "share".

    Raises:
        FileExistsError: another process holds the folder.
        ValueError: the folder holds parts of other settings, or something else.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        *,
        list_items: Callable[[], list[Any]],
        cluster: ClusterConfig,
        restart: bool = False,
    ) -> None:
        self.path = path.absolute()  # other machines have other working directories
        self.items: list[Any] = []
        self._settings = json.loads(json.dumps(settings))
        self._list_items = list_items
        self._cluster = cluster
        self._restart = restart and cluster.on != "share"

    def __enter__(self) -> Self:
        for number in range(_TRIES):
            try:
                self._open()
                break
            except FileNotFoundError:  # another share has just finished everything and removed the folder
                if self._cluster.on != "share" or number == _TRIES - 1:
                    raise
        return self

    def _open(self) -> None:
        names = self._names()
        if names and _LOCK not in names:
            raise ValueError(
                f"{self.path}: expected the parts of an unfinished command, found {min(names)} in it; move it away"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / _LOCK).open("a+b")
        if not try_lock(self._lock, self.path / _LOCK, shared=self._cluster.on == "share"):
            self._lock.close()
            raise FileExistsError(f"{self.path}: expected to be the only process here, found another one; wait for it")
        try:
            self._open_plan()
            self._remove_leftovers()
        except BaseException:
            self._lock.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the folder go; what is done stays for the next call.

        Where another share has published and removed the folder meanwhile, this one may have kept it from going, or
        have written into it since; so it removes what is left.
        """
        try:
            if self._cluster.on == "share" and not self.is_there and self._is_ours():
                self.remove()
        finally:
            self._lock.close()

    def run(
        self,
        parts: Sequence[Part],
        *,
        mapper: Mapper = map,
        num_cpus: int = 1,
        wait: bool = False,
        on_done: Callable[[str, bool], object] | None = None,
    ) -> dict[str, Facts] | None:
        """Do the parts that are not done yet, and return the facts of all by name, in the order of `parts`.

        Args:
            parts: their names differ.
            mapper: how this process does them, if it does them alone; results may come in any order.
            num_cpus: of one part, where Ray looks for room.
            wait: with "share": wait for parts that other processes are doing, because more follows.
            on_done: called with the name of each part that is done, and whether it was there from the beginning.

        Returns None, with "share" alone, if other processes are still doing some, or have finished everything and
        removed the folder.

        Raises:
            What a part raises comes through, except that the other parts in hand may be finished first.
        """
        facts: dict[str, Facts] = {}
        old = self._names()
        while len(facts) < len(parts):
            done = self._names()
            for part in parts:
                if on_done is not None and part.name in done and part.name not in facts:
                    on_done(part.name, part.name in old)
            todo = [part for part in parts if part.name not in done]
            for name in self._do(todo, mapper=mapper, num_cpus=num_cpus, wait=wait):
                if on_done is not None:
                    on_done(name, False)
            if self._cluster.on == "share" and not {part.name for part in parts} <= self._names():
                return None
            read = {part.name: read_facts(self.path / part.name, plan=self.plan_sha256) for part in parts}
            facts = {name: found for name, found in read.items() if found is not None}
        return facts

    @contextmanager
    def alone(self, name: str) -> Iterator[bool]:
        """Give True if no other process is in a block of this name; where the system has no locks, always True."""
        with hold(self.path / name) as held:
            yield held

    def remove(self) -> None:
        """Remove the folder with all parts, once the outputs that were made from them are in place."""
        for name in (PLAN, *(self._names() - {_LOCK, PLAN})):  # a folder without a plan is emptied by the next start
            remove(self.path / name)
        shutil.rmtree(self.path, ignore_errors=True)

    @property
    def is_there(self) -> bool:
        """Whether the plan is still there; another share removes it after publishing."""
        return (self.path / PLAN).exists()

    def _is_ours(self) -> bool:
        """Return whether the folder is the one that this process has opened, and not a newer one of its name."""
        try:
            found = (self.path / _LOCK).stat()
        except FileNotFoundError:  # it is being removed, or has been
            return True
        return os.path.samestat(found, os.fstat(self._lock.fileno()))

    def _do(self, parts: Sequence[Part], *, mapper: Mapper, num_cpus: int, wait: bool) -> Iterable[str]:
        do = partial(do_part, self.path, self.plan_sha256)
        if self._cluster.on == "ray":
            return do_on_ray(do, parts, address=self._cluster.address, num_cpus=num_cpus)
        if self._cluster.on == "share":
            return do_share(do, parts, folder=self.path, share=self._cluster.share, wait=wait)
        return mapper(do, parts)

    def _names(self) -> set[str]:
        """Return what is in the folder; opening it makes a network file system look again."""
        try:
            return {entry.name for entry in self.path.iterdir()}
        except FileNotFoundError:
            return set()

    def _open_plan(self) -> None:
        path = self.path / PLAN
        if not path.exists():
            self._write_plan()
        plan = read_json_object(path, max_bytes=_MAX_PLAN_BYTES)
        if plan.get("format") != FORMAT or plan.get("settings") != self._settings:
            found = _difference(self._settings, plan.get("settings"))
            if not self._restart:
                raise ValueError(
                    f"{self.path}: expected parts of the same inputs and settings, found {found}; give the earlier "
                    "ones to go on with them, or remove the folder to begin anew"
                )
            warnings.warn(f"{self.path}: beginning anew, since the parts there are of {found}", stacklevel=2)
            self._write_plan()
            plan = read_json_object(path, max_bytes=_MAX_PLAN_BYTES)
        self.items = plan["items"]
        self.plan_sha256 = values_sha256(plan, kept_in="")

    def _write_plan(self) -> None:
        """Write the plan unless another process has done so meanwhile; the first one counts."""
        for name in self._names() - {_LOCK} if self._cluster.on != "share" else ():
            remove(self.path / name)  # parts of another plan, or a removal that was killed
        plan = {"format": FORMAT, "settings": self._settings, "items": self._list_items()}
        path = self.path / PLAN
        unfinished = path.with_name(f"{PLAN}{UNFINISHED}{who()}")
        try:
            unfinished.write_text(json.dumps(plan), encoding="utf-8")
            files.sync(unfinished)
            try:
                os.link(unfinished, path)
            except FileExistsError:
                return
            except OSError:  # a file system without hard links
                unfinished.replace(path)
            files.sync(self.path)
        finally:
            unfinished.unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        """Remove what killed processes left; of shares, which others may be doing, only those of this machine."""
        for name in self._names():
            if UNFINISHED not in name:
                continue
            if self._cluster.on != "share":
                remove(self.path / name)
            elif has_died(name):
                with hold(self.path / name.rpartition(UNFINISHED)[0]) as held:
                    if held:  # a machine of the same name, such as another container, is not at work on it either
                        remove(self.path / name)
        for name in self._names() - {_LOCK} if self._cluster.on != "share" else ():
            if name.endswith(LOCK_SUFFIX):
                remove(self.path / name)


def _difference(expected: Any, found: Any, name: str = "") -> str:
    """Return in words where two JSON values first differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        key = next(key for key in [*expected, *found] if expected.get(key) != found.get(key))
        return _difference(expected.get(key), found.get(key), f"{name}.{key}" if name else key)
    if isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            return f"{len(found):,} of {name}, now {len(expected):,}"
        number = next(number for number, one in enumerate(expected) if one != found[number])
        return _difference(expected[number], found[number], f"{name}.{number}")
    before, now = (json.dumps(value, ensure_ascii=False)[:_MAX_SHOWN] for value in (found, expected))
    return f"{name or 'settings'} = {before}, now {now}"
