"""Damages a file and looks at what the trainer makes of it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.torture.harness import Finding, Run, Trainer, compare, one_line_refusal, resumed_step

SAVED, STEPS = 10, 15
PAGE = 4096


def flip(path: Path, rng: random.Random) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    """Cut the file off anywhere."""
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def zero(path: Path, rng: random.Random) -> None:
    """Fill a page with zeros; in a file of one page, its second half."""
    data = bytearray(path.read_bytes())
    start = rng.randrange(0, len(data), PAGE) if len(data) > PAGE else len(data) // 2
    length = min(PAGE, len(data) - start)
    data[start : start + length] = bytes(length)
    path.write_bytes(data)


def delete(path: Path, rng: random.Random) -> None:
    """Remove the file."""
    path.unlink()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "flip": flip,
    "truncate": truncate,
    "zero": zero,
    "delete": delete,
}


def prepare(trainer: Trainer, home: Path) -> Run:
    """Return a run that has stopped at a checkpoint, with one before it."""
    run = Run(trainer, home)
    assert run.finish(f"--training.max_steps={SAVED}", "--schedule.name=constant") == []
    return run


def files_of(run: Run) -> list[Path]:
    """Return every file that the trainer reads when it resumes, relative to the home: newest checkpoint and data.

    It does not read where documents begin.
    """
    folders = (run.saved()[SAVED], run.home / "data")
    found = (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())
    return [path.relative_to(run.home) for path in found if not path.name.endswith(".documents.npy")]


def cases(run: Run, *, every: bool) -> Iterator[tuple[Path, str]]:
    """Yield files and damages: every pair, or one damage for each file, by turns."""
    names = list(DAMAGES)
    for number, path in enumerate(files_of(run)):
        for name in names if every else [names[number % len(names)]]:
            yield path, name


def damage_and_resume(
    prepared: Run, home: Path, path: Path, damage: str, *, seed: int, reference: Run
) -> list[Finding]:
    """Damage a file of a copy of the prepared run, resume it, and return what is wrong with the reaction."""
    shutil.copytree(prepared.home, home, symlinks=True)
    run, before = Run(prepared.trainer, home), (home / path).read_bytes()
    DAMAGES[damage](home / path, random.Random(f"{path} {damage} {seed}"))
    if (home / path).exists() and (home / path).read_bytes() == before:
        shutil.rmtree(home)
        return []  # a page that was zero already
    child = run.start(f"--training.max_steps={STEPS}", "--schedule.name=constant")
    code = child.wait()
    if path.parts[0] == "data":
        judged = one_line_refusal(child, naming=path.stem) if code else _judge_harmless(run, path, reference=reference)
    else:
        judged = _judge_fallback(run, child.stderr, path, code=code, start=resumed_step(child), reference=reference)
    shutil.rmtree(home)
    return [Finding(finding.kind, f"{damage} {path}: {finding.seen}") for finding in judged]


def _judge_harmless(run: Run, path: Path, *, reference: Run) -> list[Finding]:
    """A sidecar's values have a checksum; what else is in the file, such as that checksum's name, may change."""
    if path.suffix == ".json" and path.parent.name == "data":
        values, before = (json.loads((home / path).read_text()) for home in (run.home, reference.home))
        if all(values.get(key) == value for key, value in before.items() if key != "sidecar_sha256"):
            return compare(run, reference)
    return [Finding("damage_unnoticed", "it trained on")]


def _judge_fallback(run: Run, said: str, path: Path, *, code: int, start: int, reference: Run) -> list[Finding]:
    """The newest checkpoint is damaged: the one before it must be used, with a warning that names both."""
    if "Traceback" in said:
        return [Finding("traceback", said[-2000:])]
    if start == SAVED:
        return [Finding("damage_unnoticed", f"went on from the damaged checkpoint, exit {code}")]
    if code != 0 or start == 0:
        return [Finding("no_fallback", f"exit {code}, went on from {start}: {said[-500:]}")]
    older = f"step-{start:08d}"
    warnings = [line for line in said.splitlines() if path.parent.name in line or path.name in line]
    findings = [] if any(path.name in line for line in warnings) else [Finding("unnamed", said[-500:])]
    if older not in said and f"step {start}" not in said:
        findings.append(Finding("unnamed", f"no line names {older}, which is used instead: {said[-500:]}"))
    return findings or compare(run, reference)
