"""Processes that die, hang or are told to end, under load: what clients see of it, and what stays behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.command import WAIT, Server, serving, state_of, wait_until

LONG_TEXT = {"prompt": "Ada sees", "max_tokens": 110, "ignore_eos": True}


class Outcome:
    """What one streamed request came to, as its client saw it."""

    def __init__(self, server: Server, number: int, **more: Any) -> None:
        self.has_begun = threading.Event()
        self.text, self.error, self.finish, self.is_whole = "", None, None, False
        body = {**LONG_TEXT, "seed": number, "stream": True, **more}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=WAIT) as answer:
            self.status, self.headers = answer.status_code, answer.headers
            if self.status != 200:
                self.error = json.loads(answer.read())["error"]
                return
            for line in answer.iter_lines():
                self._take(line)

    def _take(self, line: str) -> None:
        if line == "data: [DONE]":
            self.is_whole = True
        elif line:
            event = json.loads(line.removeprefix("data: "))
            self.error = event.get("error", self.error)
            for choice in event.get("choices", []):
                self.text += choice["text"]
                self.finish = choice["finish_reason"] or self.finish


def begin(pool: ThreadPoolExecutor, server: Server, count: int, **more: Any) -> list[Future[Outcome]]:
    """Ask for streamed texts; return when all of them are with the server."""
    asked = [pool.submit(Outcome, server, number, **more) for number in range(count)]
    wait_until(
        lambda: (now := server.health())["running"] + now["waiting"] >= count or all(one.done() for one in asked)
    )
    return asked


def outcomes(asked: list[Future[Outcome]]) -> list[Outcome]:
    """Return what came of the requests."""
    return [one.result(WAIT) for one in asked]


def test_an_engine_that_is_killed_is_started_again(server):
    """Texts on their way end with an error event, not silently; new ones get 503 until it is back."""
    expected = server.texts(prompt="Ada", max_tokens=8, seed=1)
    restarts = server.health()["restarts"]
    with ThreadPoolExecutor(8) as pool:
        pid = server.engine_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)  # so that no text ends before the kill
        asked = begin(pool, server, 8)
        os.kill(pid, signal.SIGKILL)
        for one in outcomes(asked):
            assert one.error is not None
            assert one.error["code"] == "engine_unavailable"
            assert "SIGKILL" in one.error["message"]
    refused = server.complete(prompt="a")
    if refused.status_code != 200:  # it is back already on a fast machine
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
    wait_until(lambda: server.health()["code"] == 200)
    assert server.health()["restarts"] == restarts + 1
    assert server.texts(prompt="Ada", max_tokens=8, seed=1) == expected
    assert state_of(pid) == "X"


@pytest.mark.slow
def test_an_engine_that_hangs_is_noticed_and_started_again(untrained, tmp_path):
    """SIGSTOP: /health says stalled, then the engine is killed and another one started; clients get an error."""
    with serving(untrained, tmp_path, "--timeouts.stalled=2s") as server, ThreadPoolExecutor(8) as pool:
        expected = server.texts(prompt="Ada", max_tokens=8, seed=1)
        pid = server.engine_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        asked = begin(pool, server, 8)
        wait_until(lambda: server.health()["code"] == 503)
        for one in outcomes(asked):
            assert one.error is not None
            assert one.error["code"] == "engine_unavailable"
        wait_until(lambda: server.health()["code"] == 200)
        assert server.texts(prompt="Ada", max_tokens=8, seed=1) == expected
        assert state_of(pid) == "X"
        [event] = server.events("engine_restarted")
        assert "no token for 2 s" in event["reason"]
        assert server.terminate() == 143


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["streamed", "whole"])
def test_a_kill_in_the_middle_of_texts_is_an_error_for_each(kind, untrained, tmp_path):
    """Killed while tokens come: 503 for an answer that has not begun, an error event after a text's first pieces."""
    with serving(untrained, tmp_path) as server, ThreadPoolExecutor(8) as pool:
        for kills in range(3):
            wait_until(lambda: (now := server.health())["code"] == 200 and now["restarts"] == kills)  # noqa: B023
            asked = begin(pool, server, 8, stream=kind == "streamed")
            time.sleep(0.02)
            pid = server.engine_pid
            assert pid is not None  # 0 would be this process and all its group
            os.kill(pid, signal.SIGKILL)
            for one in outcomes(asked):
                if one.error is None:  # it had ended before
                    assert kind == "whole" or (one.is_whole and one.finish == "length")
                elif kind == "whole" or one.status != 200:  # nothing of the text was sent
                    assert one.status == 503
                    assert one.headers["retry-after"] == "1"
                else:
                    assert one.is_whole
        wait_until(lambda: server.health()["code"] == 200)
        assert server.terminate() == 143
        assert "Traceback" not in server.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_texts_on_their_way_end_whole_when_the_server_is_told_to_end(number, code, untrained, tmp_path):
    """With 8 streams and 8 that wait: all end whole, meanwhile others get 503; nothing stays behind."""
    with serving(untrained, tmp_path, "--engine.slots=8") as server, ThreadPoolExecutor(16) as pool:
        expected = server.texts(**LONG_TEXT, seed=0)
        pid = server.engine_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        asked = begin(pool, server, 16)
        server.process.send_signal(number)
        wait_until(lambda: server.health()["status"] == "draining")
        refused = server.complete(prompt="a")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        os.kill(pid, signal.SIGCONT)
        assert server.process.wait(WAIT) == code
        whole = outcomes(asked)
        assert all(one.is_whole and one.finish == "length" and one.error is None for one in whole)
        assert whole[0].text == expected[0]
        assert state_of(pid) == "X"
        assert server.events("stopped")[0]["all_texts_ended"]


@pytest.mark.slow
def test_a_slow_reader_has_its_text_whole_when_the_server_is_told_to_end(untrained, tmp_path):
    """Megabytes that the engine has made and the client has not read go out within `timeouts.drain`."""
    body = {**LONG_TEXT, "max_tokens": 4000, "logprobs": 20, "stream": True}
    times = ["--limits.overflow=slide", "--timeouts.drain=5m", "--timeouts.write=5m"]
    with serving(untrained, tmp_path, *times) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(WAIT)
        client.connect(("127.0.0.1", server.port))
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data)
        wait_until(lambda: server.metric("generated_tokens_total") >= body["max_tokens"])
        server.process.send_signal(signal.SIGTERM)
        time.sleep(4)  # longer than a client that reads at once has
        end = b""
        while got := client.recv(1 << 16):
            end = (end + got)[-2000:]
        assert b"data: [DONE]" in end
        assert server.process.wait(WAIT) == 143
        assert server.events("stopped")[0]["all_texts_ended"]


@pytest.mark.slow
def test_a_text_that_does_not_end_in_time_is_cut_and_told_so(untrained, tmp_path):
    """After `timeouts.drain` a client gets an error event; a second signal ends the server at once."""
    for signals in (1, 2):
        drain = "--timeouts.drain=1s" if signals == 1 else "--timeouts.drain=10m"
        with serving(untrained, tmp_path / str(signals), drain) as server, ThreadPoolExecutor(4) as pool:
            pid = server.engine_pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            asked = begin(pool, server, 4)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: server.health()["status"] == "draining")
            if signals == 1:
                assert server.process.wait(WAIT) == 143
                assert all(one.error["code"] == "engine_unavailable" for one in outcomes(asked))
                assert not server.events("stopped")[0]["all_texts_ended"]
                assert state_of(pid) == "X"
            else:
                time.sleep(0.6)  # two within half a second are one
                assert server.terminate() == 143
                assert all(isinstance(one.exception(WAIT), httpx.HTTPError) for one in asked)
                os.kill(pid, signal.SIGCONT)
                wait_until(lambda pid=pid: state_of(pid) == "X")


@pytest.mark.slow
def test_a_web_process_that_is_killed_leaves_no_engine(untrained, tmp_path):
    """SIGKILL of the server while texts are made: the engine ends by itself."""
    with serving(untrained, tmp_path) as server, ThreadPoolExecutor(8) as pool:
        pid = server.engine_pid
        assert pid is not None
        asked = begin(pool, server, 8, max_tokens=120)
        server.process.kill()
        assert server.process.wait(WAIT) == -signal.SIGKILL
        wait_until(lambda: state_of(pid) in "ZX")
        for one in asked:
            one.exception(WAIT)
    assert not list(Path(tmp_path).glob("core*"))
