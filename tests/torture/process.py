"""Processes under torture: started by exec or by the zygote, watched through files, ended by signals."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TIMEOUT = 1200.0
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Surroundings:
    """What a process finds around it, besides its directory."""

    environment: dict[str, str] = field(default_factory=dict)
    umask: int | None = None
    max_file_bytes: int | None = None
    user: int | None = None


class Child:
    """A started process, its stdout and stderr in files."""

    def __init__(self, pid: int, poll: Callable[[], int | None], stdout: Path, stderr: Path) -> None:
        self.pid, self._poll, self._stdout, self._stderr = pid, poll, stdout, stderr
        self._code: int | None = None
        self._size, self._records = -1, list[dict[str, Any]]()

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while the process lives."""
        if self._code is None:
            self._code = self._poll()
        return self._code

    def wait(self, seconds: float = TIMEOUT) -> int:
        """Return the exit code; a process that does not end in time is killed."""
        if not self.wait_until(lambda: False, seconds, pause=0.005):
            self.signal(signal.SIGKILL)
            raise AssertionError(f"process {self.pid} did not end within {seconds} s: {self.stderr}")
        code = self.poll()
        assert code is not None
        return code

    def wait_until(self, happened: Callable[[], bool], seconds: float = TIMEOUT, *, pause: float = 0.002) -> bool:
        """Wait for something to happen or the process to end, looking after each `pause`; False: neither did."""
        end, next_poll = time.monotonic() + seconds, 0.0
        while (now := time.monotonic()) < end:
            if happened():
                return True
            if now >= next_poll:  # to ask a zygote takes longer than a look at a file
                if self.poll() is not None:
                    return True
                next_poll = now + 0.01
            time.sleep(pause)
        return False

    def signal(self, number: int) -> None:
        """Send a signal, if the process has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> bool:
        """End the process by SIGKILL; False: it had ended by itself."""
        self.signal(signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return self._stdout.read_text(encoding="utf-8", errors="replace") if self._stdout.exists() else ""

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return self._stderr.read_text(encoding="utf-8", errors="replace") if self._stderr.exists() else ""

    @property
    def records(self) -> list[dict[str, Any]]:
        """The whole JSON lines on stdout so far."""
        size = self._stdout.stat().st_size if self._stdout.exists() else 0
        if size != self._size:
            lines = self.stdout.split("\n")[:-1]
            self._size, self._records = size, [json.loads(line) for line in lines if line.startswith("{")]
        return self._records


class Exec:
    """Starts `python ARGUMENTS` anew, with a prefix such as strace where one is given."""

    def __init__(self, arguments: Sequence[str], *, prefix: Sequence[str] = ()) -> None:
        self._command = [*prefix, sys.executable, *arguments]

    def start(self, arguments: Sequence[str], home: Path, around: Surroundings, files: tuple[Path, Path]) -> Child:
        """Start the process in `home`, its stdout and stderr going to `files`."""

        def prepare() -> None:
            if around.max_file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (around.max_file_bytes, resource.RLIM_INFINITY))

        with files[0].open("wb") as stdout, files[1].open("wb") as stderr:
            process = subprocess.Popen(
                [*self._command, *arguments],
                cwd=home,
                env=_environment(around),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                umask=-1 if around.umask is None else around.umask,
                user=around.user,
                group=around.user,
                preexec_fn=prepare,
            )
        return Child(process.pid, process.poll, *files)


class Zygote:
    """Starts `python -m MODULE ARGUMENTS` by forking a process that has imported the libraries."""

    def __init__(self, module: str, libraries: Sequence[str]) -> None:
        self._module = module
        script = Path(__file__).with_name("zygote.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), *libraries],
            env=_environment(Surroundings()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        arguments: Sequence[str],
        home: Path,
        around: Surroundings,
        files: tuple[Path, Path],
        *,
        module: str | None = None,
    ) -> Child:
        """Start the process in `home`, its stdout and stderr going to `files`."""
        request = {
            "module": module or self._module,
            "arguments": list(arguments),
            "cwd": str(home),
            "stdout": str(files[0]),
            "stderr": str(files[1]),
            **asdict(around),
        }
        pid = self._ask({"start": request})["pid"]
        return Child(pid, lambda: self._ask({"poll": pid})["code"], *files)

    def close(self) -> None:
        """End the zygote; its children have ended."""
        self._process.communicate()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _environment(around: Surroundings) -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRANSFORMERLM_", "COV_"))}
    return {**kept, **own, **around.environment}
