"""What the tests of serving share: a run of tiny checkpoints, a server's configuration, and an engine to talk to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from config.serve import ServeConfig
from tests.checkpoints.helpers import make_snapshot
from tests.training.tiny_run import TinyFiles
from transformerlm.checkpoints.save import save_checkpoint
from transformerlm.serving.engine import Piece, TextRequest, TextStream
from transformerlm.serving.engine_client import EngineClient
from transformerlm.serving.engine_link import COMMAND
from transformerlm.serving.protocol import Settings

LONG = 60.0
"""Seconds that a test waits at most for what comes at once on a quiet machine."""


def tiny_checkpoint(run: Path, files: TinyFiles, step: int = 1, changes: dict | None = None) -> Path:
    """Save a checkpoint of a tiny model, with other weights for each step, and return its directory."""
    return save_checkpoint(run / "checkpoints", step, make_snapshot(files, changes, steps=step))


def serve_config(checkpoint: Path, changes: dict[str, Any] | None = None) -> ServeConfig:
    """Return a server's configuration, with dotted keys changed."""
    tree: dict[str, Any] = {"checkpoint": str(checkpoint), "device": "cpu", "threads": 1}
    tree["engine"] = {"slots": 4, "prefill_chunk": 16, "prefix_cache_mb": 1}
    for name, value in (changes or {}).items():
        *sections, leaf = name.split(".")
        table = tree
        for section in sections:
            table = table.setdefault(section, {})
        table[leaf] = value
    return ServeConfig.model_validate(tree)


def engine_settings(checkpoint: Path, **changes: Any) -> Settings:
    """Return the settings of an engine process for tiny models."""
    defaults = {"device": "cpu", "precision": "fp32", "threads": None, "slots": 4, "prefill_chunk": 16}
    more = {"prefix_cache_mb": 1, "reproducible": True, "follow": "none", "interval": 0.05}
    return Settings(**{"checkpoint": str(checkpoint), **defaults, **more, **changes})  # type: ignore[arg-type]


@asynccontextmanager
async def running(
    checkpoint: Path, changes: dict[str, Any] | None = None, *, command: Sequence[str] = COMMAND
) -> AsyncIterator[EngineClient]:
    """Give a client whose engine has started, and end both."""
    client = EngineClient(serve_config(checkpoint, changes), checkpoint, command=command)
    try:
        await asyncio.wait_for(client.start(), LONG)
        yield client
    finally:
        await client.close()


def request(name: str, **changes: Any) -> TextRequest:
    """Return a request for eight tokens after two."""
    return TextRequest(**{"request_id": name, "prompt": [40, 41], "max_tokens": 8, "seed": 1, **changes})


async def read(stream: TextStream) -> list[Piece]:
    """Return all pieces of a text."""
    return [piece async for piece in stream]


async def until(condition: Callable[[], object], seconds: float = LONG) -> None:
    """Wait until a condition holds."""

    async def look() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(look(), seconds)
