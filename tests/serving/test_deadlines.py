"""Slow clients: half-sent headers and bodies, readers that do not read, and too many connections."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from tests.serving.web import Web, run, until

SHORT = {"headers": "0.3s", "body": "0.3s", "write": "0.3s"}
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 30\r\n"


async def connect(web: Web) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection."""
    return await asyncio.open_connection("127.0.0.1", web.port)


async def ask_and_wait(web: Web) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection and ask for a text, which is not answered before the gate is opened."""
    web.engine.gate.clear()
    reader, writer = await connect(web)
    writer.write(POST + b'\r\n{"prompt":"ab","max_tokens":5}')
    await until(lambda: len(web.engine.active) == 1)
    return reader, writer


async def drip(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Send a byte now and then, until the other end has closed."""
    for byte in data:
        if writer.transport.is_closing():
            return
        writer.write(bytes([byte]))
        await asyncio.sleep(0.05)


def test_headers_that_drip_are_ended(tmp_path):
    """A byte now and then does not keep a connection open: it gets 408 and is closed."""

    async def ask(web: Web) -> None:
        reader, writer = await connect(web)
        dripping = asyncio.create_task(drip(writer, POST + b"X: " + b"y" * 200))
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"headers took longer than 0.3 s" in answer
        assert web.events == [{"event": "rejected", "reason": "timeout"}]
        dripping.cancel()

    run(tmp_path, ask, over_network=True, sections={"timeouts": SHORT})


def test_a_body_that_never_comes_is_ended(tmp_path):
    """A request without its body gets 408 and is closed; no text is asked for."""

    async def ask(web: Web) -> None:
        reader, writer = await connect(web)
        writer.write(POST + b"\r\n{")
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"
        assert web.engine.seen == []
        assert web.events == [{"event": "rejected", "reason": "timeout"}]
        metrics = (await web.client.get("/metrics")).text
        assert 'transformerlm_requests_rejected_total{reason="timeout"} 1.0' in metrics

    run(tmp_path, ask, over_network=True, sections={"timeouts": SHORT})


def test_a_connection_that_says_nothing_is_closed_without_an_answer(tmp_path):
    """There was no question."""

    async def ask(web: Web) -> None:
        reader, _ = await connect(web)
        assert await reader.read() == b""
        assert web.events == []

    run(tmp_path, ask, over_network=True, sections={"timeouts": SHORT})


def test_a_text_may_take_longer_than_headers_and_body(tmp_path):
    """The deadlines end with the request; one that has come whole waits for its answer, and so does the next one."""

    async def ask(web: Web) -> None:
        for _ in range(2):
            web.engine.gate.clear()
            answer = asyncio.create_task(web.complete(prompt="ab"))
            await asyncio.sleep(0.7)
            web.engine.gate.set()
            assert (await answer).status_code == 200

    run(tmp_path, ask, over_network=True, sections={"timeouts": SHORT})


@pytest.mark.parametrize("pause", [None, 0.02])
def test_a_reader_that_hardly_reads_frees_its_place(pause, tmp_path):
    """When a client reads nothing of a long stream, or a few bytes now and then, its connection and text are ended."""

    async def ask(web: Web) -> None:
        loop, client = asyncio.get_running_loop(), socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", web.port))
        prompt = "ab" * 500
        body = json.dumps({"prompt": prompt, "max_tokens": 10**6, "logprobs": 5, "stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        await loop.sock_sendall(client, head + body)
        reading = asyncio.create_task(sip(client, pause)) if pause is not None else None
        await until(lambda: len(web.engine.active) == 1)
        await until(lambda: len(web.events) == 1)
        assert [event["finish"] for event in web.events] == ["cancelled"]
        if reading is not None:
            reading.cancel()  # what the system has buffered would take it long
        client.close()

    sections = {"timeouts": SHORT, "limits": {"overflow": "slide", "max_tokens": 10**6}}
    run(tmp_path, ask, over_network=True, sections=sections)


def test_who_leaves_with_a_second_request_unanswered_frees_its_place(tmp_path):
    """Bytes of a next request behind the one that is answered do not hide that the connection was closed."""

    async def ask(web: Web) -> None:
        _, writer = await ask_and_wait(web)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await asyncio.sleep(0.1)
        writer.close()
        await until(lambda: web.engine.active == [])
        assert [event["finish"] for event in web.events] == ["cancelled"]

    run(tmp_path, ask, over_network=True)


def test_a_request_may_come_before_the_answer_to_the_one_before(tmp_path):
    """Both are answered, in order."""

    async def ask(web: Web) -> None:
        reader, writer = await ask_and_wait(web)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        await asyncio.sleep(0.1)
        web.engine.gate.set()
        answer = await reader.read()
        assert answer.count(b"HTTP/1.1 200 OK") == 2
        assert answer.index(b"text_completion") < answer.index(b'"status"')

    run(tmp_path, ask, over_network=True)


def test_a_text_whose_time_ends_while_its_reader_is_slow_says_so(tmp_path):
    """The error is an event, though the server was waiting for the client when the time was up."""

    async def ask(web: Web) -> None:
        loop, client = asyncio.get_running_loop(), socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", web.port))
        body = json.dumps({"prompt": "ab" * 500, "max_tokens": 10**6, "logprobs": 5, "stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        await loop.sock_sendall(client, head + body)
        await asyncio.sleep(1.5)
        end = b""
        while b"data: [DONE]" not in end:
            got = await loop.sock_recv(client, 1 << 16)
            assert got, end[-300:]
            end = (end + got)[-2000:]
        assert b'"code":"timeout"' in end
        assert [event["finish"] for event in web.events] == ["timeout"]
        client.close()

    sections = {"timeouts": {"request": "0.5s"}, "limits": {"overflow": "slide", "max_tokens": 10**6}}
    run(tmp_path, ask, over_network=True, sections=sections)


def test_the_rest_of_a_refused_body_is_no_next_request(tmp_path):
    """A request that was refused before its body had come leaves a connection on which nothing is said unasked."""

    async def ask(web: Web) -> None:
        reader, writer = await connect(web)
        writer.write(POST + b"\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 401 ")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(length)
        writer.write(b"x" * 30)
        await asyncio.sleep(1.0)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k\r\n\r\n")
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200 ")

    run(tmp_path, ask, over_network=True, key="k", sections={"timeouts": SHORT})


async def sip(client: socket.socket, pause: float) -> None:
    """Read some 250 bytes and wait, again and again."""
    while await asyncio.get_running_loop().sock_recv(client, 250):
        await asyncio.sleep(pause)


def test_beyond_the_limit_the_idlest_connection_makes_room(tmp_path):
    """Connections that wait for nothing are closed for new ones; where all are busy, the new one gets 503."""

    async def ask(web: Web) -> None:
        (idle, _), later = await connect(web), await connect(web)
        assert (await web.client.get("/health")).status_code == 200
        assert await idle.read() == b""
        assert not later[0].at_eof()
        web.engine.gate.clear()
        busy = [await connect(web) for _ in range(2)]
        for _, writer in busy:
            writer.write(POST.replace(b"30", b"15") + b'\r\n{"prompt": "a"}')
        await until(lambda: len(web.engine.active) == 2)
        reader, writer = await connect(web)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
        assert web.events == [{"event": "rejected", "reason": "too_many_connections"}]
        web.engine.gate.set()
        for reader, _ in busy:
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")

    run(tmp_path, ask, over_network=True, sections={"limits": {"connections": 2}})


def test_what_is_no_http_is_refused(tmp_path):
    """Nonsense gets 400 in the form of all errors, and the connection is closed."""

    async def ask(web: Web) -> None:
        for data in (b"\x16\x03\x01\x02\x00\x01\xfc\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a" * 70_000):
            reader, writer = await connect(web)
            writer.write(data)
            answer = await reader.read()
            assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 ")), answer
            assert b'"error"' in answer
        assert web.events == [{"event": "rejected", "reason": "invalid_http"}] * 3

    run(tmp_path, ask, over_network=True)
