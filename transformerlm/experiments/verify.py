"""Whether a run is what it says: its files are checked, and parts of it, chosen by chance, are made once more.

Nothing is written to the run's directory. What a run says is its lines, its settings and its checkpoints. Training is a
function of settings, data and seed, so the same steps from the same checkpoint give the same losses and the same
weights, bit for bit, on the same kind of machine with the same versions.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from config.paths import read_name
from transformerlm.experiments import run_checks
from transformerlm.experiments.metric_lines import METRICS
from transformerlm.experiments.replay import (
    Replay,
    Segment,
    choose_segments,
    findings_of,
    replay,
    segments_of,
)
from transformerlm.experiments.run_checks import Finding, Record, RunLines
from transformerlm.experiments.run_directories import check_is_run, is_held
from transformerlm.experiments.saved_checkpoints import SavedCheckpoint, checkpoint_directories, read_checkpoint
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.utils import environment as here

CANNOT_KNOW = (
    "times: a clock leaves no trace that a replay could repeat; beside the run's seconds are those of the replay",
    "steps that were not replayed: lines and checkpoints that fit each other and were never trained pass there",
    "the text behind the token files, and how often a run was tried before",
)
"""What no verification of this kind can know."""


def verify(run_dir: Path, *, share: float, seed: int, note: Callable[[str], None] = lambda line: None) -> Record:
    """Check a run, replay at least `share` of its steps, drawn by `seed`, and return the receipt.

    The receipt's `verdict` is "verified", "differs" where something is not as the run says, or "undecided" where this
    machine cannot tell; `findings` says why. `note` gets a line for each part of the work.

    Raises:
        ValueError: the directory holds no run, the run trains now, or it has no checkpoint.
    """
    _refuse_no_run(run_dir)
    lines, config = run_checks.read_run_lines(run_dir), _config(run_dir)
    note("checking the files")
    checkpoints = [read_checkpoint(path, step) for step, path in checkpoint_directories(run_dir).items()]
    if not checkpoints:
        raise ValueError(f"{run_dir}: expected a run with a checkpoint, found none")
    base = _base(lines.environment, config)
    findings = list(_static_findings(run_dir, lines, checkpoints, config=config, base=base))
    segments = segments_of([one.step for one in checkpoints], lines.saved())
    wanted = max(1, round(share * lines.last_step))
    chosen = choose_segments(segments, num_steps=wanted, seed=seed)
    findings += _too_few(segments, wanted, lines, config)
    findings += _no_end(segments, lines)
    whole = {one.step: one for one in checkpoints if not one.problems}
    replays: list[Replay] = []
    for segment in chosen:
        if segment.end in whole and segment.begin in {0, *whole}:  # the others have been found to be changed
            note(f"replaying steps {segment.begin + 1:,} to {segment.end:,}")
            result, more = _replay(segment, whole, lines, base)
            replays.append(result)
            findings += more
    return _receipt(run_dir, lines, config, findings=findings, replays=replays, share=share, seed=seed)


def _refuse_no_run(run_dir: Path) -> None:
    check_is_run(run_dir)
    if not (run_dir / "config.toml").is_file():
        raise ValueError(f"{run_dir}: expected the directory of a run, found no config.toml in it")
    if is_held(run_dir):
        raise ValueError(f"{run_dir}: this run trains now; verify it when it has ended")


def _config(run_dir: Path) -> dict[str, Any]:
    config = run_checks.flat_settings_of((run_dir / "config.toml").read_bytes())
    if not config:
        raise ValueError(f"{run_dir / 'config.toml'}: expected a TOML file, found something else")
    return config


def _base(environment: Mapping[str, Any], config: Mapping[str, Any]) -> Path:
    """Return the directory in which the paths of the settings begin: this one, or where the run was started.

    It is the first in which the run's data are, or else the first with data of that name.
    """
    name, said = read_name(config.get("data.train")), environment.get("data.train.sha256")
    places = [Path.cwd(), Path(str(environment.get("directory") or ""))]
    there = [place for place in places if (place / name).exists()]
    return next((place for place in there if _sum_of(place / name) == said), [*there, *places][0])


def _sum_of(path: Path) -> str | None:
    try:
        return TokenDataset(path).sha256
    except (OSError, ValueError):
        return None


def _static_findings(
    run_dir: Path,
    lines: RunLines,
    checkpoints: Sequence[SavedCheckpoint],
    *,
    config: Mapping[str, Any],
    base: Path,
) -> list[Finding]:
    log_interval = config.get("training.log_interval", 1)
    if not isinstance(log_interval, int) or log_interval < 1:
        raise ValueError(f"{run_dir / 'config.toml'}: training.log_interval: expected steps, found {log_interval!r}")
    is_known = all(one.config.get("training.log_interval", 1) == log_interval for one in checkpoints if one.config)
    findings = [
        *run_checks.check_lines(lines, checkpoints, log_interval if is_known else lines.last_step + 1),
        *run_checks.check_config(run_dir, lines, checkpoints),
        *run_checks.check_checkpoints(checkpoints, lines),
        *run_checks.check_data(config, lines.environment, base),
    ]
    if not lines.environment:
        what = "no line says with what the run was made (the event environment); so its settings and data are not known"
        findings.append(Finding("undecided", f"{METRICS}: {what}"))
    return findings


def _too_few(segments: Sequence[Segment], wanted: int, lines: RunLines, config: Mapping[str, Any]) -> list[Finding]:
    """Say so where the checkpoints that are there do not allow to replay as many steps as wanted."""
    possible = sum(one.steps for one in segments)
    if possible >= wanted:
        return []
    total, keep = max(1, lines.last_step), config.get("checkpoint.keep")
    found = f"{possible / total:.1%} of its steps can be replayed, {wanted / total:.1%} were asked for"
    advice = f"a segment needs the checkpoint before it: set checkpoint.keep (here {keep}) to {len(lines.saved())}"
    return [Finding("undecided", f"{found}; {advice} or more for the next run")]


def _no_end(segments: Sequence[Segment], lines: RunLines) -> list[Finding]:
    """Say so where the run's last steps cannot be replayed, which made the model that others use."""
    last = segments[-1].end if segments else 0
    if last == lines.last_step:
        return []
    words = f"steps {last + 1:,} to {lines.last_step:,} cannot be replayed: no two checkpoints hold them"
    return [Finding("undecided", words)]


def _replay(
    segment: Segment, whole: Mapping[int, SavedCheckpoint], lines: RunLines, base: Path
) -> tuple[Replay, list[Finding]]:
    start, goal = whole.get(segment.begin), whole[segment.end]
    theirs = lines.environment_of(segment.end)
    with tempfile.TemporaryDirectory(prefix="transformerlm-verify-") as folder:
        result, ours, failure = replay(
            segment,
            goal,
            lines,
            start=start.directory if start and segment.begin else None,
            scratch=Path(folder),
            base=base,
        )
    if theirs.get("processes", 1) != 1 and failure is None and not result.is_equal:
        words = f"steps {segment.begin + 1:,} to {segment.end:,}"
        return result, [Finding("undecided", f"{words}: made by {theirs['processes']} processes, replayed by one")]
    return result, list(findings_of(result, failure, theirs=theirs, ours=ours, config=goal.config))


def _receipt(
    run_dir: Path,
    lines: RunLines,
    config: Mapping[str, Any],
    *,
    findings: Sequence[Finding],
    replays: Sequence[Replay],
    share: float,
    seed: int,
) -> Record:
    kinds = {one.kind for one in findings}
    validated = [one for one in lines.steps if "metrics.val_bits_per_byte" in one]
    replayed = sum(one.end - one.begin for one in replays)
    return {
        "run": run_dir.resolve().name,
        "verdict": "differs" if "differs" in kinds else "undecided" if kinds else "verified",
        "findings": [{"kind": one.kind, "what": one.what} for one in findings],
        "steps": lines.last_step,
        "share_asked_for": share,
        "share_replayed": replayed / max(1, lines.last_step),
        "seed": seed,
        "replays": [one.as_record() for one in replays],
        "last_validation": _numbers_of(validated[-1]) if validated else None,
        "sha256": {name: sha256((run_dir / name).read_bytes()).hexdigest() for name in ("config.toml", METRICS)},
        "environment": {key: value for key, value in lines.environment.items() if key not in ("event", "step")},
        "verified_with": _ours(),
        "cannot_know": list(CANNOT_KNOW),
    }


def _numbers_of(line: Record) -> Record:
    keys = ("step", "metrics.val_loss", "metrics.val_bits_per_byte", "time.elapsed_s")
    return {key: line[key] for key in keys if key in line}


def _ours() -> Record:
    return {
        "versions.transformerlm": here.installed_version("transformerlm"),
        "versions.torch": here.installed_version("torch"),
        "versions.python": platform.python_version(),
        "processor": here.cpu_model(),
        "processors": os.cpu_count(),
        "platform": platform.platform(),
        "source_sha256": here.source_sha256(),
    }
