"""The runs below a directory, and how each one does, from the beginning and the end of its lines.

Nothing here writes, takes a lock or follows a link out of the directory, so a training never notices that it is
watched. Names come from listing; nothing joins a name to a path.
"""

from __future__ import annotations

import math
import os
import platform
import stat
import time
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from config.suggest import closest
from transformerlm.experiments.metric_lines import METRICS, as_record, first_records, last_records, last_with

RunState = Literal["running", "finished", "stopped", "failed", "interrupted", "damaged"]
"""How a run is.

It trains now, has come to its end, was ended by a signal or by an error, or broke off without a word (killed, no
power). Of a damaged one the lines or the settings cannot be read.
"""
_DEPTH = 2  # runs/first; quickstart has runs/quickstart/run
_MOST_RUNS = 10_000
_MOST_BYTES = 1_000_000  # of a configuration or a state
_FRESH_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One run in a few numbers; None is what its lines do not say.

    Losses are in nats a token. `changed` is when its last line was written, in seconds since 1970.
    """

    name: str
    state: RunState
    step: int
    max_steps: int | None
    tokens: int | None
    loss: float | None
    val_loss: float | None
    best_val_loss: float | None
    val_bits_per_byte: float | None
    tokens_per_second: float | None
    parameters: int | None
    flops_per_token: float | None
    changed: float
    metrics_bytes: int


Known = tuple[tuple[Any, ...], RunSummary]
"""What was read of a run, and of which files: number, size and time of each, and whether the run was running."""


class RunDirectories:
    """The runs below `root`, with what was read of them kept in `known` until it changes."""

    def __init__(self, root: Path, known: dict[Path, Known] | None = None) -> None:
        self.root = root
        self.known = known or {}

    def paths(self) -> dict[str, Path]:
        """Return the directory of each run by its name, which is its path below the root, in alphabetical order."""
        found = dict(_runs_below(self.root, "", _DEPTH))
        return dict(sorted(found.items())[:_MOST_RUNS])

    def summaries(self) -> list[RunSummary]:
        """Return all runs, the one that changed last first."""
        paths, known, locked = self.paths(), {}, _locked_inodes()
        for name, path in paths.items():
            try:
                status = (path / METRICS).stat()
                running = is_running(path, locked)
                begins = running and has_begun_since(path, status.st_mtime_ns)
                key = (status.st_ino, status.st_size, status.st_mtime_ns, running, begins, *config_key(path))
                same = self.known[path] if path in self.known and self.known[path][0] == key else None
                known[path] = same or (key, summarize(name, path, running=running))
            except FileNotFoundError:  # removed just now
                continue
            except OSError:  # not ours to read, or a disk that fails
                known[path] = ((), _unreadable(name))
        self.known = known
        return sorted((summary for _, summary in known.values()), key=lambda one: one.changed, reverse=True)

    def sizes(self) -> dict[str, tuple[int, int, bool]]:
        """Return the identity and the size of each run's lines, and whether it trains: what differs has changed."""
        sizes, locked = {}, _locked_inodes()
        for name, path in self.paths().items():
            try:
                status = (path / METRICS).stat()
            except OSError:
                continue
            sizes[name] = (status.st_ino, status.st_size, is_running(path, locked))
        return sizes


def _runs_below(directory: Path, prefix: str, depth: int) -> list[tuple[str, Path]]:
    try:
        entries = [entry for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    found: list[tuple[str, Path]] = []
    for entry in entries:
        name = prefix + entry.name
        if entry.name.startswith(".") or not _is_text(entry.name):
            continue
        if _is_own_file(os.path.join(entry.path, METRICS)):
            found.append((name, Path(entry.path)))
        elif depth > 1 and entry.name != "checkpoints":
            found += _runs_below(Path(entry.path), name + "/", depth - 1)
    return found


def _is_own_file(path: Path | str) -> bool:
    """Return whether a path is a file and no link; one that we may not look at is none."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _read_small(path: Path) -> bytes:
    """Return the bytes of a file of at most a megabyte that is no link; raise OSError for any other."""
    if path.lstat() and (not _is_own_file(path) or path.stat().st_size > _MOST_BYTES):
        raise OSError(f"{path}: expected a file of at most {_MOST_BYTES:,} bytes")
    return path.read_bytes()


def _is_text(name: str) -> bool:
    try:
        return bool(name.encode("utf-8"))
    except UnicodeEncodeError:
        return False


def summary_of(directory: Path) -> RunSummary:
    """Return one run in a few numbers, by the name of its directory; raise OSError where it cannot be read."""
    return summarize(directory.resolve().name, directory, running=is_held(directory))


def check_is_run(directory: Path, *, runs_dir: Path = Path("runs")) -> None:
    """Refuse what is no run, before anything of it is read: a pipe would be waited for, a device never ends.

    Raises:
        ValueError: it is none; the message says which run may be meant, beside it or in `runs_dir`.
        OSError: it may not be read.
    """
    if (directory / METRICS).is_file():
        return
    found = f"found no {METRICS} in it" if directory.is_dir() else "found no such directory"
    raise ValueError(f"{directory}: expected the directory of a run, {found}{_meant(directory, runs_dir)}")


def _meant(directory: Path, runs_dir: Path) -> str:
    """Return a hint at runs of nearly this name, or below this directory; "" for none."""
    below = [str(path) for _, path in sorted(_runs_below(directory, "", _DEPTH))][:2]
    if below:
        return f" (did you mean {' or '.join(below)}?)"
    beside = {path.name: path for root in (directory.parent, runs_dir) for _, path in _runs_below(root, "", 1)}
    meant = [str(beside[name]) for name in closest(directory.name, sorted(beside), cutoff=0.7)]
    return f" (did you mean {' or '.join(meant)}?)" if meant else ""


def _unreadable(name: str) -> RunSummary:
    nothing: dict[str, Any] = dict.fromkeys(field.name for field in fields(RunSummary))
    return RunSummary(**nothing | {"name": name, "state": "damaged", "step": 0, "changed": 0.0, "metrics_bytes": 0})


def summarize(name: str, directory: Path, *, running: bool) -> RunSummary:
    """Return a run in a few numbers; raise OSError where it cannot be read."""
    path = directory / METRICS
    status = path.stat()
    started = next((one for one in first_records(path) if one.get("event") == "started"), {})
    last, ended = _what_is_last(path)
    if running and has_begun_since(directory, status.st_mtime_ns):
        ended = None  # that was the end of the start before
    settings = _settings(directory)
    is_damaged = settings is None or (status.st_size and not last and _has_no_record(path, status.st_size))
    numbers = _Numbers(last | {f"started.{key}": value for key, value in started.items()} | (settings or {}))
    max_steps = numbers.whole("training.max_steps")  # of the last start; the first one may have had another
    # A summary may be of an earlier start, and a checkpoint older than the last validation.
    best = (numbers.real("best_val_loss"), _lowest_saved(directory), numbers.real("metrics.val_loss"))
    return RunSummary(
        name=name,
        state="damaged" if is_damaged else _state_of(ended, running),
        step=numbers.whole("step") or 0,
        max_steps=numbers.whole("started.max_steps") if max_steps is None else max_steps,
        tokens=numbers.whole("metrics.tokens"),
        loss=numbers.real("metrics.loss"),
        val_loss=numbers.real("metrics.val_loss"),
        best_val_loss=min((loss for loss in best if loss is not None), default=None),
        val_bits_per_byte=numbers.real("metrics.val_bits_per_byte"),
        tokens_per_second=numbers.real("metrics.tokens_per_second"),
        parameters=numbers.whole("started.parameters"),
        flops_per_token=numbers.real("started.flops_per_token"),
        changed=status.st_mtime,
        metrics_bytes=status.st_size,
    )


def _what_is_last(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the last value of each number in the lines, and the last event that says a start or an end."""
    last: dict[str, Any] = {}
    ended: dict[str, Any] | None = None
    for record in last_records(path):  # from the end: the first one that says something counts
        if ended is None and record.get("event") in ("started", "resumed", "finished", "failed"):
            ended = record
        facts = record if record.get("event") == "summary" else {k: v for k, v in record.items() if "metrics." in k}
        if "step" in record:
            facts = {"step": record["step"], **facts}
        last = {**facts, **last}
    if "metrics.val_loss" not in last:  # validations may be far apart
        last = {**(last_with(path, "metrics.val_loss") or {}), **last}
    return last, ended


def _settings(directory: Path) -> dict[str, Any] | None:
    """Return a run's settings, none where it has not written them yet; None where they cannot be read."""
    try:
        return _flat(_read_toml(directory / "config.toml"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        return None


def _has_no_record(path: Path, size: int) -> bool:
    return next(last_records(path, most_bytes=size), None) is None


def _lowest_saved(directory: Path) -> float | None:
    """Return the lowest validation loss that a run's newest checkpoint knows of."""
    link = directory / "checkpoints" / "latest"
    try:
        target = os.readlink(link)
        if not target.startswith("step-") or "/" in target:
            return None
        state = as_record(_read_small(link.parent / target / "state.json"))
    except OSError:
        return None
    return _Numbers(state or {}).real("lowest_val_loss")


class _Numbers:
    """What a record has under a key, if it is a number."""

    def __init__(self, record: dict[str, Any]) -> None:
        self._record = record

    def real(self, key: str) -> float | None:
        value = self._record.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**1000:
            return None  # JSON has numbers beyond those of floats, and 1e999 is read as infinity
        return float(value)

    def whole(self, key: str) -> int | None:
        value = self._record.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None


def _state_of(ended: dict[str, Any] | None, running: bool) -> RunState:
    if ended is not None and ended.get("event") == "failed":
        return "failed"
    if ended is not None and ended.get("event") == "finished":
        return "stopped" if ended.get("reason") == "signal" else "finished"
    return "running" if running else "interrupted"


# --- whether a run trains now --------------------------------------------------------------------------------------


def is_running(directory: Path, locked: set[int] | None) -> bool:
    """Return whether a training holds the directory.

    `locked` are the inodes on which this machine holds locks, None where the system does not tell: there the process
    that the lock file names is looked for, and on Windows, which has no such question, lines that are seconds old. So
    is a training on another machine known; the lock file says which machine it is, in versions that write it.
    """
    lock = directory / ".lock"
    try:
        status = lock.stat()
        if locked is not None and status.st_ino in locked:
            return True
        holder = lock.read_text(encoding="utf-8")
        is_here = holder.partition(" on ")[2] == platform.node()
        if is_here and (locked is not None or os.name != "nt"):
            return locked is None and _lives(holder)
        newest = max(status.st_mtime, (directory / METRICS).stat().st_mtime)
        return time.time() - newest < _FRESH_SECONDS
    except (OSError, UnicodeDecodeError):
        return False


def has_begun_since(directory: Path, time_ns: int) -> bool:
    """Return whether a training that holds the directory took it after a time, in nanoseconds since 1970.

    It writes its lock file at that moment, and its first line only when the run is prepared: an end that older lines
    tell of is not its own.
    """
    try:
        return (directory / ".lock").stat().st_mtime_ns > time_ns
    except OSError:
        return False


def is_held(directory: Path) -> bool:
    """Return whether a training holds the directory now."""
    return is_running(directory, _locked_inodes())


def _locked_inodes() -> set[int] | None:
    """Return the inodes with a lock, from /proc/locks; taking the lock to see would refuse a training that starts."""
    try:
        lines = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
        # "1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF"
        return {int(word.rpartition(":")[2]) for line in lines for word in line.split() if word.count(":") == 2}
    except (OSError, ValueError):
        return None


def _lives(holder: str) -> bool:
    """Return whether the process that a lock file names, as `process 1234 on HOST`, is there."""
    number = holder.partition(" on ")[0].rpartition(" ")[2]
    if not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


# --- configurations ------------------------------------------------------------------------------------------------


def config_key(directory: Path) -> list[int]:
    """Return what tells one configuration file of a run from another: its number, its size, its time."""
    try:
        status = os.lstat(directory / "config.toml")
    except OSError:
        return []
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def config_of(directory: Path) -> dict[str, Any]:
    """Return a run's configuration with dotted keys; empty where it has none that can be read."""
    return _settings(directory) or {}


def _read_toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(_read_small(path).decode("utf-8"))


def flat_settings(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a tree of settings, or of an event, with dotted keys, and values that JSON can hold."""
    return _flat(tree)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: _plain(value)}
    return flat


def _plain(value: Any) -> Any:
    """Return a value of TOML as JSON can hold it: a date is words, and so is a number beyond floats or 64 bits."""
    if value is None:
        return None
    if isinstance(value, list):
        return [_plain(one) for one in value]
    is_odd = isinstance(value, int | float) and not abs(value) < (2**63 if isinstance(value, int) else math.inf)
    return str(value) if is_odd or not isinstance(value, str | int | float) else value


def config_differences(configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the keys in which configurations differ, each with the value of every run; None: it has no such key."""
    keys = sorted({key for config in configs.values() for key in config})
    table = {key: {name: config.get(key) for name, config in configs.items()} for key in keys}
    return {key: row for key, row in table.items() if any(one != next(iter(row.values())) for one in row.values())}
