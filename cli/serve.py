"""`transformerlm-serve`: a checkpoint in, OpenAI's completions and chat API and a page out."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.serve")

import asyncio
import errno
import gc
import os
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from cli.entry import STOP_CODES, leave
from cli.event_lines import EventLines
from cli.terminal import note, working
from cli.utils import Command
from cli.utils import main as run_command
from config.extras import how_to_install
from config.schemas import duration_seconds
from config.serve import ServeConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformerlm.serving.engine import Engine
    from transformerlm.serving.served import Served

# What --help shows.
SHORT = (
    "checkpoint",
    "host",
    "port",
    "device",
    "engine.slots",
    "limits.overflow",
    "access.key_env",
    "follow.checkpoint",
)
EXAMPLES = (
    ("serve a run; Ctrl-C ends", "--checkpoint runs/first"),
    ("a small model, for clients that ask for long texts", "--checkpoint runs/first --limits.overflow=slide"),
    ("take over each new checkpoint of a run that is training", "--checkpoint runs/first --follow.checkpoint=newest"),
)
# A group of processes and each of them may be sent the same signal: that is one request to end.
_TWICE_SECONDS = 0.5


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-serve", ServeConfig, serve, short=SHORT, examples=EXAMPLES), argv)


def serve(config: ServeConfig) -> int:
    """Serve until a signal ends it, and return the exit code."""
    key = _key_of(config)
    with working("starting"):
        try:
            from transformerlm.serving import web_server  # noqa: F401
            from transformerlm.serving.engine_client import EngineClient
        except ModuleNotFoundError as error:
            if error.name not in ("starlette", "uvicorn", "h11", "prometheus_client"):
                raise
            raise ImportError(f"transformerlm-serve needs {error.name}: {how_to_install('serve')}") from None
    with _listening(config) as sockets:
        events = EventLines()
        try:
            return asyncio.run(_serve(config, EngineClient(config, config.checkpoint), key, sockets, events))
        finally:
            events.close()


def _key_of(config: ServeConfig) -> str | None:
    """Return the key that requests must bring; None: none is needed.

    Raises:
        ValueError: the environment has none.
    """
    name = config.access.key_env
    if name is None:
        return None
    key = os.environ.get(name)
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        found = "no such variable" if key is None else "an empty one" if not key else "characters that no header takes"
        raise ValueError(
            f"access.key_env: expected a key in the environment variable {name}, found {found}; make one, for example, "
            f"by export {name}=$(python -c 'import secrets; print(secrets.token_urlsafe())')"
        )
    return key


@contextmanager
def _listening(config: ServeConfig) -> Iterator[list[socket.socket]]:
    """Give the socket that connections come to.

    Raises:
        ValueError: it cannot be had; the message says why.
    """
    host, port = config.host.strip("[]"), config.port
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ValueError(f"host: expected an address of this machine, found {host} ({error.strerror})") from None
    with socket.socket(family, kind, number) as listener:
        if os.name == "posix":  # a port is free again at once when the server before has ended
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except PermissionError:
            raise ValueError(f"port: expected one that this user may use (1024 or more), found {port}") from None
        except OSError as error:
            taken = "another program uses it; --port=0 takes any free one"
            why = taken if error.errno == errno.EADDRINUSE else error.strerror
            raise ValueError(f"port: cannot listen on {host}:{port}: {why}") from None
        listener.setblocking(False)
        yield [listener]


def _url_of(config: ServeConfig, sockets: Sequence[socket.socket]) -> str:
    host = config.host if config.host.startswith("[") or ":" not in config.host else f"[{config.host}]"
    return f"http://{host}:{sockets[0].getsockname()[1]}"


async def _serve(
    config: ServeConfig, engine: Engine, key: str | None, sockets: list[socket.socket], events: EventLines
) -> int:
    """Run the web server and the engine until a signal, and return the exit code.

    Raises:
        ValueError: the checkpoint cannot be served.
    """
    from transformerlm.serving.web_server import make_server

    server, served = make_server(config, engine, key=key, tell=events.tell)
    stopping = _Stopping()
    url = _url_of(config, sockets)
    web = asyncio.create_task(server.serve(sockets=sockets))
    loading = asyncio.create_task(_load(engine, served, url, events))
    stop = asyncio.create_task(stopping.first.wait())
    drain = duration_seconds(config.timeouts.drain)
    with stopping.signals():
        try:
            await asyncio.wait({web, loading, stop}, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                await asyncio.wait({web, stop}, return_when=asyncio.FIRST_COMPLETED)
            if web.done():
                web.result()
                raise RuntimeError("the web server ended by itself")
            note(f"{stopping.name}: texts on their way end first; once more ends at once")
            all_ended = await engine.drain(drain)
        finally:
            loading.cancel()
            stop.cancel()
            await engine.close()
            server.end(stopping.at + drain - time.monotonic())  # slow clients may have much to read yet
            await asyncio.wait({web, loading, stop})
    events.tell("stopped", {"signal": stopping.name, "all_texts_ended": all_ended and server.has_sent_all})
    return STOP_CODES[stopping.name]


async def _load(engine: Engine, served: Served, url: str, events: EventLines) -> None:
    """Start the engine, and say when texts can be asked for."""
    with working("loading the model"):
        await engine.start()
        while True:
            try:
                served.load_tokenizer()
                break
            except OSError as error:
                # A training may have removed this checkpoint just now; the next one is taken over soon.
                if served.config.follow.checkpoint == "none":
                    raise ValueError(
                        f"checkpoint: expected {served.facts().path} to stay as it was when loading began, found that "
                        f"it changed ({error}); start again, or follow the training with --follow.checkpoint=newest"
                    ) from None
                await asyncio.sleep(duration_seconds(served.config.follow.interval))
    gc.freeze()  # to look at all that was imported for garbage takes some ten milliseconds, for which texts would wait
    facts = served.facts()
    loss = "" if facts.val_loss is None else f", val loss {facts.val_loss:.3f}"
    note(f"{url}  {served.name}: step {facts.step:,}{loss}; Ctrl-C ends")
    events.tell(
        "serving",
        {
            "url": url,
            "model": served.name,
            "checkpoint": facts.path,
            "step": facts.step,
            "system_fingerprint": facts.fingerprint,
        },
    )


class _Stopping:
    """The signals that end the server: the first one asks for its end, the second one is its end."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.name = ""
        self.at = 0.0
        self._loop = asyncio.get_running_loop()

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Handle them; what was ignored before, as in what a shell starts in the background, stays so."""
        numbers = [one for one in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(one) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.name and time.monotonic() - self.at < _TWICE_SECONDS:
            return
        if self.name:
            leave(f"{name}: ended at once", STOP_CODES[name])
        self.name, self.at = name, time.monotonic()
        self._loop.call_soon_threadsafe(self.first.set)
