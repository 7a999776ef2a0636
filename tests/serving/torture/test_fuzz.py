"""Mutated requests: whatever comes in, the answer is right or says what is wrong, and the server is as before."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import suppress

import pytest

from tests.serving.command import WAIT, Server, memory_of, serving
from tests.serving.torture.mutations import request

ALLOWED = {200, 204, *range(400, 500), 503}
LIMITS = [
    "--limits.max_tokens=8",
    "--defaults.max_tokens=8",
    "--limits.n=4",
    "--limits.prompts=8",
    "--limits.body_mb=1",
]
TIMES = ["--timeouts.headers=2s", "--timeouts.body=2s"]


async def status_of(port: int, data: bytes) -> tuple[int, bytes]:
    """Return the status and the body of the answer to these bytes; 0: the connection was closed without one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with suppress(ConnectionError):  # it is answered before it has sent all
            writer.write(data)
            await writer.drain()
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            status = int(head.split()[1])
            if status != 100:
                break
        if "transfer-encoding: chunked" in head:
            body = await reader.readuntil(b"0\r\n\r\n")
        else:
            length = next((int(line[15:]) for line in head.split("\r\n") if line.startswith("content-length:")), 0)
            body = b"" if data.startswith(b"HEAD") else await reader.readexactly(length)
        return status, body
    except (asyncio.IncompleteReadError, ConnectionError):
        return 0, b""
    finally:
        writer.close()


async def ask_all(port: int, numbers: range, *, streams: int = 16) -> Counter[int]:
    """Send the requests with these numbers, several at a time; return how often each status came."""
    found: Counter[int] = Counter()
    waiting = iter(numbers)

    async def ask() -> None:
        for number in waiting:
            status, body = await asyncio.wait_for(status_of(port, request(number)), WAIT)
            assert status in ALLOWED or status == 0, f"request({number}) was answered with {status}: {body[:500]!r}"
            assert b"Traceback" not in body, f"request({number})"
            if 400 <= status < 600 and body:
                error = json.loads(body)["error"]
                assert {"message", "type", "param", "code"} == set(error), f"request({number})"
            found[status] += 1

    await asyncio.gather(*(ask() for _ in range(streams)))
    return found


def check(server: Server, numbers: range) -> None:
    """Send requests; the server then makes the same text as before, in the same engine, and has said nothing."""
    expected, pid, said = server.texts(prompt="Ada", max_tokens=8, seed=1), server.engine_pid, server.stderr
    found = asyncio.run(ask_all(server.port, numbers))
    assert found[200] > len(numbers) / 20, found
    assert found[400] > len(numbers) / 4, found
    assert found[0] < len(numbers) / 20, found
    server.wait_until_idle()
    assert server.texts(prompt="Ada", max_tokens=8, seed=1) == expected
    assert server.engine_pid == pid
    assert server.stderr == said


@pytest.fixture(scope="module")
def strict(tmp_path_factory, untrained):
    """Give a server with small limits and short times."""
    with serving(untrained, tmp_path_factory.mktemp("strict"), *LIMITS, *TIMES) as server:
        yield server


@pytest.mark.slow
def test_some_mutated_requests_are_answered(strict):
    """A few hundred: only 200, 4xx, 429 and 503."""
    check(strict, range(300))


@pytest.mark.slow
def test_many_mutated_requests_are_answered_and_take_no_memory(strict):
    """10,000: as above, and both processes have the memory that they had after the first 1,000."""
    check(strict, range(1_000))
    pids = [strict.process.pid, strict.engine_pid or 0]
    before = [memory_of(pid) for pid in pids]
    check(strict, range(1_000, 10_000))
    for pid, bytes_before in zip(pids, before, strict=True):
        assert memory_of(pid) < bytes_before + 50_000_000


@pytest.mark.slow
def test_mutated_requests_without_the_key_are_refused(untrained, tmp_path):
    """A thousand, some with a key that is none: each has an answer that is no 5xx, and the engine is asked nothing."""
    arguments = [*LIMITS, *TIMES, "--access.key_env=FUZZ_KEY"]
    with serving(untrained, tmp_path, *arguments, environment={"FUZZ_KEY": "a-key"}) as server:
        found = asyncio.run(ask_all(server.port, range(1_000)))
        assert found[401] > 500, found
        assert server.events("request") == []
        assert "Traceback" not in server.stderr
