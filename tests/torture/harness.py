"""A training run under torture: started, killed, resumed, and compared with a run that nobody disturbed.

Black box: it knows the command line, the JSON lines on stdout and in `metrics.jsonl`, exit codes, and the names in the
run directory. What it finds wrong is a list of `Finding`s; an empty list is a pass.

    step-00000010            a checkpoint; anything with `.tmp` in its name is an unfinished one
    {"step": 3, "metrics.loss": ..., "metrics.lr": ..., "metrics.grad_l2_norm": ...}
    {"event": "resumed" | "checkpoint_saved", "step": 10}
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.torture.process import Child, Surroundings

INTERVAL = 5
PRINTED = ("metrics.loss", "metrics.lr", "metrics.grad_l2_norm", "metrics.val_loss")
_CHECKPOINT = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Finding:
    """One broken promise: a short name for its kind, and what was seen."""

    kind: str
    seen: str


class Starter(Protocol):
    """What starts a process: see `process.Exec` and `process.Zygote`."""

    def start(self, arguments: list[str], home: Path, around: Surroundings, files: tuple[Path, Path]) -> Child:
        """Start it in `home`."""


@dataclass(frozen=True)
class Trainer:
    """A trainer to torture: how to start it, its TOML, the data that its TOML names as `data/...`, usual options.

    `seconds` is about how long it takes to start and to make some steps.
    """

    starter: Starter
    config: str
    data: Path
    options: tuple[str, ...] = ()
    seconds: float = 1.0


@dataclass
class Run:
    """One run directory and all the processes that have worked in it."""

    trainer: Trainer
    home: Path
    interval: int = INTERVAL
    run_name: str = "run"
    announced: list[int] = field(default_factory=list)
    children: list[Child] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        if not (self.home / "data").exists():
            shutil.copytree(self.trainer.data, self.home / "data")
            (self.home / "train.toml").write_text(self.trainer.config)
        self.directory = self.home / "runs" / self.run_name
        self.checkpoints = self.directory / "checkpoints"

    def start(self, *options: str, around: Surroundings | None = None, starter: Starter | None = None) -> Child:
        """Start the trainer on this run; it resumes where the run has a checkpoint."""
        number = len(self.children)
        files = (self.home / f"stdout-{number}", self.home / f"stderr-{number}")
        arguments = ["--config", "train.toml", f"--checkpoint.interval={self.interval}"]
        arguments += [f"--logging.run_name={self.run_name}", *self.trainer.options, *options]
        child = (starter or self.trainer.starter).start(arguments, self.home, around or Surroundings(), files)
        self.children.append(child)
        return child

    def finish(self, *options: str, around: Surroundings | None = None) -> list[Finding]:
        """Start once more and let it come to its end."""
        child = self.start(*options, around=around)
        code = child.wait()
        self.announced += saved_steps(child)
        return [] if code == 0 else [Finding("did_not_finish", f"exit {code}: {child.stderr[-2000:]}")]

    def saved(self) -> dict[int, Path]:
        """Return the checkpoints under a finished name, by step, oldest first."""
        names = os.listdir(self.checkpoints) if self.checkpoints.is_dir() else []
        found = {int(match[1]): self.checkpoints / name for name in names if (match := _CHECKPOINT.fullmatch(name))}
        return dict(sorted(found.items()))

    def temporaries(self) -> list[Path]:
        """Return what unfinished or half removed saves have left."""
        names = os.listdir(self.checkpoints) if self.checkpoints.is_dir() else []
        return [self.checkpoints / name for name in names if ".tmp" in name]

    def step_lines(self) -> list[dict[str, Any]]:
        """Return the step lines of `metrics.jsonl`, without one that a kill has torn."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [record for line in lines if "metrics.loss" in (record := json.loads(line))]

    def confuse_the_newest(self) -> None:
        """Let the oldest look like the newest, by its time and by `latest`: only the step in the name counts."""
        saved = list(self.saved().values())
        for age, path in enumerate(saved):
            moment = time.time() - 1000 * (age + 1)
            os.utime(path, (moment, moment))
        link = self.checkpoints / "latest"
        if saved and link.is_symlink():
            link.unlink()
            link.symlink_to(saved[0].name)


def saved_steps(child: Child) -> list[int]:
    """Return the steps whose checkpoints a process has announced."""
    return [record["step"] for record in child.records if record.get("event") == "checkpoint_saved"]


def resumed_step(child: Child) -> int:
    """Return the step that a process has gone on from, 0 where it began anew."""
    return next((record["step"] for record in child.records if record.get("event") == "resumed"), 0)


def shown_steps(child: Child) -> list[int]:
    """Return the steps whose lines a process has written to stdout."""
    return [record["step"] for record in child.records if "metrics.loss" in record]


def begun(child: Child) -> Callable[[], bool]:
    """Return a condition: the process has shown its first step."""
    return lambda: bool(shown_steps(child))


# --- comparing ---------------------------------------------------------------------------------------------------


def compare(run: Run, reference: Run) -> list[Finding]:
    """Compare a finished run with an undisturbed one: step lines as printed, and the final weights byte for byte."""
    findings = compare_lines(run, reference)
    if missing := {line["step"] for line in reference.step_lines()} - {line["step"] for line in run.step_lines()}:
        findings.append(Finding("steps_missing", f"steps {sorted(missing)[:9]}"))
    return [*findings, *_compare_weights(run, reference)]


def compare_lines(run: Run, reference: Run) -> list[Finding]:
    """Compare what a run has logged so far, line by line: each step once, in order, with the same numbers."""
    lines, undisturbed = run.step_lines(), {line["step"]: line for line in reference.step_lines()}
    steps = [line["step"] for line in lines]
    if repeated := sorted({step for step in steps if steps.count(step) > 1}):
        return [Finding("steps_repeated", f"steps {repeated[:9]}")]
    if steps != list(range(1, len(steps) + 1)):
        return [Finding("steps_missing", f"{steps}")]
    for line in lines:
        other = undisturbed[line["step"]]
        for name in PRINTED:
            if name in line and name in other and repr(line[name]) != repr(other[name]):
                seen = f"step {line['step']}: {name} is {line[name]!r}, undisturbed {other[name]!r}"
                return [Finding("numbers_differ", seen)]
    return []


def _compare_weights(run: Run, reference: Run) -> list[Finding]:
    ours, theirs = run.saved(), reference.saved()
    if not ours or max(ours) != max(theirs):
        return [Finding("weights_differ", f"checkpoints {list(ours)}, undisturbed {list(theirs)}")]
    step = max(theirs)
    return [
        Finding("weights_differ", f"step {step}: {path.name}")
        for path in sorted(theirs[step].glob("*.safetensors"))
        if path.read_bytes() != (ours[step] / path.name).read_bytes()
    ]


def one_line_refusal(child: Child, *, naming: str, codes: tuple[int, ...] = (1, 2)) -> list[Finding]:
    """Check that an ended process refused in one line that names the culprit, with an exit code and no traceback."""
    code, said = child.wait(), child.stderr.strip().splitlines()
    findings = []
    if code not in codes:
        findings.append(Finding("wrong_exit_code", f"exit {code}, expected one of {codes}: {said[-1:]}"))
    if any("Traceback" in line for line in said):
        findings.append(Finding("traceback", "\n".join(said[-12:])))
    elif not said or naming not in said[-1]:
        findings.append(Finding("unnamed", f"expected a last line with {naming!r}, found {said[-1:]}"))
    return findings
