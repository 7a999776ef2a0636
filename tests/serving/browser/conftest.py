"""One real server, one real Chromium, and pages of it; skipped where playwright or Chromium is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.serving.browser.runs_of_lines import HOSTILE, write_run
from tests.serving.helpers import tiny_checkpoint
from tests.serving.web import Web, run, until
from tests.training.conftest import files  # noqa: F401 (a fixture)
from tests.training.tiny_run import TinyFiles

ARGUMENTS = (
    "--no-sandbox",  # tests may run as root
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
WAIT_MS = 60_000  # for what comes at once unless the machine is busy


@dataclass
class Site:
    """A server's address, and the directory whose runs its page shows."""

    url: str
    runs_dir: Path


@dataclass
class Seen:
    """What a page did that nobody sees on it."""

    messages: list[str] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)

    def of(self, path: str) -> list[Any]:
        """Return the requests to one path."""
        return [one for one in self.requests if re.match(r"https?://[^/]+" + re.escape(path) + r"($|\?)", one.url)]


# Playwright's loop runs as long as it does, and asyncio.run of other tests refuses to run beside it: so not "session".
def wait_until_drawn(page: Any) -> None:
    """Wait until a change is drawn: the page draws in the browser's next frame, and then a chart may be a new one."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def wait_until(page: Any, expression: str) -> None:
    """Wait until an expression is true, a minute at most; Playwright's own way is against the page's content policy."""
    for _ in range(600):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"{expression} did not become true")


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """Give a headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=chromium, args=list(ARGUMENTS))
        yield found
        found.close()


@pytest.fixture(scope="package")
def site(tmp_path_factory: pytest.TempPathFactory, files: TinyFiles, browser: Any) -> Iterator[Site]:  # noqa: F811
    """Give a server with a tiny model of two checkpoints, beside runs that are lines alone."""
    runs_dir = tmp_path_factory.mktemp("runs")
    for step in (1, 2):
        tiny_checkpoint(runs_dir / "tiny", files, step, {"model.context_length": 128})
    write_run(runs_dir / "first", steps=40)
    write_run(runs_dir / "second", steps=30, learning_rate=0.01)
    write_run(runs_dir / HOSTILE.replace("/", "-"), steps=5, note=HOSTILE)
    with serving_site(runs_dir / "tiny", tmp_path_factory.mktemp("log")) as found:
        yield found


@contextmanager
def serving_site(run: Path, log: Path) -> Iterator[Site]:
    """Give a server of a run."""
    command = [sys.executable, "-m", "cli.serve", f"--checkpoint={run}", "--port=0", "--device=cpu"]
    command += ["--threads=1", "--engine.slots=4", "--engine.prefill_chunk=16", "--engine.prefix_cache_mb=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    errors = (log / "stderr").open("w+")
    with errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            errors.seek(0)
            assert line, errors.read()
            yield Site(json.loads(line)["url"], run.parent)
        finally:
            server.terminate()
            server.communicate(timeout=60)


@contextmanager
def serving_fake(tmp_path: Path, **more: Any) -> Iterator[str]:
    """Give the address of a server with the fake engine, in a thread: playwright's loop is in this one."""
    ready, done, urls = threading.Event(), threading.Event(), []

    async def hold(web: Web) -> None:
        urls.append(f"http://127.0.0.1:{web.port}")
        ready.set()
        await until(done.is_set)

    server = threading.Thread(target=lambda: run(tmp_path, hold, over_network=True, **more))
    server.start()
    try:
        assert ready.wait(60)
        yield urls[0]
    finally:
        done.set()
        server.join()


@pytest.fixture
def seen() -> Seen:
    """What the page of this test says on the console and asks for."""
    return Seen()


@pytest.fixture
def new_page(browser: Any, seen: Seen) -> Iterator[Callable[..., Any]]:
    """Give a function that opens a page in a context of its own."""
    contexts: list[Any] = []

    def open_page(url: str, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("console", lambda message: seen.messages.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: seen.messages.append(f"error: {error}"))
        page.on("request", lambda request: seen.requests.append(request))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def page(site: Site, new_page: Callable[..., Any]) -> Any:
    """Give a page that knows its model."""
    found = new_page(site.url)
    found.wait_for_selector("#served:has-text('step 2')")
    return found
