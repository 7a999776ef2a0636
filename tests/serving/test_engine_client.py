"""The engine from the web side: streams, the queue, deaths and restarts, mostly with a stand-in for the process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.helpers import flip_bit
from tests.serving.helpers import LONG, read, request, running, tiny_checkpoint, until
from transformerlm.checkpoints.directory import prune
from transformerlm.serving.engine import EngineGone, Piece, QueueFull, UnknownCheckpoint
from transformerlm.serving.engine_client import EngineClient

STAND_IN = Path(__file__).with_name("stand_in.py")
FOREVER = 10**6


@asynccontextmanager
async def standing_in(
    folder: Path, changes: dict[str, Any] | None = None, *, fails: str = ""
) -> AsyncIterator[EngineClient]:
    """Give a client whose engine is the stand-in, with four slots."""
    command = [sys.executable, str(STAND_IN), str(folder / "starts"), *fails.split()]
    async with running(folder, changes, command=command) as client:
        yield client


def pid_of(client: EngineClient) -> int:
    """Return the number of the engine's process."""
    assert client._link is not None
    return client._link.pid


def talk(what: Callable[[], Awaitable[None]]) -> None:
    """Run a conversation to its end."""
    asyncio.run(asyncio.wait_for(what(), 4 * LONG))


async def ends_with_gone(stream: Any) -> str:
    """Return why a text ended with EngineGone."""
    with pytest.raises(EngineGone) as caught:
        await asyncio.wait_for(read(stream), LONG)
    return str(caught.value)


def test_texts_come_in_pieces_and_end(run):
    """More texts than slots end whole; equal seeds give equal texts, whoever runs beside them."""

    async def with_engine() -> None:
        async with running(run) as client:
            reports = []
            client.subscribe(reports.append)
            streams = client.submit([request(f"{i}", seed=i % 3) for i in range(9)])
            assert (client.status.running, client.status.waiting) == (4, 5)
            texts = [await read(stream) for stream in streams]
            assert [pieces[-1].finish for pieces in texts] == ["length"] * 9
            ids = [[one for piece in pieces for one in piece.token_ids] for pieces in texts]
            assert ids[:3] == ids[3:6] == ids[6:]
            assert ids[0] != ids[1]
            assert sum(report.generated_tokens for report in reports) == 9 * 8
            assert client.status.last_token_age_s is not None
            assert await client.drain(1)

    talk(with_engine)


@pytest.mark.slow
def test_a_training_is_followed_for_a_minute(files, tmp_path):
    """No text fails, each is of one step, and the last one is served, of thirty that are saved every two seconds.

    Two are kept and two are damaged; nothing but the training changes the names in the run.
    """
    saved: dict[int, float] = {}
    damaged = {9, 20}

    def train() -> None:
        for step in range(2, 32):
            directory = tiny_checkpoint(tmp_path, files, step)
            if step in damaged:
                flip_bit(directory / "model.safetensors")
            prune(tmp_path / "checkpoints", 2)
            saved[step] = time.monotonic()
            time.sleep(2)

    async def write(client: EngineClient, number: int, texts: list[list[Piece]], until: asyncio.Task[None]) -> None:
        count = 0
        while not until.done():
            count += 1
            name = f"{number}-{count}"
            texts.append(await read(client.submit([request(name, max_tokens=60, ignore_eos=True, seed=count)])[0]))

    async def follow() -> None:
        events: list[dict] = []
        taken: dict[int, float] = {}

        def take(event: dict) -> None:
            events.append(event)
            taken.setdefault(event.get("step", -1), time.monotonic())

        texts: list[list[Piece]] = []
        async with running(tmp_path, {"follow.checkpoint": "newest", "follow.interval": "1s"}) as client:
            client.on_event = take
            training = asyncio.create_task(asyncio.to_thread(train))
            await asyncio.gather(*(write(client, number, texts, training) for number in range(4)))
            await training
            await until(lambda: client.status.facts is not None and client.status.facts.step == 31)
        assert {pieces[-1].finish for pieces in texts} == {"length"}
        assert all(len({(piece.step, piece.fingerprint) for piece in pieces}) == 1 for pieces in texts)
        assert len({pieces[0].step for pieces in texts}) > 10
        skipped = [event["checkpoint"] for event in events if event["event"] == "checkpoint_skipped"]
        assert set(skipped) <= {"step-00000009", "step-00000020"}
        assert len(set(skipped)) == len(skipped)
        assert [event for event in events if event["event"] == "engine_restarted"] == []
        print("lag in s:", sorted(round(taken[step] - saved[step], 2) for step in taken if step in saved))
        names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
        assert names == {"step-00000030", "step-00000031", "latest"}

    tiny_checkpoint(tmp_path, files, 1)
    asyncio.run(asyncio.wait_for(follow(), 10 * LONG))


def test_the_bounds_of_the_queue_hold_for_all_requests_together(tmp_path):
    """Slots and `limits.waiting` are filled to the last place; then all of several requests are refused, or none."""

    async def fill() -> None:
        async with standing_in(tmp_path, {"limits.waiting": 6, "limits.waiting_tokens": 8}) as client:
            first = client.submit([request(f"a{i}", prompt=[1], max_tokens=FOREVER) for i in range(4)])
            sixteen = [request(f"b{i}", prompt=[1]) for i in range(16)]
            with pytest.raises(QueueFull, match="expected at most 6 waiting texts, found 16") as caught:
                client.submit(sixteen)
            assert 1 <= caught.value.retry_after <= 60
            assert (client.status.running, client.status.waiting) == (4, 0)
            client.submit(sixteen[:5])
            with pytest.raises(QueueFull, match="found 7"):
                client.submit(sixteen[5:7])
            with pytest.raises(QueueFull, match="expected at most 8 waiting prompt tokens, found 9"):
                client.submit([request("c", prompt=[1, 1, 1, 1])])
            client.submit([request("c", prompt=[1, 1, 1])])
            first[0].cancel()
            assert (await read(first[0]))[-1].finish == "cancelled"
            await until(lambda: client.status.waiting == 0)  # one slot is enough for all six
            client.submit(sixteen[5:10])

    talk(fill)


def test_all_cancels_free_their_slots_and_places(tmp_path):
    """16 of 16 texts that are cancelled, running and waiting, end as cancelled and leave nothing behind."""

    async def cancel() -> None:
        async with standing_in(tmp_path) as client:
            streams = client.submit([request(f"{i}", prompt=[1], max_tokens=FOREVER) for i in range(16)])
            await anext(aiter(streams[3]))
            for stream in streams:
                stream.cancel()
            for stream in streams:
                assert (await read(stream))[-1].finish == "cancelled"
                stream.cancel()  # it has ended: nothing happens
            assert (client.status.running, client.status.waiting) == (0, 0)
            assert await client.drain(1)

    talk(cancel)


def test_a_killed_engine_is_restarted_and_what_waited_survives(tmp_path):
    """Running texts end with EngineGone, waiting ones end whole in the next process, and the events say so."""

    async def kill() -> None:
        async with standing_in(tmp_path) as client:
            events: list[dict] = []
            client.on_event = events.append
            begun = client.submit([request(f"a{i}", prompt=[1], max_tokens=FOREVER) for i in range(4)])
            waiting = client.submit([request(f"b{i}", prompt=[1]) for i in range(3)])
            await anext(aiter(begun[0]))
            os.kill(pid_of(client), signal.SIGKILL)
            for stream in begun:
                assert "SIGKILL" in await ends_with_gone(stream)
            assert client.status.state in ("dead", "loading")
            with pytest.raises(EngineGone):
                client.submit([request("c")])
            for stream in waiting:
                assert (await read(stream))[-1].finish == "length"
                assert stream.queue_seconds > begun[0].queue_seconds == pytest.approx(0, abs=LONG)
            assert client.status.restarts == 1
            assert client.status.state == "ok"
            assert events == [{"event": "engine_restarted", "reason": events[0]["reason"], "restarts": 1}]

    talk(kill)


def test_the_next_engine_is_told_for_which_tokenizer_requests_are_prepared(tmp_path):
    """The first one is told nothing; after a death the next gets the facts of the model that was served."""

    async def kill() -> None:
        async with standing_in(tmp_path) as client:
            first = client._settings()
            assert first.earlier == client.status.facts != None  # noqa: E711
            os.kill(pid_of(client), signal.SIGKILL)
            await until(lambda: client.status.restarts == 1 and client.status.state == "ok")
            assert (tmp_path / "starts.earlier").read_text().split() == ["None", "step-00000001"]

    talk(kill)


def test_what_waited_ends_if_the_next_engine_cannot_start(tmp_path):
    """After a death whose restart fails, the waiting texts end with the reason, and starts become rarer."""

    async def fail() -> None:
        async with standing_in(tmp_path, fails="later") as client:
            begun = client.submit([request(f"a{i}", prompt=[1], max_tokens=FOREVER) for i in range(4)])
            waiting = client.submit([request("b", prompt=[1])])
            client.submit([])
            os.kill(pid_of(client), signal.SIGKILL)
            assert "SIGKILL" in await ends_with_gone(begun[0])
            assert "no good" in await ends_with_gone(waiting[0])
            assert client.status.state in ("dead", "loading")
            await until(lambda: client.status.restarts == 3)
            assert (tmp_path / "starts").read_text() >= "3"

    talk(fail)


@pytest.mark.parametrize("prompt", [[3], [4]])
def test_an_engine_without_a_token_is_killed_and_restarted(prompt, tmp_path):
    """An engine that has work and makes no token, whether it answers or not, is `stalled`, and another begins."""

    async def stall() -> None:
        async with standing_in(tmp_path, {"timeouts.stalled": "1s"}) as client:
            pid, states = pid_of(client), set()
            stream = client.submit([request("a", prompt=prompt)])[0]
            waits = asyncio.create_task(ends_with_gone(stream))
            await until(lambda: states.add(client.status.state) or client.status.restarts == 1)
            assert "no token for 1 s" in await waits
            assert "stalled" in states
            await until(lambda: client.status.state == "ok")
            assert pid_of(client) != pid
            assert (await read(client.submit([request("b", prompt=[1])])[0]))[-1].finish == "length"

    talk(stall)


def test_an_engine_that_reads_a_window_again_is_alive(tmp_path):
    """A slow machine may read the half of a long context for longer than `timeouts.stalled`: that is work."""

    async def slide() -> None:
        async with standing_in(tmp_path, {"timeouts.stalled": "1s"}) as client:
            pieces = await read(client.submit([request("a", prompt=[6])])[0])
            assert pieces[-1].finish == "length"
            assert client.status.restarts == 0

    talk(slide)


def test_a_stopped_engine_is_noticed_without_work(tmp_path):
    """SIGSTOP makes an idle engine stall; one that is idle and well does not."""

    async def stop() -> None:
        async with standing_in(tmp_path, {"timeouts.stalled": "2s"}) as client:
            await asyncio.sleep(3)
            assert (client.status.state, client.status.restarts) == ("ok", 0)
            os.kill(pid_of(client), signal.SIGSTOP)
            await until(lambda: client.status.restarts == 1)
            await until(lambda: client.status.state == "ok")

    talk(stop)


def test_a_line_that_is_not_of_the_protocol_ends_the_engine(tmp_path):
    """Texts end with the reason; the next engine works."""

    async def garble() -> None:
        async with standing_in(tmp_path) as client:
            assert "cannot be used" in await ends_with_gone(client.submit([request("a", prompt=[5])])[0])
            await until(lambda: client.status.state == "ok")

    talk(garble)


def test_an_engine_that_cannot_start_says_why(tmp_path):
    """`start` raises the process's own reason; so it does where the program is missing."""

    async def fail() -> None:
        with pytest.raises(ValueError, match=f"no good: {tmp_path}"):
            async with standing_in(tmp_path, fails="first"):
                pass
        with pytest.raises(ValueError, match="cannot be started"):
            async with running(tmp_path, command=[str(tmp_path / "none")]):
                pass
        with pytest.raises(ValueError, match="exit code 7"):
            async with running(tmp_path, command=[sys.executable, "-c", "raise SystemExit(7)"]):
                pass

    talk(fail)


def test_a_checkpoint_is_asked_for_by_its_name(tmp_path):
    """A name that is not listed is refused at once, one that cannot be opened when that is known."""

    async def ask() -> None:
        async with standing_in(tmp_path) as client:
            assert client.checkpoints() == ["step-00000001", "step-00000009"]
            for name in ("step-00000002", "../step-00000001", "step-00000001/", "best"):
                with pytest.raises(UnknownCheckpoint, match="expected a checkpoint that the run keeps"):
                    client.submit([request("a", checkpoint=name)])
            stream = client.submit([request("a", checkpoint="step-00000009")])[0]
            with pytest.raises(UnknownCheckpoint, match="damaged"):
                await read(stream)
            assert client.status.running == 0

    talk(ask)


def test_draining_takes_no_more_and_lets_all_end(tmp_path):
    """Running and waiting texts end whole; new ones are refused; a text without an end is not waited for."""

    async def drain() -> None:
        async with standing_in(tmp_path) as client:
            streams = client.submit([request(f"{i}", prompt=[1], max_tokens=20) for i in range(8)])
            drained = asyncio.create_task(client.drain(LONG))
            await asyncio.sleep(0)
            assert client.status.state == "draining"
            with pytest.raises(EngineGone, match="draining"):
                client.submit([request("late")])
            assert [(await read(stream))[-1].finish for stream in streams] == ["length"] * 8
            assert await drained
        async with standing_in(tmp_path) as client:
            stream = client.submit([request("a", prompt=[1], max_tokens=FOREVER)])[0]
            assert not await client.drain(0.05)
        assert "stops" in await ends_with_gone(stream)
        assert client.status.state == "draining"  # for good, so that who watches it ends

    talk(drain)


def test_closing_ends_the_process_even_if_it_is_stopped(tmp_path):
    """After `close` the process is gone; so it is after `close` during the start."""

    async def close() -> None:
        async with standing_in(tmp_path) as client:
            pid = pid_of(client)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        command = [sys.executable, "-c", "import time; time.sleep(3600)"]
        client = EngineClient(client._config, tmp_path, command=command)
        starts = asyncio.create_task(client.start())
        await until(lambda: client._link is not None)
        pid, began = pid_of(client), time.monotonic()
        await client.close()
        with pytest.raises(EngineGone):
            await starts
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert time.monotonic() - began < LONG

    talk(close)
