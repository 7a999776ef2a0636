"""Who is missing: watches of several ranks in one process, each with its own connection to the store."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import PrefixStore, Store, TCPStore

from transformerlm.distributed.watch import Progress, Watch

HOSTS = ("first", "second", "third")
TIMEOUT = 2.0


@dataclass
class Rank:
    """A rank: how far it has come, its watch, and the lines with which the watch wanted to end it."""

    progress: Progress
    watch: Watch
    ends: queue.Queue[str | None]


class Deaf(Store):
    """A store whose holder is stopped: whoever asks waits."""

    def check(self, keys: list[str]) -> bool:
        time.sleep(600)
        return False


@pytest.fixture
def server() -> TCPStore:
    """The store of the ranks."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


@pytest.fixture
def ranks(server: TCPStore) -> Iterator[list[Rank]]:
    """Three ranks that have met once; their watches are not started."""
    made = []
    for rank in range(3):
        client = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=60))
        progress, ends = Progress(), queue.Queue[str | None]()
        settings: dict[str, Any] = {"rank": rank, "hosts": HOSTS, "timeout": TIMEOUT, "end": ends.put}
        progress.arrive("step 1")
        made.append(Rank(progress, Watch(progress, PrefixStore("watch", client), **settings), ends))
    yield made
    for rank in made:
        rank.watch.stop()


def test_a_rank_that_is_behind_is_named_once(ranks):
    """Two ranks wait at step 2 for the third, which is alive at step 1; one of them says so, and all end."""
    for rank in ranks:
        rank.watch.start()
    for rank in ranks[:2]:
        rank.progress.arrive("step 2")
    ends = [rank.ends.get(timeout=60) for rank in ranks]
    (line,) = [end for end in ends if end is not None]
    assert line.startswith('rank 2 of 3: missing at "step 2" (rank 2 on third: alive, last at "step 1"); rank ')
    assert line.endswith("s (parallel.timeout), and all ranks end")


def test_a_rank_that_gives_no_sign_of_life_is_named(ranks):
    """Ranks 1 and 2 are where all are, but rank 0 has stopped, or never came so far: the store still answers."""
    for rank in ranks[1:]:
        rank.watch.start()
    ends = [rank.ends.get(timeout=60) for rank in ranks[1:]]
    (line,) = [end for end in ends if end is not None]
    assert line.startswith('rank 0 of 3: missing at "step 1" (rank 0 on first: no sign of life for ')


def test_a_rank_that_left_is_said_to_have_left(ranks):
    """A rank that ended after an error, while others wait for it, is named as such."""
    for rank in ranks:
        rank.watch.start()
    ranks[1].watch.stop()
    for rank in (ranks[0], ranks[2]):
        rank.progress.arrive("step 2")
    ends = [rank.ends.get(timeout=60) for rank in (ranks[0], ranks[2])]
    (line,) = [end for end in ends if end is not None]
    assert 'rank 1 on second: it has left, last at "step 1"' in line


def test_all_ranks_may_be_busy_for_longer_than_the_timeout(ranks):
    """Where all are alive at one place, as while they compile, or have left, none is ended; nor is one that goes on."""
    for rank in ranks:
        rank.watch.start()
    time.sleep(2 * TIMEOUT)
    ranks[2].watch.stop()
    for step in range(10):
        ranks[0].progress.arrive(f"step {step}")
        ranks[1].progress.arrive(f"step {step}")
        time.sleep(TIMEOUT / 10)
    assert all(rank.ends.empty() for rank in ranks)


def test_a_rank_that_arrives_in_the_last_moment_is_not_missing(ranks):
    """What a rank said before it arrived, and is read after the time is up, is old: only what it says later counts."""
    patient, late = ranks[0], ranks[1]
    patient.progress.arrive("step 2")
    patient.watch._say()
    late.watch._say()
    ranks[2].progress.arrive("step 2")
    ranks[2].watch._say()
    patient.progress.since -= 2 * TIMEOUT
    patient.watch._look()
    assert patient.watch._accuse() is None
    late.watch._say()
    patient.watch._look()
    late.progress.arrive("step 2")
    late.watch._say()
    patient.watch._look()
    assert patient.watch._accuse() is None
    patient.progress.arrive("step 3")
    ranks[2].progress.arrive("step 3")
    ranks[2].watch._say()
    patient.progress.since -= 2 * TIMEOUT
    for _ in range(2):
        late.watch._say()
        patient.watch._look()
    assert patient.watch._accuse().startswith('rank 1 of 3: missing at "step 3"')


def test_a_store_that_does_not_answer_ends_a_rank_that_waits():
    """Where the process that holds the store is stopped, the thread that talks to it hangs, and another one ends it."""
    progress, ends = Progress(), queue.Queue[str | None]()
    watch = Watch(progress, Deaf(), rank=1, hosts=HOSTS, timeout=TIMEOUT, end=ends.put)
    watch.start()
    line = ends.get(timeout=60)
    assert line.startswith("rank 1 on second has waited for ")
    assert "rank 0, on first, or its launcher is missing" in line


def test_the_holder_of_the_store_waits_for_the_others_to_leave(ranks):
    """The last look at the store is not cut off; who holds it leaves when the others have."""
    for rank in ranks:
        rank.watch.start()
    ranks[1].watch.stop()
    ranks[2].watch.stop()
    ranks[0].watch.stop(lingers=True)
    assert all(said["left"] for said in ranks[0].watch._read())
