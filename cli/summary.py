"""How a run went, as a few lines for people and facts for the log; and what to do next."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.checkpoints import is_worse
from cli.hints import command_line, hint_lines, hints_are_wanted
from cli.terminal import clock, note, ruled, working
from config.schemas import duration_seconds

if TYPE_CHECKING:
    from config.train import TrainConfig
    from transformerlm.training.run_data import RunData
    from transformerlm.training.state import TrainState
    from transformerlm.training.trainer import Trainer

Facts = dict[str, Any]
PNG_FROM_SECONDS = 30.0
"""A run that has trained for less time gets no PNG: to import matplotlib takes a second or two."""


class Summary:
    """Tells how a run has gone since `begin`: a call at its end returns the facts, and `show` tells them.

    Without `begin` there are no facts. A summary that fails does not end the run: a line says why there is none.
    """

    def __init__(self, run_dir: Path, *, config: TrainConfig, data: RunData) -> None:
        self._run_dir, self._config, self._data = run_dir, config, data
        self._began: tuple[int, int, float] | None = None
        self._facts: Facts = {}

    def begin(self, state: TrainState) -> None:
        """Begin to count steps, tokens and time."""
        self._began = state.step, state.tokens, time.monotonic()

    def __call__(self, state: TrainState) -> Facts:
        """Return the facts for the log."""
        if self._began is None:
            return {}
        step, tokens, began = self._began
        seconds = time.monotonic() - began
        rate = (state.tokens - tokens) / max(seconds, 1e-9)
        facts = {"steps": state.step - step, "seconds": seconds, "tokens_per_second": rate}
        try:
            self._facts = facts | facts_of(state, run_dir=self._run_dir, config=self._config, data=self._data)
        except (OSError, ValueError) as error:
            note(f"no summary: {error}")
        return self._facts

    def show(self, trainer: Trainer) -> None:
        """Say how the run went, draw its curve, and say what to do next."""
        pictures = draw_loss_curve(self._run_dir, seconds=trainer.state.elapsed_s)
        if not self._facts:
            return
        title = f"{self._run_dir}: step {trainer.state.step:,}"
        note("\n".join(["", ruled(title), *rows(self._facts, pictures=pictures)]))
        say_what_next(next_commands(trainer, self._run_dir, self._facts))


def say_what_next(commands: list[tuple[str, str]]) -> None:
    """Show commands to paste, unless the command that runs this one says what is next."""
    if hints_are_wanted():
        note("\n".join(["", *hint_lines(commands)]))


def draw_loss_curve(run_dir: Path, *, seconds: float) -> list[Path]:
    """Draw the loss of a run that has trained for `seconds`; return the pictures. A failure is one line, no error.

    `loss.svg` takes no time. `loss.png` comes after it, if matplotlib is installed and the run was long enough.
    """
    from transformerlm.experiments import loss_curve

    drawn: list[Path] = []
    try:
        try:
            curve = loss_curve.read_loss_curve(run_dir)
        except ValueError:  # the run is too short for a curve
            return drawn
        drawn.append(loss_curve.save_svg(curve, run_dir / "loss.svg"))
        if seconds >= PNG_FROM_SECONDS and loss_curve.can_draw_png():
            with working("drawing the loss curve"):
                drawn.append(loss_curve.save_png(curve, run_dir / "loss.png"))
    except Exception as error:  # the run is saved by now, and a library may fail in its own ways
        note(f"no picture of the loss: {error}")
    return drawn


# --- facts -------------------------------------------------------------------------------------------------------


def facts_of(state: TrainState, *, run_dir: Path, config: TrainConfig, data: RunData) -> Facts:
    """Return a run's losses over all its starts, what its text costs without a model, and its passes over the data."""
    with (run_dir / "metrics.jsonl").open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines if '"metrics.' in line]
    losses = [record["metrics.loss"] for record in records if isinstance(record.get("metrics.loss"), float)]
    facts: Facts = {"passes_over_data": state.tokens / data.train.num_learnt}
    if losses:
        facts["train_loss"] = statistics.fmean(losses[-max(1, len(losses) // 10) :])
    best = {"best_checkpoint_step": state.best_step, "best_checkpoint_val_loss": state.best_val_loss}
    return facts | _validations(records) | _yardsticks(config, data) | best


def _validations(records: list[Facts]) -> Facts:
    found = [record for record in records if isinstance(record.get("metrics.val_loss"), float)]
    if not found:
        return {}
    best, last = min(found, key=lambda record: record["metrics.val_loss"]), found[-1]
    return {
        f"{name}{key}": record[f"metrics.{key}" if key != "val_step" else "step"]
        for name, record in (("best_", best), ("", last))
        for key in ("val_loss", "val_bits_per_byte", "val_step")
    }


def _yardsticks(config: TrainConfig, data: RunData) -> Facts:
    from transformerlm.training.build import num_validation_windows
    from transformerlm.training.yardsticks import yardsticks

    if data.valid is None or data.valid.has_mask:  # they would measure what nobody learns, too
        return {}
    if config.data.packing == "documents":  # a validation reads other parts of the text
        return {}
    num_tokens = num_validation_windows(config, len(data.valid)) * config.model.context_length
    targets = data.valid.tokens[1 : num_tokens + 1]  # the tokens that a validation predicts
    measured = yardsticks(data.train.tokens, targets, data.tokenizer)
    return vars(measured) if measured else {}


# --- words -------------------------------------------------------------------------------------------------------


def rows(facts: Facts, *, pictures: Sequence[Path]) -> Iterator[str]:
    """Yield the lines for people, which are shorter than 80 columns unless a path is long."""
    if "val_loss" in facts:
        best, last = (f"{facts[f'{name}val_loss']:.3f} at step {facts[f'{name}val_step']:,}" for name in ("best_", ""))
        is_last = facts["best_val_step"] == facts["val_step"]
        yield _row("validation loss", f"{best}, the lowest{' and last' if is_last else f'; {last}, the last'}")
    if "train_loss" in facts:
        passes = f"{facts['passes_over_data']:.2g} passes over the data"
        yield _row("training loss", f"{facts['train_loss']:.3f} at the end, after {passes}")
    if "val_loss" in facts:
        text = f"{facts['best_val_bits_per_byte']:.3f}"
        if "gzip_bits_per_byte" in facts:
            text += f"; by gzip {facts['gzip_bits_per_byte']:.3f}, by the tokens' frequencies "
            text += f"{facts['unigram_bits_per_byte']:.3f}"
        yield _row("bits per byte", text)
    speed = f"{facts['tokens_per_second']:,.0f} tokens/s overall"
    steps = f"{facts['steps']:,} step{'s' * (facts['steps'] != 1)}"
    yield _row("time", f"{clock(facts['seconds'])} for {steps}, {speed}")
    if pictures:
        yield _row("loss curve", ", ".join([str(pictures[0]), *(picture.name for picture in pictures[1:])]))
    if has_risen(facts):
        yield f"   Validation has risen since step {facts['best_val_step']:,}: {_best(facts)}."


def has_risen(facts: Facts) -> bool:
    """Return whether the last validation loss is clearly above the lowest."""
    return "val_loss" in facts and is_worse(facts["val_loss"], facts["best_val_loss"])


def _best(facts: Facts) -> str:
    step, loss = facts["best_checkpoint_step"], facts["best_checkpoint_val_loss"]
    if step is None:
        return "no checkpoint has a validation loss"
    return f"`best` is step {step:,}" + ("" if step == facts["best_val_step"] else f", with {loss:.3f}")


def _row(name: str, text: str) -> str:
    return f"   {name:<17}{text}"


# --- what next ---------------------------------------------------------------------------------------------------


def next_commands(trainer: Trainer, run_dir: Path, facts: Facts) -> list[tuple[str, str]]:
    """Return what to do with the run next, each with its command."""
    best = facts["best_checkpoint_step"]
    better = best not in (None, trainer.state.step) and has_risen(facts)
    checkpoint = f"--checkpoint={run_dir / 'best' if better else run_dir}"
    commands = [("talk to it: type a beginning and Enter; Ctrl-D ends", command_line("infer", checkpoint))]
    if "chat" in trainer.data.train.metadata:
        commands = [("talk to it: type a message and Enter; Ctrl-D ends", command_line("chat", checkpoint))]
    if valid := trainer.config.data.valid:
        measure = command_line("eval", checkpoint, f"--input={valid}")
        commands.append(("measure it on the whole validation text", measure))
    output = f"--output={run_dir / 'hf'}"
    commands.append(("give it to others, as a folder for transformers", command_line("export", checkpoint, output)))
    if has_risen(facts) or trainer.runtime.world.is_distributed:
        return commands  # more steps would make it worse; torchrun's own options are not known here
    return [*commands, going_on(trainer, run_dir)]


def going_on(trainer: Trainer, run_dir: Path) -> tuple[str, str]:
    """Return the command that trains the run further, depending on what ended it."""
    training = trainer.config.training
    if trainer.stopped_by == "max_time" and training.max_time:
        longer, times = _longer(training.max_time, trainer.state.time_used)
        words, changes = "train it further, to twice the time", [f"--training.max_time={longer}"]
        if training.max_steps < times * trainer.state.step:
            changes.append(f"--training.max_steps={times * training.max_steps}")
    elif trainer.stopped_by == "max_steps":
        words, changes = "train it further, to twice the steps", [f"--training.max_steps={2 * training.max_steps}"]
        changes += ["--training.max_time=none"] if training.max_time else []
    elif trainer.stopped_by == "early_stop":
        words, changes = "train it further all the same", ["--training.early_stop_patience=0"]
        changes += ["--training.early_stop_min_delta=0"] if training.early_stop_min_delta else []
    else:
        words, changes = "go on where it stopped", []
    return words, command_line("train", f"--config={run_dir / 'config.toml'}", *changes)


def _longer(duration: str, used: float) -> tuple[str, int]:
    """Return twice the duration, doubled again until it leaves time to go on after the seconds used; how many times."""
    times = 2
    while times * duration_seconds(duration) < 1.5 * used:
        times *= 2
    return f"{times * float(duration[:-1]):.12g}{duration[-1]}", times
