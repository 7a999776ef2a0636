"""The command that trains a run again, and what to know of it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from transformerlm.experiments.history import RunHistory

# What "auto" was on the run's machine is written out, because rounding depends on it.
_AUTOMATIC = ("micro_batch_size", "precision", "device")


def reproduction_of(run: RunHistory) -> dict[str, Any]:
    """Return the command that trains a run again, the one that was typed, "" where unknown, and what to know of it."""
    typed = run.environment.get("command")
    words = " ".join(shlex.quote(str(word)) for word in typed) if isinstance(typed, list) else ""
    return {"command": command_of(run), "typed": words, "notes": list(_notes(run))}


def command_of(run: RunHistory) -> str:
    """Return the shell command that trains a run again, into `reproduced/` beside it; "" where it has no settings.

    It reads the run's own `config.toml`, in which each setting is, from the directory in which the run was started,
    since paths in it may be relative to that. It has the run's threads and processes, and writes out what was "auto".
    """
    if not run.config:
        return ""
    directory = run.directory.resolve()
    words = [*_launcher(run), "transformerlm-train", "--config", str(directory / "config.toml")]
    words += [f"--runs_dir={directory.parent / 'reproduced'}", f"--logging.run_name={directory.name}"]
    if run.config.get("checkpoint.resume") == "required":  # there is nothing to resume there
        words.append("--checkpoint.resume=auto")
    for key in _AUTOMATIC:
        found = run.started.get(key)
        if run.config.get(f"training.{key}", "auto") == "auto" and isinstance(found, int | str):
            words.append(f"--training.{key}={found}")
    command = " ".join(shlex.quote(word) for word in words)
    threads, begun_in = _whole(run.environment.get("threads")), run.environment.get("directory")
    if threads is not None:
        command = f"OMP_NUM_THREADS={threads} {command}"
    return f"cd {shlex.quote(begun_in)} && {command}" if isinstance(begun_in, str) else command


def _launcher(run: RunHistory) -> list[str]:
    processes = _whole(run.environment.get("processes")) or 1
    return ["torchrun", f"--nproc-per-node={processes}", "--no-python"] if processes > 1 else []


def _notes(run: RunHistory) -> Iterator[str]:
    environment = run.environment
    if not run.config:
        yield "Its config.toml is missing or cannot be read, so there is no command that trains it again."
        return
    yield "On the same machine, with the same versions and the same data, it gives the same losses, bit for bit."
    if run.config.get("training.max_time"):
        yield "It is limited by training.max_time and its learning rate follows the clock, so another one differs."
    if environment.get("git.dirty"):
        yield "The source had changes that were not committed."
    if _whole(run.started.get("step")):
        yield "This run was resumed; a run without a break gives the same."
    if (_whole(environment.get("processes")) or 1) > 1:
        yield "The command starts all of its processes on one machine."
    if not environment:
        yield "This run does not say with which versions it was made."


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
