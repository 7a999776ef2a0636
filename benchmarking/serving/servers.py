"""Servers in processes of their own: how they are started, what CPU time they take, what ours tells of itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_START_SECONDS = 300.0
_END_SECONDS = 30.0


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str
    pid: int

    def cpu_seconds(self) -> float | None:
        """Return the CPU seconds that its processes have taken; None where the system does not tell (not Linux)."""
        try:
            return sum(_cpu_seconds(pid) for pid in [self.pid, *_children(self.pid)])
        except OSError:
            return None

    def metrics(self) -> dict[str, float]:
        """Return the numbers of /metrics that have no labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#") and "{" not in line)
        return {name: float(value) for name, value in pairs}


@contextmanager
def started(command: Sequence[str], folder: Path, *, name: str) -> Iterator[Server]:
    """Start a server whose stdout has a JSON line with its `url`; end it with the block.

    Its stdout and stderr are files of `folder`, since a pipe that nobody reads would stop it.

    Raises:
        ValueError: it ended, or did not answer in time; the message has the end of what it said.
    """
    out, err = folder / f"{name}.out", folder / f"{name}.err"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr)
    try:
        yield Server(_wait_for_url(process, out, err, name=name), process.pid)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def our_command(checkpoint: Path, settings: Mapping[str, Any]) -> list[str]:
    """Return the command that serves a checkpoint on a free port, with dotted keys set."""
    overrides = [f"--{key}={_toml(value)}" for key, value in settings.items() if value is not None]
    return [sys.executable, "-m", "cli.serve", "--checkpoint", str(checkpoint.absolute()), "--port=0", *overrides]


def llama_command(model: Path, *, slots: int, threads: int, context_length: int) -> list[str]:
    """Return the command that serves a GGUF file by llama.cpp."""
    numbers = [str(slots), str(threads), str(context_length)]
    return [sys.executable, "-m", "benchmarking.peers.llama_server", str(model), *numbers]


def _toml(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _wait_for_url(process: subprocess.Popen[bytes], out: Path, err: Path, *, name: str) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        for line in out.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            if line.startswith("{") and line.endswith("\n") and '"url"' in line:
                return str(json.loads(line)["url"])
        if process.poll() is not None:
            break
        time.sleep(0.1)
    said = err.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise ValueError(f"{name}: the server did not start (exit code {process.poll()}): {said}")


def _cpu_seconds(pid: int) -> float:
    """Return user and system time of a process, its ended children not included (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]
