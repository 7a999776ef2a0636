"""Parts of a run made once more: from one checkpoint to the next, by `transformerlm-train` in a process of its own."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from transformerlm.experiments.run_checks import Finding, Record, RunLines, read_run_lines, step_of
from transformerlm.experiments.saved_checkpoints import SavedCheckpoint, read_checkpoint

Outcome = Literal["equal", "differ", "missing"]
_NAME = "replay"
# What a clock or the machine's memory gives, and no replay gives again.
_MEASURED = ("per_second", "_bytes", "seconds", "elapsed")
_LAUNCHERS = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "SLURM_")
_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 60.0
BITS = ("versions.torch", "versions.transformerlm", "versions.numpy", "processor", "threads", "device", "source_sha256")
"""The facts of an environment on which the last bits of a loss may depend."""
READ = ("data.train.sha256", "data.valid.sha256", "tokenizer_sha256")


@dataclass(frozen=True)
class Segment:
    """The steps after `begin` up to `end`, from a checkpoint, or from the run's beginning, to the next one saved."""

    begin: int
    end: int

    @property
    def steps(self) -> int:
        """How many steps it has."""
        return self.end - self.begin


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What came of a segment: how many lines were compared, and whether losses and tensors are equal bit for bit.

    `first_step` is the first with another number, `largest_difference` the largest of a loss, relative. `seconds` are
    those of the replay, `claimed_seconds` those of the run, both by their lines; None where they do not say.
    """

    begin: int
    end: int
    lines: int
    losses: Outcome
    weights: Outcome
    first_step: int | None
    largest_difference: float
    seconds: float | None
    claimed_seconds: float | None

    @property
    def is_equal(self) -> bool:
        """Whether all that was compared is equal."""
        return (self.losses, self.weights) == ("equal", "equal")

    def as_record(self) -> Record:
        """Return the facts as JSON has them."""
        return asdict(self)


def segments_of(kept: Sequence[int], saved: Sequence[int]) -> list[Segment]:
    """Return what can be replayed: from a checkpoint that is there, or the beginning, to the next that was saved."""
    steps = [0, *saved]
    have = {0, *kept}
    return [Segment(*pair) for pair in pairwise(steps) if have.issuperset(pair)]


def choose_segments(segments: Sequence[Segment], *, num_steps: int, seed: int) -> list[Segment]:
    """Return the last segment, whose end is the model that others use, and others that are drawn, in order.

    Those that are drawn have at least `num_steps` steps together, if there are as many: whoever made the run knew that
    the last one would be looked at.
    """
    drawn = list(segments[:-1])
    random.Random(seed).shuffle(drawn)
    chosen: list[Segment] = []
    for segment in drawn:
        if sum(one.steps for one in chosen) >= num_steps:
            break
        chosen.append(segment)
    return sorted([*chosen, *segments[-1:]], key=lambda one: one.begin)


def replay(
    segment: Segment,
    goal: SavedCheckpoint,
    lines: RunLines,
    *,
    start: Path | None,
    scratch: Path,
    base: Path,
) -> tuple[Replay, Record, str | None]:
    """Make a segment once more, and compare it; return the result, its environment, and why it broke off, if so.

    `start` is the checkpoint to begin from, of which a copy is used, and `goal` the one to compare with; `scratch` is
    an empty directory for the replay, and `base` the one in which relative paths of the settings begin.
    """
    run_dir = scratch / _NAME
    (run_dir / "checkpoints").mkdir(parents=True)
    if start is not None:
        shutil.copytree(start, run_dir / "checkpoints" / start.name)
    settings = scratch / "settings.toml"
    shutil.copyfile(goal.directory / "config.toml", settings)
    command = [sys.executable, "-P", "-m", "transformerlm", "train", "--config", str(settings)]
    threads = lines.environment_of(segment.end).get("threads")
    failure = _train_until_saved(
        [*command, *_options(segment, goal), f"--runs_dir={scratch}"], run_dir, segment.end, base=base, threads=threads
    )
    made = read_run_lines(run_dir) if (run_dir / "metrics.jsonl").is_file() else RunLines([], [], 0)
    directory = run_dir / "checkpoints" / goal.directory.name
    found = read_checkpoint(directory, segment.end) if directory.is_dir() else None
    return _compared(segment, goal, lines, made=made, found=found), made.environment, failure


def _options(segment: Segment, goal: SavedCheckpoint) -> list[str]:
    """Return the settings that a replay changes: where it writes, and that it saves at its end and nowhere else."""
    has_limit = goal.config.get("training.max_time") is not None
    return [
        f"--logging.run_name={_NAME}",
        "--logging.backend=noop",
        f"--checkpoint.interval={segment.end}",
        f"--checkpoint.keep={10**6}",
        "--checkpoint.resume=auto",
        "--samples.interval=0",
        "--wandb.log_artifacts=false",
        *(["--training.max_time=none"] if has_limit else []),
    ]


def _train_until_saved(command: Sequence[str], run_dir: Path, step: int, *, base: Path, threads: object) -> str | None:
    """Train until a step's checkpoint is there, then end the process; return its last words if it never was."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    if isinstance(threads, int):
        environment["OMP_NUM_THREADS"] = str(threads)
    said = run_dir.parent / "stderr.txt"
    with open(said, "wb") as stderr:
        process = subprocess.Popen(
            command, cwd=base, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr
        )
        try:
            while process.poll() is None and not _has_saved(run_dir, step):
                time.sleep(_POLL_SECONDS)
        finally:
            _end(process)
    if _has_saved(run_dir, step):
        return None
    words = said.read_text(encoding="utf-8", errors="replace").splitlines()
    return words[-1] if words else f"transformerlm-train ended with exit code {process.returncode}"


def _has_saved(run_dir: Path, step: int) -> bool:
    """Return whether a step's checkpoint is there; it appears whole, after the lines of its steps."""
    return (run_dir / "checkpoints" / f"step-{step:08d}").is_dir()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a training: by a signal that lets it save, and after a while by one that does not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


# --- comparing ---------------------------------------------------------------------------------------------------


def _compared(
    segment: Segment, goal: SavedCheckpoint, lines: RunLines, *, made: RunLines, found: SavedCheckpoint | None
) -> Replay:
    ours = {step_of(one): one for one in made.steps if segment.begin < step_of(one) <= segment.end}
    theirs = {step_of(one): one for one in lines.steps if segment.begin < step_of(one) <= segment.end}
    # At its end a replay always logs; the run need not have, if a signal ended it there.
    steps = sorted({*theirs, *(step for step in ours if step != segment.end)})
    differ = [
        step
        for step in steps
        if step not in ours or step not in theirs or _differs(theirs[step], ours[step], is_end=step == segment.end)
    ]
    gaps = [_gap(theirs[step], ours[step]) for step in steps if step in ours and step in theirs]
    losses: Outcome = "equal" if not differ else "differ" if ours else "missing"
    return Replay(
        begin=segment.begin,
        end=segment.end,
        lines=len(steps),
        losses=losses,
        weights="missing" if found is None else "equal" if found.tensors == goal.tensors else "differ",
        first_step=differ[0] if differ else None,
        largest_difference=max(gaps, default=0.0),
        seconds=_seconds(ours),
        claimed_seconds=_seconds(theirs),
    )


def _differs(theirs: Record, ours: Record, *, is_end: bool) -> bool:
    """Return whether a line has another number than its replay; at its end a replay may have measured more."""
    keys = {key for key in (*theirs, *({} if is_end else ours)) if _is_computed(key)}
    return any(ours.get(key) != theirs.get(key) for key in keys)


def _is_computed(key: str) -> bool:
    return key.startswith("metrics.") and not any(word in key for word in _MEASURED)


def _gap(theirs: Record, ours: Record) -> float:
    one, other = theirs.get("metrics.loss"), ours.get("metrics.loss")
    if isinstance(one, int | float) and isinstance(other, int | float):
        return float(abs(one - other) / max(abs(one), abs(other), 1e-30))
    return 0.0 if one == other else 1.0  # a number that is not finite is a word


def _seconds(lines: Mapping[int, Record]) -> float | None:
    times = [line.get("time.elapsed_s") for _, line in sorted(lines.items())]
    known = [float(one) for one in times if isinstance(one, int | float)]
    return known[-1] - known[0] if len(known) > 1 else None


def findings_of(
    result: Replay, failure: str | None, *, theirs: Record, ours: Record, config: Mapping[str, Any]
) -> Iterator[Finding]:
    """Say what speaks against the run after a replay.

    `theirs` and `ours` are the environments of the run and of the replay. Where they differ in something on which the
    last bits depend, another result proves nothing.
    """
    words = f"steps {result.begin + 1:,} to {result.end:,}"
    if failure is not None:
        yield Finding("undecided", f"{words}: the replay broke off: {failure}")
        return
    for key in READ:
        if None not in (theirs.get(key), ours.get(key)) and theirs[key] != ours[key]:
            yield Finding("differs", f"{words}: the run says that it read other data than its checkpoint names ({key})")
    if result.is_equal:
        return
    what = "the weights" if result.losses == "equal" else f"the numbers from step {result.first_step or 0:,} on"
    words = f"{words}: a replay gives other values for {what}, losses by up to {result.largest_difference:.2g} of them"
    changed = [key for key in BITS if theirs.get(key) != ours.get(key)]
    reasons = [f"{key} was {theirs.get(key)}, here {ours.get(key)}" for key in changed]
    if config.get("training.max_time") is not None:
        reasons.append("training.max_time lets the learning rate follow the clock")
    if str(theirs.get("device", "cpu")).startswith("cuda"):
        reasons.append("on CUDA, sums may have another order each time")
    if reasons:
        yield Finding("undecided", f"{words}; that may be no more than rounding: {'; '.join(reasons)}")
    else:
        yield Finding("differs", f"{words}, with the same versions and processor")
