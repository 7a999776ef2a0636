"""Kills a run again and again, at moments of every kind, and looks at what is left each time."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.torture.harness import (
    Finding,
    Run,
    Trainer,
    begun,
    compare,
    compare_lines,
    resumed_step,
    saved_steps,
    shown_steps,
)
from tests.torture.process import Child

MOMENTS = ("any time", "step line", "save on disk", "announcement")


@dataclass
class Report:
    """What a series of kills came to."""

    findings: list[Finding] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    redone: list[int] = field(default_factory=list)
    cut_saves: int = 0
    laps: int = 0

    def __str__(self) -> str:
        average = sum(self.redone) / max(1, len(self.redone))
        return (
            f"{self.kills.total()} kills in {self.laps} runs ({dict(self.kills)}), {self.cut_saves} of them in a save; "
            f"steps redone: {max(self.redone, default=0)} at most, {average:.1f} on average"
        )


def kill_again_and_again(trainer: Trainer, folder: Path, *, kills: int, seed: int, reference: Run) -> Report:
    """Kill runs `kills` times in all, letting each come to its end, which must be that of the undisturbed run."""
    rng, report = random.Random(seed), Report()
    while report.kills.total() < kills and not report.findings:
        run = Run(trainer, folder / f"lap-{report.laps}")
        last_line = 0
        while report.kills.total() < kills:
            run.confuse_the_newest()
            moment = MOMENTS[report.kills.total() % len(MOMENTS)]
            started, child = time.time(), run.start()
            _wait_for(moment, run, child, rng)
            killed = child.kill()
            report.findings += _look(run, child, started=started, last_line=last_line, report=report)
            last_line = max([*shown_steps(child), 0]) or last_line
            report.findings += compare_lines(run, reference)
            if not killed or report.findings:
                break
            report.kills[moment] += 1
            report.cut_saves += bool(run.temporaries())
        report.laps += 1
        if not report.findings:
            report.findings += run.finish() or compare(run, reference)
    return report


def _wait_for(moment: str, run: Run, child: Child, rng: random.Random) -> None:
    """Return when the moment has come, or the process has ended."""
    happened: Callable[[], bool]
    if moment == "any time":
        end = time.monotonic() + rng.uniform(0.0, run.trainer.seconds)
        happened = lambda: time.monotonic() > end  # noqa: E731
    elif moment == "step line":
        lines = rng.randint(1, 2 * run.interval)
        happened = lambda: len(shown_steps(child)) >= lines  # noqa: E731
    elif moment == "save on disk":
        child.wait_until(begun(child))
        before = set(run.saved())
        happened = lambda: bool(run.temporaries()) or set(run.saved()) > before  # noqa: E731
    else:
        happened = lambda: bool(saved_steps(child))  # noqa: E731
    child.wait_until(happened, pause=0.0005)
    time.sleep(rng.choice([0.0, rng.uniform(0.0, 0.01)]))


def _look(run: Run, child: Child, *, started: float, last_line: int, report: Report) -> list[Finding]:
    """Look at how a process began, from what the one before it had left, and at what it leaves itself."""
    findings = []
    if begun(child)():
        start = resumed_step(child)
        findings += _judge_start(run, start, last_line=last_line)
        report.redone.append(max(0, last_line - start))
        if old := [path.name for path in run.temporaries() if _older(path, started)]:
            findings.append(Finding("stale_temporaries", f"{old} after a new start"))
    run.announced += saved_steps(child)
    saved = list(run.saved())
    if run.announced and max(run.announced) not in saved and max([0, *saved]) < max(run.announced):
        findings.append(Finding("announced_lost", f"step {max(run.announced)} was announced, on disk are {saved}"))
    if len(set(run.announced)) > 1 and len(saved) < 2:
        findings.append(Finding("fewer_than_two", f"{saved} after {sorted(set(run.announced))} were announced"))
    if len(run.temporaries()) > 1:
        findings.append(Finding("stale_temporaries", f"{[path.name for path in run.temporaries()]} after a kill"))
    return findings


def _judge_start(run: Run, start: int, *, last_line: int) -> list[Finding]:
    findings = []
    newest = max([0, *run.announced])
    if start < newest:
        kind = "resumed_from_older" if newest in run.saved() else "announced_lost"
        findings.append(Finding(kind, f"step {newest} was announced, but it went on from {start}"))
    if last_line - start > run.interval:
        findings.append(Finding("redone_too_much", f"killed after step {last_line}, went on from {start}"))
    if damaged := list(run.checkpoints.glob("*.bad*")):
        findings.append(Finding("kill_left_damage", f"{[path.name for path in damaged]}"))
    return findings


def _older(path: Path, moment: float) -> bool:
    try:
        return path.lstat().st_ctime < moment  # a rename changes this one, too
    except FileNotFoundError:
        return False
