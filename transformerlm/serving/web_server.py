"""The web server: uvicorn with our application, our deadlines, and no handling of signals of its own."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from config.schemas import duration_seconds
from config.serve import ServeConfig
from transformerlm.serving.app import build_app
from transformerlm.serving.deadlines import Deadlines, protocol_of
from transformerlm.serving.engine import Engine
from transformerlm.serving.served import Served, Tell

_KEEP_ALIVE_SECONDS = 60  # longer than clients keep a connection, or they would write into a closed one
_CLOSE_SECONDS = 2  # for answers on their way after the last text has ended, at the least


class WebServer(uvicorn.Server):
    """uvicorn's server, which leaves signals to the command that runs it."""

    has_sent_all = False
    """Whether all answers had gone out when it ended."""

    def end(self, seconds: float) -> None:
        """Begin to end; for so long, and no less than a moment, answers on their way may still go out."""
        self.config.timeout_graceful_shutdown = max(_CLOSE_SECONDS, math.ceil(seconds))
        self.should_exit = True

    async def _wait_tasks_to_complete(self) -> None:
        await super()._wait_tasks_to_complete()  # cancelled when the time is up
        self.has_sent_all = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take over no signals."""
        yield


def make_server(config: ServeConfig, engine: Engine, *, key: str | None, tell: Tell) -> tuple[WebServer, Served]:
    """Return the server and what its routes share; arguments as those of `build_app`."""
    # A client's nonsense is no news, nor is a stream that the end of the server cuts; the guard tells of our mistakes.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    app = build_app(config, engine, key=key, tell=tell)
    deadlines = Deadlines(
        headers=duration_seconds(config.timeouts.headers),
        body=duration_seconds(config.timeouts.body),
        write=duration_seconds(config.timeouts.write),
        connections=config.limits.connections,
    )
    settings = uvicorn.Config(
        app,
        http=protocol_of(deadlines, app.state.served.rejected),
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )
    return WebServer(settings), app.state.served
