"""The web side with the fake engine, for tests: in this process by itself, or behind a real socket."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette

from config.serve import ServeConfig
from tests.serving.fake_engine import FakeEngine, write_checkpoint
from transformerlm.serving.app import build_app
from transformerlm.serving.web_server import WebServer, make_server

WAIT = 60.0  # seconds, for what comes at once unless the machine is busy


@dataclass(kw_only=True)
class Web:
    """A server that a test asks."""

    config: ServeConfig
    engine: FakeEngine
    client: httpx.AsyncClient
    app: Starlette
    events: list[dict[str, Any]]
    port: int = 0
    server: WebServer | None = None

    async def complete(self, **body: Any) -> httpx.Response:
        """Ask for completions."""
        return await self.client.post("/v1/completions", json=body)

    async def choices(self, **body: Any) -> list[dict[str, Any]]:
        """Return the choices of an answer that must be right."""
        answer = await self.complete(**body)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["choices"])

    async def chunks(self, **body: Any) -> list[dict[str, Any]]:
        """Return the events of a streamed answer, without the last one, which says that it is whole."""
        answer = await self.complete(stream=True, **body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


def settings(**sections: Any) -> ServeConfig:
    """Return a configuration with some keys set."""
    return ServeConfig.model_validate({"checkpoint": "runs/tiny", **sections})


def run(
    tmp_path: Path,
    test: Callable[[Web], Awaitable[None]],
    *,
    over_network: bool = False,
    key: str | None = None,
    sections: dict[str, Any] | None = None,
    **engine: Any,
) -> None:
    """Run a test with a server that is ready."""

    async def whole() -> None:
        fake = FakeEngine(write_checkpoint(tmp_path), **engine)
        config = settings(**(sections or {}))
        async with asyncio.timeout(2 * WAIT), (_real if over_network else _within)(config, fake, key) as web:
            await test(web)

    asyncio.run(whole())


@asynccontextmanager
async def _within(config: ServeConfig, engine: FakeEngine, key: str | None) -> AsyncIterator[Web]:
    events: list[dict[str, Any]] = []
    app = build_app(config, engine, key=key, tell=lambda event, facts: events.append({"event": event, **facts}))
    await engine.start()
    app.state.served.load_tokenizer()
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=WAIT) as client:
        yield Web(config=config, engine=engine, client=client, app=app, events=events)


@asynccontextmanager
async def _real(config: ServeConfig, engine: FakeEngine, key: str | None) -> AsyncIterator[Web]:
    events: list[dict[str, Any]] = []
    server, served = make_server(
        config, engine, key=key, tell=lambda event, facts: events.append({"event": event, **facts})
    )
    await engine.start()
    served.load_tokenizer()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)  # what a client does not read is soon noticed
        port = listener.getsockname()[1]
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.005)
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=WAIT, verify=False) as client:
                app = server.config.app
                assert isinstance(app, Starlette)
                yield Web(config=config, engine=engine, client=client, app=app, events=events, port=port, server=server)
        finally:
            server.should_exit = True
            await task


async def until(is_true: Callable[[], bool]) -> None:
    """Wait for something that comes soon."""
    async with asyncio.timeout(WAIT):
        while not is_true():
            await asyncio.sleep(0.005)
