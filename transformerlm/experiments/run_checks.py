"""What can be checked of a run without training: that its files fit each other, and none was changed afterwards."""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

from config.paths import read_name
from transformerlm.experiments.metric_lines import METRICS, as_record, each_record
from transformerlm.experiments.run_directories import flat_settings
from transformerlm.experiments.saved_checkpoints import SavedCheckpoint
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.tokenizer.tokenizer import Tokenizer

Record = dict[str, Any]
Kind = Literal["differs", "undecided"]
_ROUNDED_SECONDS, _ROUNDED_FACTOR = 0.001, 1e-9
_LONGEST_LINE = 1_000_000
# What may differ between a run's settings and those in its checkpoints.
_PLACES = {"runs_dir", "logging.run_name"}
# A training tells of these before it writes the line of their step; where it ends there, that line never comes.
_BEFORE_THE_LINE = ("step_skipped", "failed")


@dataclass(frozen=True)
class Finding:
    """Something that speaks against a run: it `differs` from what it says, or stays `undecided` here."""

    kind: Kind
    what: str


@dataclass(frozen=True)
class RunLines:
    """The lines of a run: `steps` and `events` in the order of the file.

    `bad` were no JSON objects. No training writes the `foreign`: neither step nor event, or an event with measurements,
    or a last line without an end.
    """

    steps: Sequence[Record]
    events: Sequence[Record]
    bad: int
    foreign: int = 0

    @property
    def last_step(self) -> int:
        """The last step that any line tells of; 0 for none."""
        return max((step_of(one) for one in (*self.steps, *self.events)), default=0)

    @property
    def promised_step(self) -> int:
        """The last step whose line must be there, if its step is one to log; 0 for none."""
        return max(
            (step_of(one) - (one.get("event") in _BEFORE_THE_LINE) for one in (*self.steps, *self.events)), default=0
        )

    @property
    def environment(self) -> Record:
        """The last event `environment`, with dotted keys; empty where there is none."""
        return self.environment_of(self.last_step + 1)

    def environment_of(self, step: int) -> Record:
        """Return the event `environment` of the process that made a step, with dotted keys."""
        events = [one for one in self.events if one["event"] == "environment" and step_of(one) < step]
        return flat_settings(events[-1]) if events else {}

    @property
    def has_unused_start(self) -> bool:
        """Whether a process began after the last step, and made none."""
        return self.last_step > 0 and step_of(self.environment) >= self.promised_step

    @property
    def last_start(self) -> int:
        """The step after which the last process began that made a step."""
        begins = (step_of(one) for one in self.events if one["event"] in ("environment", "started"))
        return max((begin for begin in begins if begin < self.promised_step), default=0)

    @property
    def settings_since(self) -> int:
        """The step after which the run had the settings of now, as far as its lines say."""
        said = {one.get("config_sha256") for one in self.events if one["event"] == "environment"}
        return 0 if len(said) <= 1 else self.last_start

    def saved(self) -> list[int]:
        """Return the steps at which a checkpoint was saved, in order.

        A run that was killed after it saved one, before it said so, went on from there.
        """
        return sorted({step_of(one) for one in self.events if one["event"] in ("checkpoint_saved", "resumed")} - {0})


def read_run_lines(run_dir: Path) -> RunLines:
    """Read all lines of a run; raise OSError where they cannot be read."""
    found = list(each_record(run_dir / METRICS))
    records = [one for one in found if one is not None]
    events = [one for one in records if isinstance(one.get("event"), str) and not _measures(one)]
    # A step in which nothing is learnt has no loss; lines of early versions have no tokens.
    steps = [one for one in records if "event" not in one and one.keys() & {"metrics.loss", "metrics.tokens"}]
    foreign = len(records) - len(events) - len(steps) + _ends_within_a_record(run_dir / METRICS)
    return RunLines(steps, events, len(found) - len(records), foreign)


def _measures(record: Record) -> bool:
    return any(key.startswith("metrics.") for key in record)


def _ends_within_a_record(path: Path) -> bool:
    """Return whether the last line lacks its end, and is a JSON object all the same: others would read it."""
    with open(path, "rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - _LONGEST_LINE))
        return as_record(stream.read().rpartition(b"\n")[2]) is not None


def step_of(record: Mapping[str, Any]) -> int:
    """Return the step of a line; 0 where it has none."""
    step = record.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else 0


def check_lines(lines: RunLines, checkpoints: Sequence[SavedCheckpoint], log_interval: int) -> Iterator[Finding]:
    """Say where lines are missing, out of order, or contradict each other or a checkpoint."""
    if lines.bad:
        yield Finding("differs", f"{METRICS}: {lines.bad} lines are no JSON objects")
    if lines.foreign:
        yield Finding("differs", f"{METRICS}: {lines.foreign} lines are such as no training writes")
    steps = [step_of(one) for one in lines.steps]
    if any(after <= before for before, after in pairwise(steps)):
        yield Finding("differs", f"{METRICS}: expected each step once, in order")
    # With other settings before, not even their log_interval is known.
    begin = lines.settings_since
    expected = range(begin - begin % log_interval + log_interval, lines.promised_step + 1, log_interval)
    yield from _check_all_there([step for step in steps if step > begin], expected)
    by_step, saved = dict(zip(steps, lines.steps, strict=True)), lines.saved()
    for one in checkpoints:
        if one.step not in saved:  # a run that was killed just after it had saved its last one could not say so
            kind: Kind = "undecided" if one is checkpoints[-1] and one.step >= lines.promised_step else "differs"
            yield Finding(kind, f"{one.directory.name}: no line says that it was saved")
        for key, name in (("metrics.tokens", "tokens"), ("metrics.val_loss", "val_loss")):
            said, kept = by_step.get(one.step, {}).get(key), one.state.get(name)
            if said is not None and kept is not None and said != kept:
                yield Finding("differs", f"step {one.step:,}: {key} is {said}, but {kept} in its checkpoint")
    yield from _check_times(lines, checkpoints)
    yield from _check_bits(lines)


def _check_all_there(steps: Sequence[int], expected: range) -> Iterator[Finding]:
    """Say which steps have no line; a damaged line may promise more of them than any memory holds."""
    found = {step for step in steps if step in expected}
    if missing := len(expected) - len(found):
        named = ", ".join(f"{step:,}" for step in islice((step for step in expected if step not in found), 5))
        yield Finding("differs", f"{METRICS}: {missing} lines of steps are missing: {named}{', ...' * (missing > 5)}")


def _check_times(lines: RunLines, checkpoints: Sequence[SavedCheckpoint]) -> Iterator[Finding]:
    """Say where the clock of the lines runs backwards, or past what the checkpoints between them say."""
    times = [(step_of(one), 0, one.get("time.elapsed_s")) for one in lines.steps]
    times += [(one.step, 1, one.state.get("elapsed_s")) for one in checkpoints]
    known = sorted((step, place, float(time)) for step, place, time in times if isinstance(time, int | float))
    for (before, _, earlier), (after, _, later) in pairwise(known):
        if not later >= earlier - _ROUNDED_SECONDS or not math.isfinite(later):
            words = f"{earlier:.3f} s at step {before:,}, then {later:.3f} s at step {after:,}"
            yield Finding("differs", f"time.elapsed_s runs backwards: {words}")


def _check_bits(lines: RunLines) -> Iterator[Finding]:
    """Say where bits per byte do not follow from the validation loss: one factor leads from each to the other."""
    begin = lines.settings_since
    first: tuple[int, float] | None = None
    for one in lines.steps:
        loss, bits = one.get("metrics.val_loss"), one.get("metrics.val_bits_per_byte")
        if step_of(one) <= begin or not isinstance(loss, float) or not isinstance(bits, float) or not loss:
            continue
        first = first or (step_of(one), bits / loss)
        if abs(bits / loss - first[1]) > _ROUNDED_FACTOR * first[1]:
            words = f"at step {step_of(one):,} {bits / loss:.6g} of the loss, at step {first[0]:,} {first[1]:.6g}"
            yield Finding("differs", f"metrics.val_bits_per_byte does not fit metrics.val_loss: {words}")
            return


def check_config(run_dir: Path, lines: RunLines, checkpoints: Sequence[SavedCheckpoint]) -> Iterator[Finding]:
    """Say where the run's settings are not those that it was started with, or those of its newest checkpoint."""
    data = (run_dir / "config.toml").read_bytes()
    said = lines.environment.get("config_sha256")
    found = sha256(data).hexdigest()
    if said is not None and said != found:
        yield Finding("differs", f"config.toml was changed: expected sha256 {str(said)[:12]}..., found {found[:12]}...")
    newest = checkpoints[-1] if checkpoints else None
    if newest is None or newest.step <= lines.last_start:  # started again with other settings, and saved nothing since
        return
    ours = flat_settings_of(data)
    keys = sorted(key for key in {*ours, *newest.config} - _PLACES if ours.get(key) != newest.config.get(key))
    if keys:
        words = ", ".join(f"{key} is {ours.get(key)}, there {newest.config.get(key)}" for key in keys[:5])
        kind: Kind = "undecided" if lines.has_unused_start else "differs"
        yield Finding(kind, f"config.toml has other settings than {newest.directory.name}: {words}")


def flat_settings_of(data: bytes) -> dict[str, Any]:
    """Return the settings in the bytes of a TOML file, by dotted keys; empty where it is none."""
    try:
        return flat_settings(tomllib.loads(data.decode("utf-8")))
    except (ValueError, RecursionError):
        return {}


def check_checkpoints(checkpoints: Sequence[SavedCheckpoint], lines: RunLines) -> Iterator[Finding]:
    """Say which checkpoints were changed, or are of other data or another tokenizer than the run's."""
    environment = lines.environment
    said = {
        "train_sha256": environment.get("data.train.sha256"),
        "tokenizer_sha256": environment.get("tokenizer_sha256"),
    }
    for one in checkpoints:
        yield from (Finding("differs", f"{one.directory.name}: {problem}") for problem in one.problems)
        began_with, found = lines.environment_of(one.step).get("config_sha256"), one.sums.get("config.toml")
        if began_with is not None and found is not None and found != began_with:
            yield Finding("differs", f"{one.directory.name}: its config.toml is not that of the process that saved it")
        kept = one.state.get("data")
        for key, value in said.items():
            if value is not None and isinstance(kept, dict) and kept.get(key) != value:
                yield Finding("differs", f"{one.directory.name}: its {key} is not that of the run")


def check_data(config: Mapping[str, Any], environment: Mapping[str, Any], base: Path) -> Iterator[Finding]:
    """Say which token files and tokenizer are not those that the run was started with, by reading all of them.

    `base` is the directory in which relative paths begin.
    """
    for name in ("train", "valid"):
        path, said = config.get(f"data.{name}"), environment.get(f"data.{name}.sha256")
        if path is None and said is None:
            continue
        if path is None:
            yield Finding("differs", f"data.{name}: the run had such data, but its settings name none")
            continue
        try:
            dataset = TokenDataset(base / read_name(path))
            dataset.check()
        except FileNotFoundError as error:
            yield Finding("undecided", f"data.{name}: {error}")
            continue
        except (OSError, ValueError) as error:
            yield Finding("differs", f"data.{name}: {error}")
            continue
        if said is not None and said != dataset.sha256:
            yield Finding("differs", f"data.{name}: {path} is not the data of the run: its sha256 has changed")
    tokenizer = base / read_name(config.get("data.tokenizer"))
    yield from _check_tokenizer(tokenizer, environment.get("tokenizer_sha256"))


def _check_tokenizer(path: Path, said: object) -> Iterator[Finding]:
    try:
        found = Tokenizer.from_directory(path).fingerprint()
    except (OSError, ValueError) as error:
        kind: Kind = "undecided" if isinstance(error, FileNotFoundError) else "differs"
        yield Finding(kind, f"data.tokenizer: {error}")
        return
    if said is not None and said != found:
        yield Finding("differs", f"data.tokenizer: {path} is not the tokenizer of the run: its sha256 has changed")
