"""A hub on this machine, for tests: it serves files like the Hugging Face Hub, and fails when told to."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class HubServer(ThreadingHTTPServer):
    """Serves `files`, by their paths after `/resolve/main/`, and keeps a list of the requests.

    `faults` holds functions that are called with the handler, one for each GET, before the file is served; one that
    returns True has answered itself. Attributes switch what the hub says and does on and off.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.faults: list[Callable[[Any], bool]] = []
        self.head_faults: list[Callable[[Any], bool]] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.names_checksum, self.knows_ranges, self.names_etag = True, True, True

    @property
    def endpoint(self) -> str:
        """The address for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def seen(self, method: str) -> list[dict[str, str]]:
        """Return the headers of each request of a method."""
        return [headers for verb, _, headers in self.requests if verb == method]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing when a client hangs up."""


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._note()
        if self.server.head_faults and self.server.head_faults.pop(0)(self):
            return
        self._answer(body=False)

    def do_GET(self) -> None:
        self._note()
        if self.server.faults and self.server.faults.pop(0)(self):
            return
        self._answer(body=True)

    def _note(self) -> None:
        self.server.requests.append((self.command, self.path, dict(self.headers)))

    def content(self) -> bytes | None:
        """Return the file that is asked for."""
        return self.server.files.get(self.path.partition("/resolve/main/")[2])

    def _answer(self, *, body: bool) -> None:
        data = self.content()
        if data is None:
            self.reply(404)
            return
        etag = f'"{hashlib.md5(data).hexdigest()}-1"'
        headers = {"ETag": etag} if self.server.names_etag else {}
        if self.server.names_checksum:
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"'}
        start, status = 0, 200
        asked = self.headers.get("Range")
        if asked and self.server.knows_ranges and self.headers.get("If-Range", etag) == etag:
            start, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.reply(status, data[start:] if body else b"", headers | {"Content-Length": str(len(data) - start)})

    def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> bool:
        """Send a whole answer."""
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        return True


def cut_after(number: int) -> Callable[[Any], bool]:
    """Return a fault: the connection ends after this many bytes of the rest of the file."""

    def fault(handler: Any) -> bool:
        data, asked = handler.content(), handler.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and handler.server.knows_ranges else 0
        etag = f'"{hashlib.md5(data).hexdigest()}-1"'
        headers = {"Content-Length": str(len(data) - start), "ETag": etag}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return handler.reply(206 if start else 200, data[start : start + number], headers)

    return fault


def status(code: int, **headers: str) -> Callable[[Any], bool]:
    """Return a fault: an answer with this status; `retry_after` becomes `Retry-After`."""
    named = {name.replace("_", "-").title(): value for name, value in headers.items()}
    return lambda handler: handler.reply(code, headers=named)


def wrong_bytes(handler: Any) -> bool:
    """A fault: the right number of bytes, but the wrong ones."""
    size = len(handler.content())
    return handler.reply(200, b"x" * size, {"ETag": '"other"'})


def slowly(handler: Any) -> bool:
    """Not really a fault: the file in small pieces."""
    data = handler.content()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    for place in range(0, len(data), len(data) // 5 + 1):
        handler.wfile.write(data[place : place + len(data) // 5 + 1])
        handler.wfile.flush()
        time.sleep(0.02)
    return True


def silent(handler: Any) -> bool:
    """A fault: nothing comes after the headers, until the client has given up."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(handler.content())))
    handler.end_headers()
    handler.wfile.flush()
    handler.rfile.read(1)
    return True


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[HubServer]:
    """Run a server for these files in a thread."""
    server = HubServer(files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def as_the_hub(files: dict[str, bytes]) -> Iterator[HubServer]:
    """Run a server and make it the hub of this process."""
    with serving(files) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", server.endpoint)
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            patch.delenv(name, raising=False)
        yield server
