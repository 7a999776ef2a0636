"""What the page reads of the runs below a directory; nothing here writes, and a name is looked up in the listing.

    GET /api/runs                           {"runs": [RunSummary, ...]}, the one that changed last first
    GET /api/run?run=NAME                   {"name", "config": {dotted key: value}, "checkpoints": [step, ...],
                                             "defaults": {dotted key: value}}
    GET /api/lines?run=NAME                 the lines of its metrics.jsonl from the beginning, about 1 MB of them:
        &file=F&offset=N&every=K            those behind the place that the last answer gave
        {"file", "offset", "every", "reset", "bad", "more", "lines": [record, ...]}
    GET /api/differences?run=A&run=B...     {"differences": {dotted key: {run: value}}}
    GET /api/events                         server-sent events: `grown` {"runs": [NAME, ...]}, lines or state changed,
                                            and `model` {"step", "fingerprint"}, when another checkpoint is served

`reset` says that the run has replaced its lines (it was resumed): drop those that were read before. Of a long file only
each `every`-th step line is sent; events and validations are all there.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from transformerlm.experiments.metric_lines import METRICS, read_lines
from transformerlm.experiments.run_directories import RunDirectories, config_differences, config_of
from transformerlm.experiments.settings import named_defaults
from transformerlm.serving.errors import ApiError, JsonAnswer
from transformerlm.serving.served import Served

LOOK_SECONDS = 1.0
_SILENCE_SECONDS = 15.0  # after which a comment is sent, so that a client that has left is noticed
_MOST_COMPARED = 32


def routes(runs_dir: Path) -> list[Route]:
    """Return the routes over the runs below `runs_dir`."""
    api = _RunsApi(runs_dir)
    return [
        Route("/api/runs", api.runs, methods=["GET"]),
        Route("/api/run", api.run, methods=["GET"]),
        Route("/api/lines", api.lines, methods=["GET"]),
        Route("/api/differences", api.differences, methods=["GET"]),
        Route("/api/events", api.events, methods=["GET"]),
    ]


class _RunsApi:
    def __init__(self, runs_dir: Path) -> None:
        self._directories = RunDirectories(runs_dir)
        self._watch = _Watch(self._directories)

    async def runs(self, request: Request) -> Response:
        """Answer the list of runs."""
        summaries = await run_in_threadpool(self._directories.summaries)
        return JsonAnswer({"runs": [asdict(one) for one in summaries]})

    async def run(self, request: Request) -> Response:
        """Answer a run's configuration and checkpoints."""
        name = _one(request, "run")

        def read() -> dict[str, Any]:
            directory = self._directory(name)
            steps = sorted(
                int(path.name[5:]) for path in directory.glob("checkpoints/step-*") if path.name[5:].isdecimal()
            )
            config = config_of(directory)
            return {"name": name, "config": config, "defaults": named_defaults(), "checkpoints": steps}

        return JsonAnswer(await run_in_threadpool(read))

    async def lines(self, request: Request) -> Response:
        """Answer the lines behind a place."""
        name, file = _one(request, "run"), request.query_params.get("file", "")[:64]
        offset, every = _number(request, "offset"), _number(request, "every")

        def read() -> bytes:
            path = self._directory(name) / METRICS
            try:
                found = read_lines(path, file=file, offset=offset, every=every)
            except OSError as error:
                raise ApiError(404, f"run {name[:80]!r} cannot be read: {error.strerror}", param="run") from None
            head = asdict(found)
            texts = head.pop("texts")
            # The lines are JSON already.
            return f'{json.dumps(head)[:-1]}, "lines": [{",".join(texts)}]}}'.encode()

        return Response(await run_in_threadpool(read), media_type="application/json")

    async def differences(self, request: Request) -> Response:
        """Answer in which keys the configurations of runs differ."""
        names = request.query_params.getlist("run")
        if not 2 <= len(names) <= _MOST_COMPARED:
            raise ApiError(400, f"expected 2 to {_MOST_COMPARED} runs as run=NAME, found {len(names)}", param="run")

        def read() -> dict[str, Any]:
            return config_differences({name: config_of(self._directory(name)) for name in names})

        return JsonAnswer({"differences": await run_in_threadpool(read)})

    async def events(self, request: Request) -> Response:
        """Answer with events until the client leaves or the server ends."""
        served: Served = request.app.state.served
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        if request.method == "HEAD":
            return Response(headers=headers, media_type="text/event-stream")
        return StreamingResponse(self._watch.events(served), media_type="text/event-stream", headers=headers)

    def _directory(self, name: str) -> Path:
        path = self._directories.paths().get(name)
        if path is None:
            raise ApiError(404, f"there is no run {name[:80]!r} here; GET /api/runs lists them", param="run")
        return path


class _Watch:
    """Looks for changes once for all listeners, while there are any."""

    def __init__(self, directories: RunDirectories) -> None:
        self._directories = directories
        self._listeners: set[asyncio.Queue[set[str]]] = set()
        self._task: asyncio.Task[None] | None = None

    async def events(self, served: Served) -> AsyncIterator[str]:
        """Yield server-sent events."""
        queue: asyncio.Queue[set[str]] = asyncio.Queue()
        self._listeners.add(queue)
        if self._task is None:
            self._task = asyncio.create_task(self._look())
        fingerprint, silent = "", 0.0
        try:
            while served.status.state != "draining":
                facts = served.status.facts
                if facts is not None and facts.fingerprint != fingerprint:
                    fingerprint = facts.fingerprint
                    yield _event("model", {"step": facts.step, "fingerprint": fingerprint})
                try:
                    grown = await asyncio.wait_for(queue.get(), LOOK_SECONDS)
                except TimeoutError:
                    silent += LOOK_SECONDS
                    if silent >= _SILENCE_SECONDS:
                        silent = 0.0
                        yield ": nothing new\n\n"
                    continue
                silent = 0.0
                yield _event("grown", {"runs": sorted(grown)})
        finally:
            self._listeners.discard(queue)
            if not self._listeners and self._task is not None:
                self._task.cancel()
                self._task = None

    async def _look(self) -> None:
        before = await run_in_threadpool(self._directories.sizes)
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                now = await run_in_threadpool(self._directories.sizes)
            except OSError:  # gone for a moment, as over a network
                continue
            grown = {name for name in now.keys() | before.keys() if now.get(name) != before.get(name)}
            before = now
            for queue in self._listeners if grown else ():
                queue.put_nowait(grown)


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _one(request: Request, key: str) -> str:
    values = request.query_params.getlist(key)
    if len(values) != 1:
        raise ApiError(400, f"expected one {key}, found {len(values)}", param=key)
    return values[0]


def _number(request: Request, key: str) -> int:
    text = request.query_params.get(key, "0")
    if not (text.isascii() and text.isdecimal() and len(text) <= 15):
        raise ApiError(400, f"{key}: expected a whole number of at least 0, found {text[:20]!r}", param=key)
    return int(text)
