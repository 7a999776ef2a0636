"""The order in which a save reaches the disk, as an audit of what a process did to the files below a directory.

Two tracers give the same events: a shim inside of Python (`shim/sitecustomize.py`), and strace around the process.

    create PATH   write PATH   sync PATH   rename FROM TO   remove PATH   say LINE
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.torture.harness import Finding, Run, Trainer, begun, resumed_step, saved_steps
from tests.torture.process import Exec, Surroundings

Event = tuple[str, ...]
SHIM = Path(__file__).with_name("shim")
CALLS = "openat,creat,write,pwrite64,writev,ftruncate,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir"
CALLS += ",mkdir,mkdirat,symlink,symlinkat,clone,clone3,fork,vfork"
_NAME = re.compile(r"step-\d{8,}")


@dataclass
class Disk:
    """What would be left if the power failed now: which contents and which names are not on disk yet."""

    root: Path
    unsynced_files: set[Path] = field(default_factory=set)
    unsynced_names: dict[Path, Path | None] = field(default_factory=dict)  # the name that it had before, if any
    findings: list[Finding] = field(default_factory=list)
    renamed: set[str] = field(default_factory=set)
    announced: set[str] = field(default_factory=set)

    def happen(self, kind: str, *what: str) -> None:
        """Take an event into account."""
        getattr(self, f"_{kind}")(*what)

    def not_durable(self, name: str) -> list[str]:
        """Return what of a checkpoint is not on disk."""
        final = self.root / name
        return sorted(path.name for path in (*self.unsynced_files, *self.unsynced_names) if _within(path, final))

    def _create(self, path: str) -> None:
        self.unsynced_names.setdefault(Path(path), None)

    def _write(self, path: str) -> None:
        self.unsynced_files.add(Path(path))

    def _sync(self, path: str) -> None:
        self.unsynced_files.discard(Path(path))
        self.unsynced_names = {one: old for one, old in self.unsynced_names.items() if one.parent != Path(path)}

    def _rename(self, source: str, target: str) -> None:
        old, new = Path(source), Path(target)
        if _NAME.fullmatch(new.name):
            unsynced = [path for path in (*self.unsynced_files, *self.unsynced_names) if _within(path, old)]
            unsynced = [path.name for path in unsynced if path != old]
            self._expect(not unsynced, "renamed_before_synced", f"{new.name}: {sorted(unsynced)}")
            self.renamed.add(new.name)
        self._leave(old)
        self.unsynced_files = {_moved(path, old, new) for path in self.unsynced_files}
        self.unsynced_names = {_moved(path, old, new): before for path, before in self.unsynced_names.items()}
        self.unsynced_names[new] = old

    def _remove(self, path: str) -> None:
        self._leave(Path(path))
        self.unsynced_files.discard(Path(path))
        self.unsynced_names.pop(Path(path), None)

    def _leave(self, path: Path) -> None:
        """A checkpoint gives up its name: allowed only when a newer one has been announced."""
        if _NAME.fullmatch(path.name) and path.parent == self.root:
            newer = [name for name in self.announced if name > path.name]
            self._expect(bool(newer), "deleted_before_durable", f"{path.name} with {sorted(self.announced)} announced")

    def _say(self, line: str) -> None:
        step = _announced(line)
        if step is None:
            return
        name = f"step-{step:08d}"
        self._expect(name in self.renamed, "not_atomic", f"{name} was announced, but not renamed from another name")
        self._expect(not self.not_durable(name), "not_durable", f"{name}: {self.not_durable(name)}")
        self.announced.add(name)

    def _expect(self, condition: bool, kind: str, seen: str) -> None:
        if not condition:
            self.findings.append(Finding(kind, seen))


def _announced(line: str) -> int | None:
    """Return the step whose checkpoint a line announces."""
    record = json.loads(line) if line.startswith("{") else {}
    return record["step"] if record.get("event") == "checkpoint_saved" else None


def _within(path: Path, directory: Path) -> bool:
    return path == directory or directory in path.parents


def _moved(path: Path, old: Path, new: Path) -> Path:
    return new / path.relative_to(old) if _within(path, old) else path


# --- tracing -----------------------------------------------------------------------------------------------------


def shim_around(run: Run) -> Surroundings:
    """Return surroundings in which Python tells what it does below the run's checkpoints."""
    path = f"{SHIM}:{Path(__file__).parents[2]}"
    return Surroundings({"PYTHONPATH": path, "TORTURE_WATCH": str(run.checkpoints)})


def shim_events(stdout: str) -> Iterator[Event]:
    """Yield the events that the shim has written between the lines of stdout."""
    for line in stdout.splitlines():
        yield tuple(json.loads(line[1:])) if line.startswith("@") else ("say", line)


def strace_prefix(log: Path) -> list[str]:
    """Return the command that runs another one under strace."""
    return ["strace", "-f", "-y", "-s", "4000", "--seccomp-bpf", "-e", f"trace={CALLS}", "-o", str(log)]


def strace_events(log: str, root: Path, cwd: Path) -> Iterator[Event]:
    """Yield the events below `root`, and what was written to stdout, from strace's lines in their order."""
    unfinished: dict[str, str] = {}
    for line in log.splitlines():
        pid, _, text = line.partition(" ")
        text = text.strip()
        if text.endswith("<unfinished ...>"):
            unfinished[pid] = text.removesuffix("<unfinished ...>")
            continue
        if match := re.match(r"<\.\.\. \w+ resumed>(.*)", text):
            text = unfinished.pop(pid, "") + match[1]
        if match := re.match(r"(\w+)\((.*)\)\s+= (-?\d+|0x\w+)(?:<(.*)>)?", text):
            call, arguments, result, opened = match.groups()
            if not result.startswith("-"):
                yield from (event for event in _strace_event(call, arguments, opened, cwd) if _concerns(event, root))


def _strace_event(call: str, arguments: str, opened: str | None, cwd: Path) -> Iterator[Event]:
    strings = (
        [str(cwd / json.loads(f'"{text}"')) for text in re.findall(r'"((?:[^"\\]|\\.)*)"', arguments)[:2]]
        if ("write" not in call)
        else []
    )
    bases = re.findall(r"(?:AT_FDCWD|\d+)<([^>]*)>", arguments)
    if call in ("openat", "creat") and opened and "O_CREAT" in arguments:
        yield from (("create", opened), ("write", opened))
    elif call in ("write", "pwrite64", "writev", "ftruncate") and bases:
        if arguments.startswith("1<"):
            text = re.findall(r'"((?:[^"\\]|\\.)*)"', arguments)
            yield ("say", text[0].replace('\\"', '"').removesuffix("\\n")) if text else ("say", "")
        yield ("write", bases[0])
    elif call in ("fsync", "fdatasync") and bases:
        yield ("sync", bases[0])
    elif call.startswith("rename"):
        yield ("rename", *strings)
    elif call.startswith("symlink"):
        yield ("create", strings[1])
    elif call.startswith("mkdir"):
        yield ("create", strings[0])
    elif call in ("unlink", "rmdir"):
        yield ("remove", strings[0])
    elif call == "unlinkat":
        yield ("remove", str(Path(bases[0], strings[0])) if bases else strings[0])


def _concerns(event: Event, root: Path) -> bool:
    return event[0] == "say" or any(path.startswith(f"{root}/") or path == str(root) for path in event[1:])


# --- judging -----------------------------------------------------------------------------------------------------


def play(events: Iterable[Event], root: Path) -> Disk:
    """Return the disk after the events."""
    disk = Disk(root)
    for event in events:
        disk.happen(*event)
    return disk


def audit_with_shim(run: Run, *options: str) -> list[Finding]:
    """Train with the shim inside, and return what is wrong with the order of its saves."""
    child = run.start(*options, around=shim_around(run))
    assert child.wait() == 0, child.stderr
    disk = play(shim_events(child.stdout), run.checkpoints)
    return disk.findings if disk.announced else [Finding("nothing_announced", child.stdout[-500:])]


def audit_with_strace(run: Run, command: list[str], *options: str) -> list[Finding]:
    """Train under strace, and return what is wrong with the order of the saves."""
    log = run.home / "strace"
    child = run.start(*options, starter=Exec(command, prefix=strace_prefix(log)))
    assert child.wait() == 0, child.stderr
    disk = play(strace_events(log.read_text(errors="replace"), run.checkpoints, run.home), run.checkpoints)
    return disk.findings if disk.announced else [Finding("nothing_announced", child.stdout[-500:])]


def cut_the_power(trainer: Trainer, home: Path, *, announcements: int = 3) -> list[Finding]:
    """Kill a run at an announcement, take away what was not on disk by then, and start it again.

    Contents that were not flushed become empty files, and names that were not flushed are those of before.
    """
    run = Run(trainer, home)
    child = run.start(around=shim_around(run))
    child.wait_until(lambda: len(saved_steps(child)) >= announcements)
    child.signal(signal.SIGKILL)
    child.wait()
    newest = saved_steps(child)[announcements - 1]
    lines = child.stdout.splitlines()
    end = next(number for number, line in enumerate(lines) if _announced(line) == newest)
    disk = play(shim_events("\n".join(lines[: end + 1])), run.checkpoints)
    for path in run.saved().values():
        if path.name not in disk.renamed:  # it came after the announcement
            shutil.rmtree(path)
    for path in disk.unsynced_files:
        if path.is_file():
            path.write_bytes(b"")
    for path, old in disk.unsynced_names.items():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path) if old is None else path.rename(old)
    again = run.start()
    again.wait_until(begun(again))
    again.kill()
    start = resumed_step(again)
    lost = f"step {newest} was announced, after a power cut it went on from {start}"
    return [] if start >= newest else [Finding("lost_by_power_cut", lost)]
