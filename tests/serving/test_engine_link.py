"""One process as the web process sees it: how it ended, and lines of any length."""

from __future__ import annotations

import asyncio
import sys

import pytest

from tests.serving.helpers import engine_settings
from transformerlm.serving import engine_link
from transformerlm.serving.engine import Piece
from transformerlm.serving.engine_link import EngineLink
from transformerlm.serving.protocol import TOLD, Told


def start(tmp_path, code: str):
    """Start Python code in place of the engine."""
    return EngineLink.start(engine_settings(tmp_path), [sys.executable, "-c", code])


def test_the_process_finds_our_packages_first(tmp_path, monkeypatch):
    """A `config.py` on PYTHONPATH, which the command's own start has put behind ours, does not come back."""
    (tmp_path / "config.py").write_text("raise SystemExit('somebody else')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])

    async def ended() -> str:
        link = await start(tmp_path, "import config.commands")
        assert [told async for told in link] == []
        return await link.reason()

    assert asyncio.run(ended()) == "the engine ended with exit code 0"


def test_how_a_process_ended_is_known_after_many_kills(tmp_path, caplog):
    """A kill that comes when the process has just ended does not take its exit code away from asyncio."""

    async def kill() -> None:
        for _ in range(5):
            link = await start(tmp_path, "import time; time.sleep(3600)")
            for _ in range(3000):  # until long after its end
                link.kill()
            assert [told async for told in link] == []
            await link.close()
            assert "SIGKILL" in await link.reason()

    asyncio.run(kill())
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise SystemExit(3)", "the engine ended with exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by a signal (SIGSEGV)"),
        ("import os, time; os.close(1); time.sleep(3600)", "closed its output"),
    ],
)
def test_each_way_to_end_has_its_words(code, reason, tmp_path, monkeypatch):
    """An exit code, a signal, and a process that is still there but says nothing more."""
    monkeypatch.setattr(engine_link, "_SECONDS_TO_END", 0.2 if "close" in code else 60.0)

    async def end() -> str:
        link = await start(tmp_path, code)
        assert [told async for told in link] == []
        found = await link.reason()
        await link.close()
        return found

    assert reason in asyncio.run(end())


def test_lines_of_any_length_come_whole(tmp_path):
    """A line of log-probabilities may be longer than a pipe, and lines need not end where reads do."""
    messages = [Told(pieces=[("a", Piece(text="x" * size))]) for size in (1, 3_000_000, 0, 65_536)]
    (tmp_path / "lines").write_bytes(b"".join(map(TOLD.encode, messages)))
    code = f"import sys; sys.stdout.buffer.write(open({str(tmp_path / 'lines')!r}, 'rb').read())"

    async def read() -> list[Told]:
        link = await start(tmp_path, code)
        found = [told async for told in link]
        await link.close()
        return found

    assert asyncio.run(read()) == messages
