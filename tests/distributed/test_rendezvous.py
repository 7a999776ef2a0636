"""How ranks find each other: whatever an earlier start has left in the store, and with the missing one named."""

from __future__ import annotations

import json
import socket
import threading
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore

from transformerlm.distributed.launcher import Launch
from transformerlm.distributed.rendezvous import Meeting, connect, in_words, meet


@pytest.fixture
def launch() -> Launch:
    """A launch whose store is open already, as torchrun's is; the store lives as long as the test."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    launch = Launch(0, 0, 3, 3, "127.0.0.1", store.port)
    object.__setattr__(launch, "keeps", store)
    return launch


def come(launch: Launch, ranks: list[int], *, timeout: float = 60.0) -> list[Any]:
    """Let these ranks come to a meeting, each in a thread, and return what each of them got."""
    results: list[Any] = [None] * len(ranks)

    def come_as(index: int, rank: int) -> None:
        try:
            results[index] = meet(replace(launch, rank=rank), timeout=timeout)
        except TimeoutError as error:
            results[index] = str(error)

    threads = [threading.Thread(target=come_as, args=pair) for pair in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_all_ranks_agree_on_a_name_that_is_new_each_time(launch):
    """Every rank gets the same name and the machines of all; the next start over the same store has another."""
    names = []
    for _ in range(3):
        meetings = come(launch, [2, 0, 1])
        assert {meeting.name for meeting in meetings} == {meetings[0].name}
        assert [meeting.hosts for meeting in meetings] == [(socket.gethostname(),) * 3] * 3
        names.append(meetings[0].name)
    assert len(set(names)) == 3


def test_another_number_of_ranks_comes_back(launch):
    """After a lost machine fewer ranks meet over the same store, and then more again."""
    for world_size in (3, 1, 2, 3):
        meetings = come(replace(launch, world_size=world_size), list(range(world_size)))
        assert [len(meeting.hosts) for meeting in meetings] == [world_size] * world_size


def test_a_rank_that_came_and_died_is_not_counted(launch):
    """A trace of a rank that died at the start does not stand for the one that comes after it."""
    store = PrefixStore("transformerlm", connect(launch, timeout=60))
    for rank in range(3):
        store.set(f"hello/{rank}", json.dumps({"number": "of a dead process", "host": "elsewhere"}))
        store.set(f"ack/{rank}", "an old name")
    store.set("go", "an old name")
    early: list[Meeting] = []
    first = threading.Thread(target=lambda: early.append(meet(launch, timeout=60)))
    first.start()  # rank 0 finds three that seem to be there
    first.join(0.5)
    assert first.is_alive()
    late = come(launch, [1, 2])
    first.join()
    assert {meeting.name for meeting in late} == {early[0].name}
    assert early[0].hosts == (socket.gethostname(),) * 3


@pytest.mark.parametrize(
    ("came", "missing"), [([0, 2], "rank 1 of 3"), ([0], "ranks 1, 2 of 3"), ([1, 2], "rank 0 of 3")]
)
def test_a_rank_that_does_not_come_is_named(came, missing, launch, monkeypatch):
    """When the time is up, the first line names those that are missing and the key that holds the time."""
    monkeypatch.setattr("transformerlm.distributed.rendezvous._AFTER_RANK_0", 0.3)
    said = come(launch, came, timeout=1.0)
    assert said[0].startswith(f"{missing}: missing at the start; rank {came[0]} on ")
    assert all("(parallel.timeout)" in line for line in said)


def test_a_store_that_nobody_opens_is_the_absence_of_rank_0():
    """Where nobody listens, the line names rank 0 and the address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        said = come(Launch(0, 0, 2, 2, "127.0.0.1", port), [1], timeout=0.5)[0]
    assert said.startswith("rank 0 of 2: missing at the start; rank 1 on ")
    assert f"found nobody at 127.0.0.1:{port} in 0.5 s (parallel.timeout)" in said


def test_many_ranks_are_named_by_the_first_few():
    """A line stays a line."""
    assert in_words([4], 8) == "rank 4 of 8"
    assert in_words(list(range(1, 1000)), 1000) == "ranks 1, 2, 3, 4, 5, 6, 7, 8, ... of 1000"
