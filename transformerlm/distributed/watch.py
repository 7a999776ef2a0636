"""Who waits for whom: each rank says how far it has come, and one that does not come is named and waited for no longer.

A rank that waits in a collective cannot look around. So a thread does, over a connection of its own to the ranks'
store. It says how often its rank has arrived at a place where all meet, and that the process is alive. When its own
rank has not moved for `timeout` seconds, it looks at the others. A rank that has arrived less often, or gives no sign
of life, is missing: the thread names it and ends the process, so that the launcher can start all of them again. If all
ranks are alive and at the same place, they are busy, not stuck: compiling, for example. Nothing happens then.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from transformerlm.distributed.rendezvous import Written, in_words

_MOST_SECONDS_BETWEEN_SIGNS = 5.0
_NAMED = 8


class Progress:
    """How far this rank has come: how often it arrived where all ranks meet, where that was last, and when.

    One thread writes, another may read.
    """

    def __init__(self) -> None:
        self.meetings = 0
        self.where = "the start"
        self.since = time.monotonic()

    def arrive(self, where: str | None) -> None:
        """Count a meeting; None keeps the name of the one before."""
        self.where = where or self.where
        self.since = time.monotonic()
        self.meetings += 1


@dataclass
class Sign:
    """What a rank said last.

    `since`: when we saw it first, by our own clock; `again`: how often since then; `late`: how often the rank said
    something new after our time was up.
    """

    said: dict[str, Any]
    since: float
    again: int = 0
    late: int = 0


class Watch:
    """The thread that looks around while its rank waits.

    Args:
        progress: how far this rank has come.
        store: a connection to the ranks' store that nothing else uses.
        rank: our number.
        hosts: the machine of each rank.
        timeout: how long a rank may wait for others, in seconds.
        end: ends the process; it gets the line that says why, None if another rank has said it.
    """

    def __init__(
        self,
        progress: Progress,
        store: Store,
        *,
        rank: int,
        hosts: tuple[str, ...],
        timeout: float,
        end: Callable[[str | None], object],
    ) -> None:
        self._progress, self._store, self._rank, self._hosts = progress, store, rank, hosts
        self._timeout, self._end = timeout, end
        self._pause = min(_MOST_SECONDS_BETWEEN_SIGNS, timeout / 20)
        # Who says nothing new over so many looks is silent. A machine that pauses makes no look.
        self._patience = max(10, round(timeout / 4 / self._pause))
        self._written = Written(store, "sign", len(hosts))
        self._signs: dict[int, Sign] = {}
        self._unheard = 0
        self._count = 0
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to give signs of life, and to look around."""
        for run in (self._talk, self._guard):
            self._threads.append(threading.Thread(target=run, name="watch", daemon=True))
            self._threads[-1].start()

    def stop(self, *, lingers: bool = False) -> None:
        """Say that this rank leaves, and look around no more; `lingers`: wait a moment until the others leave, too."""
        self._over.set()
        for thread in self._threads:
            thread.join(_MOST_SECONDS_BETWEEN_SIGNS)
        if any(thread.is_alive() for thread in self._threads):
            return  # the store does not answer
        try:
            self._say(left=True)
            end = time.monotonic() + _MOST_SECONDS_BETWEEN_SIGNS
            while lingers and time.monotonic() < end and not all(said["left"] for said in self._read()):
                time.sleep(0.05)
        except RuntimeError:  # whoever held the store has gone
            return

    # --- the threads -------------------------------------------------------------------------------------------------

    def _talk(self) -> None:
        """Give signs of life, and look at those of the others while this rank waits."""
        while not self._over.wait(self._pause):
            try:
                self._say()
                if self._store.check(["ended"]):
                    self._end(None)
                    return
                if self._waited() > self._timeout / 2:
                    self._look()
            except RuntimeError:  # whoever holds the store has gone, or is slow: that is for the guard
                continue
            self._unheard = 0
            if self._waited() > self._timeout and (line := self._accuse()):
                self._end(line if self._is_first_to_say(line) else None)
                return

    def _guard(self) -> None:
        """End a rank that waits while the store does not answer, so that the other thread may wait for ever."""
        while not self._over.wait(self._pause):
            self._unheard += 1
            if self._waited() > self._timeout and self._unheard > self._patience:
                self._end(
                    f'{self._self()} has waited for {self._waited():.0f} s at "{self._progress.where}" '
                    f"(parallel.timeout), and the ranks' store does not answer: rank 0, on {self._hosts[0]}, or its "
                    "launcher is missing"
                )
                return

    def _waited(self) -> float:
        return time.monotonic() - self._progress.since

    def _say(self, *, left: bool = False) -> None:
        self._count += 1
        progress = self._progress
        sign = {"number": self._count, "meetings": progress.meetings, "where": progress.where, "left": left}
        self._store.set(f"sign/{self._rank}", json.dumps(sign))

    def _read(self) -> list[dict[str, Any]]:
        nothing = {"number": 0, "meetings": 0, "where": "the start", "left": False}
        return [json.loads(one) if one else nothing for one in self._written.read()]

    def _look(self) -> None:
        is_late = self._waited() > self._timeout
        for rank, said in enumerate(self._read()):
            before = self._signs.get(rank)
            if before is None or before.said["number"] != said["number"]:
                late = before.late + 1 if before and is_late else 0
                self._signs[rank] = Sign(said, time.monotonic(), late=late)
            else:
                before.again += 1

    # --- what it finds -----------------------------------------------------------------------------------------------

    def _accuse(self) -> str | None:
        """Return the line that names those for whom this rank waits; None if nobody is missing."""
        missing = {}
        for rank, sign in self._signs.items():
            # What we see first may have been said before it arrived, in the last moment.
            behind = sign.said["meetings"] < self._progress.meetings and (sign.late > 1 or sign.said["left"])
            if rank != self._rank and (behind or (self._is_silent(sign) and not sign.said["left"])):
                missing[rank] = self._about(rank, sign)
        if not missing:
            return None
        who = in_words(list(missing), len(self._hosts))
        return (
            f'{who}: missing at "{self._progress.where}" ({"; ".join(list(missing.values())[:_NAMED])}); '
            f"{self._self()} has waited for {self._waited():.0f} s (parallel.timeout), and all ranks end"
        )

    def _is_silent(self, sign: Sign) -> bool:
        return sign.again > self._patience

    def _about(self, rank: int, sign: Sign) -> str:
        silence = time.monotonic() - sign.since
        state = f"no sign of life for {silence:.0f} s" if self._is_silent(sign) else "alive"
        state = "it has left" if sign.said["left"] else state
        return f'rank {rank} on {self._hosts[rank]}: {state}, last at "{sign.said["where"]}"'

    def _self(self) -> str:
        return f"rank {self._rank} on {self._hosts[self._rank]}"

    def _is_first_to_say(self, line: str) -> bool:
        try:
            return self._store.compare_set("ended", "", line).decode() == line
        except RuntimeError:
            return True
