"""`transformerlm-serve` as a process of its own, for tests that ask it as its users do, and that break it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from config.io import dump_toml
from tests.training.tiny_run import TinyFiles, tiny_config
from transformerlm.checkpoints.save import Snapshot, save_checkpoint
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer import Tokenizer
from transformerlm.training.optim import AdamW, parameter_groups

ROOT = Path(__file__).parents[2]
WAIT = 300.0  # seconds, for what takes a second unless the machine is busy
CONTEXT = 128
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def save_random_model(
    run: Path,
    files: TinyFiles,
    *,
    step: int = 1,
    sharpness: float = 8.0,
    changes: dict[str, Any] | None = None,
    state: dict[str, Any] | None = None,
) -> Path:
    """Save a checkpoint of a model that nobody trained, and return the run; another step has other weights.

    `state` is what its `state.json` has besides. `sharpness` multiplies its logits: with 1 all tokens are about as
    likely as each other.
    """
    torch.manual_seed(step)
    config = tiny_config(files, run.parent, {"model.context_length": CONTEXT, **(changes or {})})
    model = TransformerLM(**config.model.model_dump())
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    optimizer = AdamW(parameter_groups(model, weight_decay=0.1), 1e-2)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tokenizer = Tokenizer.from_directory(files.tokenizer)
    snapshot = Snapshot.of(
        model, optimizer, tokenizer, config_toml=dump_toml(config), state={"tokens": 7, **(state or {})}
    )
    save_checkpoint(run / "checkpoints", step, snapshot)
    return run


@dataclass(frozen=True)
class Server:
    """A running server; what it writes is in files, so that it never waits for a reader."""

    process: subprocess.Popen[bytes]
    url: str
    folder: Path

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.url.rpartition(":")[2])

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return (self.folder / "stderr").read_text(encoding="utf-8", errors="replace")

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return the events that it has told so far: all, or those of one name."""
        whole = (self.folder / "stdout").read_text(encoding="utf-8").rpartition("\n")[0]
        events = [json.loads(line) for line in whole.splitlines()]
        return [event for event in events if name in (None, event["event"])]

    @property
    def engine_pid(self) -> int | None:
        """The number of its engine's process; None: there is none now."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        living = [int(one) for one in children if state_of(int(one)) not in "ZX"]
        assert len(living) < 2, living
        return living[0] if living else None

    def get(self, path: str, **more: Any) -> httpx.Response:
        """Ask for a path."""
        return httpx.get(self.url + path, timeout=WAIT, verify=False, **more)  # no TLS: its certificates take time

    def health(self) -> dict[str, Any]:
        """Return what /health says, with its status as `code`."""
        answer = self.get("/health")
        return answer.json() | {"code": answer.status_code}

    def complete(self, **body: Any) -> httpx.Response:
        """Ask for completions."""
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=WAIT, verify=False)

    def chat(self, **body: Any) -> httpx.Response:
        """Ask for an answer."""
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=WAIT, verify=False)

    def texts(self, **body: Any) -> list[str]:
        """Return the texts of an answer that must be right."""
        answer = self.complete(**body)
        assert answer.status_code == 200, answer.text
        return [choice["text"] for choice in answer.json()["choices"]]

    def metric(self, name: str) -> float:
        """Return one number of /metrics, by its name and labels."""
        lines = self.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"transformerlm_{name} "))

    def wait_until_idle(self, seconds: float = WAIT) -> None:
        """Wait until nothing runs and nothing waits."""
        wait_until(lambda: (now := self.health())["running"] + now["waiting"] == 0, seconds)

    def terminate(self) -> int:
        """Send SIGTERM, and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT)


@contextmanager
def serving(run: Path, folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """Give a server of a run that makes tokens; it is killed at the end, if it has not ended by then."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "cli.serve", f"--checkpoint={run}", "--port=0", "--device=cpu", *arguments]
    if not any(one.startswith("--threads") for one in arguments):
        command.append("--threads=1")
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(command, env=ENVIRONMENT | (environment or {}), stdout=out, stderr=err, cwd=folder)
    server = Server(process, "", folder)
    try:
        wait_until(lambda: server.events("serving") or process.poll() is not None)
        assert process.poll() is None, server.stderr
        yield Server(process, server.events("serving")[0]["url"], folder)
    finally:
        process.kill()
        process.wait(WAIT)


def infer_texts(run: Path, prompts: Sequence[str], *arguments: str) -> list[str]:
    """Return the texts of `transformerlm-infer`, in order."""
    command = [sys.executable, "-P", "-m", "cli.infer", f"--checkpoint={run}", "--device=cpu", "--output.format=json"]
    done = subprocess.run(
        [*command, *arguments, "--prompt", *prompts], env=ENVIRONMENT, capture_output=True, timeout=WAIT, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line)["text.output"] for line in done.stdout.splitlines()]


def wait_until(happened: Callable[[], object], seconds: float = WAIT) -> None:
    """Wait until something has happened."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.02)


async def until(happened: Callable[[], object], seconds: float = WAIT) -> None:
    """Wait until something has happened, while other tasks go on."""
    async with asyncio.timeout(seconds):
        while not happened():
            await asyncio.sleep(0.01)


def state_of(pid: int) -> str:
    """Return a process's state in the letters of proc(5); X: there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def memory_of(pid: int) -> int:
    """Return the bytes of memory that a process has now."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def descriptors_of(pid: int) -> int:
    """Return how many files and sockets a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def events_of(lines: Sequence[str]) -> list[dict[str, Any]]:
    """Return the events of a streamed answer, which must be whole, without the last one, which says so."""
    data = [line.removeprefix("data: ") for line in lines if line]
    assert data[-1] == "[DONE]", data
    return [json.loads(one) for one in data[:-1]]
