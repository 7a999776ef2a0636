"""What else happens to a run: signals, a second run in its directory, a full disk, numbers that are none."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cli.train import BRIEF_ECHO_SECONDS
from tests.torture.harness import Finding, Run, begun, compare, one_line_refusal, resumed_step, saved_steps, shown_steps
from tests.torture.process import Child, Surroundings

FOREVER = "--training.max_steps=1000000"


# --- signals -----------------------------------------------------------------------------------------------------


def stop_by_signal(run: Run, number: int, code: int, *, lines: int, reference: Run) -> list[Finding]:
    """Send a signal after some step lines: the last finished step is saved, and the run goes on from it."""
    child = run.start()
    child.wait_until(lambda: len(shown_steps(child)) >= lines)
    child.signal(number)
    found = child.wait()
    findings = [] if found == code else [Finding("wrong_exit_code", f"exit {found} after {number}, expected {code}")]
    last, saved = max(shown_steps(child)), max([0, *run.saved()])
    if saved != last or last not in saved_steps(child):
        findings.append(Finding("not_saved", f"stopped after step {last}, saved is {saved}"))
    return findings or run.finish() or compare(run, reference)


def stop_while_starting(run: Run, number: int, code: int, *, seed: int) -> list[Finding]:
    """Send a signal at a random moment of the start: the process ends by it, without a traceback.

    Python's own traceback is let pass before the command's first line, which cannot do anything about it.
    """
    rng, child = random.Random(seed), run.start(FOREVER)
    child.wait_until(lambda: False, rng.uniform(0.0, run.trainer.seconds / 2))
    child.signal(number)
    found = child.wait()
    by_signal = found in (code, -number)  # a shell shows both as the same number
    findings = [] if by_signal else [Finding("wrong_exit_code", f"exit {found} after {number} in the start")]
    if "Traceback" in child.stderr and ", in main\n" in child.stderr:
        findings.append(Finding("traceback", child.stderr[-1000:]))
    return findings


def stop_by_two_signals(run: Run, *slow: str) -> list[Finding]:
    """Send SIGTERM twice within a step that takes long, the second when it is no echo: it ends the process at once."""
    child = run.start(FOREVER, *slow)
    child.wait_until(begun(child))
    before, said = shown_steps(child), len(child.stderr)
    child.signal(signal.SIGTERM)
    child.wait_until(lambda: len(child.stderr) > said)
    time.sleep(BRIEF_ECHO_SECONDS + 0.5)
    child.signal(signal.SIGTERM)
    child.wait_until(lambda: len(shown_steps(child)) > len(before))
    if child.poll() is None:
        child.kill()
    if child.poll() != -signal.SIGTERM or len(shown_steps(child)) > len(before):
        return [Finding("second_signal_ignored", f"exit {child.poll()}, went on to step {shown_steps(child)[-1]}")]
    return []


# --- two runs ----------------------------------------------------------------------------------------------------


def start_twice(run: Run) -> list[Finding]:
    """Start a second process on the run: it is refused and told who is there; a killed holder holds nothing."""
    holder = run.start(FOREVER)
    holder.wait_until(begun(holder))
    second = run.start(FOREVER)
    second.wait_until(begun(second))
    if begun(second)():
        findings = [Finding("two_runs", "a second run trains in the same directory")]
        second.kill()
    else:
        findings = one_line_refusal(second, naming=str(holder.pid))
    lines = len(shown_steps(holder))
    holder.wait_until(lambda: len(shown_steps(holder)) > lines)
    if not holder.kill():
        findings.append(Finding("two_runs", f"the first run ended: {holder.stderr[-500:]}"))
    third = run.start(FOREVER)
    third.wait_until(begun(third))
    if not third.kill():
        findings.append(Finding("stale_lock", third.stderr[-500:]))
    return findings


# --- a full disk -------------------------------------------------------------------------------------------------


def meet_a_size_limit(run: Run, *, max_file_bytes: int, reference: Run) -> list[Finding]:
    """Let a save fail because its files may not grow: one line, nothing lost, and the next start goes on."""
    return _fail_to_save(
        run, lambda: run.start(around=Surroundings(max_file_bytes=max_file_bytes)), lambda: None, reference
    )


def meet_a_full_disk(run: Run, *, reference: Run) -> list[Finding]:
    """Fill the run's file system while it trains: one line, nothing lost, and the next start goes on."""
    ballast = run.home / "ballast"

    def start() -> Child:
        child = run.start()
        child.wait_until(lambda: bool(saved_steps(child)))
        fill(ballast)
        return child

    return _fail_to_save(run, start, ballast.unlink, reference)


def fill(ballast: Path) -> None:
    """Write a file until the file system is full."""
    with suppress(OSError), ballast.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def _fail_to_save(run: Run, start: Callable[[], Child], mend: Callable[[], object], reference: Run) -> list[Finding]:
    first = run.start()
    first.wait_until(lambda: len(saved_steps(first)) >= 2)
    first.kill()
    before = max(saved_steps(first))
    child = start()
    findings = one_line_refusal(child, naming="runs", codes=(1,))
    announced = max([before, *saved_steps(child)])
    if max([0, *run.saved()]) < announced:
        findings.append(Finding("announced_lost", f"step {announced}, on disk are {list(run.saved())}"))
    if run.temporaries():
        findings.append(
            Finding("stale_temporaries", f"{[path.name for path in run.temporaries()]} after a failed save")
        )
    mend()
    findings += run.finish()
    if resumed_step(run.children[-1]) < announced:
        findings.append(Finding("announced_lost", f"step {announced}, went on from {resumed_step(run.children[-1])}"))
    return findings or compare(run, reference)


@contextmanager
def small_disk(folder: Path, *, kilobytes: int, read_only: bool = False) -> Iterator[bool]:
    """Mount a file system of this size at `folder`; False: this user cannot mount."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={kilobytes}k{',ro' if read_only else ''}"
    mounted = False
    if os.geteuid() == 0 and shutil.which("mount"):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


# --- not a number ------------------------------------------------------------------------------------------------


def explode(run: Run, *options: str) -> list[Finding]:
    """Train with options that make the numbers explode: it says so, and no checkpoint holds them."""
    child = run.start(*options)
    findings = one_line_refusal(child, naming="not finite", codes=(1,))
    for directory in run.saved().values():
        for path in directory.glob("*.safetensors"):
            if name := _first_non_finite(path):
                findings.append(Finding("non_finite_saved", f"{directory.name}/{path.name}: {name}"))
    return findings


def _first_non_finite(path: Path) -> str | None:
    data = path.read_bytes()
    start = 8 + struct.unpack_from("<Q", data)[0]
    for name, facts in json.loads(data[8:start]).items():
        letter = {"F32": "f", "F64": "d"}.get(facts.get("dtype", ""))
        if letter:
            first, last = facts["data_offsets"]
            values = memoryview(data[start + first : start + last]).cast(letter)
            if not all(math.isfinite(value) for value in values):
                return name
    return None
