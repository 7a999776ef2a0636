"""How the ranks find each other at the start, so that one that does not come is named and no old trace counts.

torchrun keeps its store over restarts, with all that the ranks of the last start wrote into it: addresses, numbers of
those who came. So the ranks first agree on a name for this start, which only they know:

    every rank   writes `hello/RANK`: its host and a number that no other process has
    rank 0       reads them all and writes `roster`: all these numbers, and the name of the start
    every rank   finds its own number in the roster and writes `ack/RANK`: the name
    rank 0       has all of them and writes `go`: the name

A rank of an earlier start may have left a `hello`. When the new one writes its own, rank 0 sees that, and makes another
roster.
"""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from transformerlm.distributed.launcher import Launch

_POLL_SECONDS = 0.05
# Rank 0 knows who is missing: the others leave it time to say so.
_AFTER_RANK_0 = 5.0


@dataclass(frozen=True)
class Meeting:
    """All ranks are here: the name that they gave to this start, the host of each, and their store."""

    name: str
    hosts: tuple[str, ...]
    store: Store


def meet(launch: Launch, *, timeout: float) -> Meeting:
    """Wait until all ranks have come, and return what they agreed on.

    Raises:
        TimeoutError: one of them did not come in `timeout` seconds; the line names it.
    """
    deadline = time.monotonic() + timeout
    if not launch.holds_store:
        _wait_for_store(launch, deadline=deadline, timeout=timeout)
    store = connect(launch, timeout=timeout, opens=launch.holds_store)
    ours, number = PrefixStore("transformerlm", store), uuid.uuid4().hex
    ours.set(f"hello/{launch.rank}", json.dumps({"number": number, "host": socket.gethostname()}))
    if launch.rank == 0:
        roster = _lead(ours, launch, deadline=deadline, timeout=timeout)
    else:
        roster = _follow(ours, launch, number, deadline=deadline + _AFTER_RANK_0, timeout=timeout)
    return Meeting(roster["name"], tuple(roster["hosts"]), store)


def connect(launch: Launch, *, timeout: float, opens: bool = False) -> Store:
    """Return a connection of its own to the ranks' store; `opens`: make the store first."""
    return TCPStore(
        launch.address,
        launch.port,
        is_master=opens,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _wait_for_store(launch: Launch, *, deadline: float, timeout: float) -> None:
    """Wait until somebody listens; torch would write a line for each try."""
    for _ in _polls():
        left = deadline - time.monotonic()
        try:
            socket.create_connection((launch.address, launch.port), timeout=max(0.1, left)).close()
            return
        except OSError as error:
            if left < 0:
                raise TimeoutError(
                    f"{in_words([0], launch.world_size)}: missing at the start; rank {launch.rank} on "
                    f"{socket.gethostname()} found nobody at {launch.address}:{launch.port} in {timeout:g} s "
                    f"(parallel.timeout): {error}"
                ) from None


def _lead(store: Store, launch: Launch, *, deadline: float, timeout: float) -> dict[str, Any]:
    """Return the roster on which all ranks agree, as rank 0."""
    roster: dict[str, Any] = {"name": "", "numbers": [], "hosts": []}
    hellos, acks = Written(store, "hello", launch.world_size), Written(store, "ack", launch.world_size)
    store.set("ack/0", "")
    for _ in _polls():
        said = hellos.read()
        if not hellos.missing:
            came = [json.loads(one) for one in said]
            if roster["numbers"] != (numbers := [one["number"] for one in came]):
                roster = {"name": uuid.uuid4().hex, "numbers": numbers, "hosts": [one["host"] for one in came]}
                store.set("ack/0", roster["name"])
                store.set("roster", json.dumps(roster))
        agreed = acks.read()
        late = [rank for rank, name in enumerate(agreed) if rank and name.decode() != roster["name"]]
        if roster["name"] and not late:
            store.set("go", roster["name"])
            return roster
        if time.monotonic() > deadline:
            raise _missing(hellos.missing or late, launch, timeout)
    raise AssertionError


def _follow(store: Store, launch: Launch, number: str, *, deadline: float, timeout: float) -> dict[str, Any]:
    """Return the roster on which all ranks agree, as one of the others."""
    ours: dict[str, Any] = {"name": ""}
    for _ in _polls():
        if store.check(["roster"]):
            roster = json.loads(store.get("roster"))
            if roster["numbers"][launch.rank : launch.rank + 1] == [number] and roster["name"] != ours["name"]:
                ours = roster
                store.set(f"ack/{launch.rank}", ours["name"])
        if ours["name"] and store.check(["go"]) and store.get("go").decode() == ours["name"]:
            return ours
        if time.monotonic() > deadline:
            raise _missing([0], launch, timeout)
    raise AssertionError


def _missing(ranks: list[int], launch: Launch, timeout: float) -> TimeoutError:
    return TimeoutError(
        f"{in_words(ranks, launch.world_size)}: missing at the start; rank {launch.rank} on {socket.gethostname()} "
        f"waited for {timeout:g} s (parallel.timeout)"
    )


class Written:
    """What the ranks have written under a name; only those that have not are asked for one by one."""

    def __init__(self, store: Store, name: str, world_size: int) -> None:
        self._store = store
        self._keys = [f"{name}/{rank}" for rank in range(world_size)]
        self.missing = list(range(world_size))

    def read(self) -> list[bytes]:
        """Return what each rank has written; nothing for those that are `missing`."""
        self.missing = [rank for rank in self.missing if not self._store.check([self._keys[rank]])]
        there = [key for rank, key in enumerate(self._keys) if rank not in self.missing]
        values = dict(zip(there, self._store.multi_get(there) if there else [], strict=True))
        return [values.get(key, b"") for key in self._keys]


def in_words(ranks: list[int], world_size: int) -> str:
    """Return ranks in words, the first few of many: `ranks 1, 5 of 8`."""
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown} of {world_size}"


def _polls() -> Iterator[int]:
    """Count on, with a pause that grows from a moment to half a second."""
    count = 0
    while True:
        yield count
        time.sleep(min(0.5, _POLL_SECONDS * 1.1**count))
        count += 1
