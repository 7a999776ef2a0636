"""How a run went: lines for people, a record for the log, and commands to paste."""

from __future__ import annotations

import math
import os
import shlex
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from cli import summary
from cli.entry import STOP_CODES
from tests.cli.commands import call
from tests.training.faults import poison, stop_before
from tests.training.tiny_run import read_records
from transformerlm.experiments import loss_curve
from transformerlm.experiments.loss_curve import read_loss_curve, save_svg
from transformerlm.training.loop import EvalResult
from transformerlm.training.trainer import Trainer

FACTS = {
    "steps": 600,
    "seconds": 242.0,
    "tokens_per_second": 5080.0,
    "passes_over_data": 18.9,
    "train_loss": 1.78,
    "best_val_loss": 5.925,
    "best_val_bits_per_byte": 2.69,
    "best_val_step": 240,
    "val_loss": 6.22,
    "val_bits_per_byte": 2.82,
    "val_step": 600,
    "gzip_bits_per_byte": 2.953,
    "unigram_bits_per_byte": 3.412,
    "best_checkpoint_step": 240,
    "best_checkpoint_val_loss": 5.925,
}


def commands_in(stderr: str) -> dict[str, list[str]]:
    """Return the proposed commands: their arguments by their explanation."""
    lines = stderr.splitlines()
    return {line: shlex.split(lines[index + 1]) for index, line in enumerate(lines) if line.startswith("# ")}


def test_the_story_is_told_in_a_few_lines():
    """The lines have best and last loss with their steps, yardsticks, passes, time and speed, and tell of a rise."""
    lines = list(summary.rows(FACTS, pictures=[Path("runs/first/loss.svg"), Path("runs/first/loss.png")]))
    assert lines == [
        "   validation loss  5.925 at step 240, the lowest; 6.220 at step 600, the last",
        "   training loss    1.780 at the end, after 19 passes over the data",
        "   bits per byte    2.690; by gzip 2.953, by the tokens' frequencies 3.412",
        "   time             4:02 for 600 steps, 5,080 tokens/s overall",
        "   loss curve       runs/first/loss.svg, loss.png",
        "   Validation has risen since step 240: `best` is step 240.",
    ]
    assert all(len(line) < 80 for line in lines)


def test_a_best_checkpoint_of_another_step_is_told_with_its_loss():
    """The lowest loss may have been at a step that was not saved."""
    facts = FACTS | {"best_checkpoint_step": 200, "best_checkpoint_val_loss": 5.96}
    assert list(summary.rows(facts, pictures=[]))[-1].endswith("since step 240: `best` is step 200, with 5.960.")
    facts["best_checkpoint_step"] = None
    assert list(summary.rows(facts, pictures=[]))[-1].endswith("no checkpoint has a validation loss.")


def test_a_run_without_validation_has_fewer_lines():
    """What was not measured is not told."""
    facts = {name: FACTS[name] for name in ("steps", "seconds", "tokens_per_second", "passes_over_data", "train_loss")}
    assert [line.split()[0] for line in summary.rows(facts, pictures=[])] == ["training", "time"]


def test_the_log_has_the_same_numbers(pipeline):
    """Before its end the log has the summary of all validations."""
    records = read_records(pipeline.run)
    told, losses = records[-2], [record["metrics.val_loss"] for record in records if "metrics.val_loss" in record]
    assert (told["event"], told["step"], told["steps"]) == ("summary", 12, 12)
    assert (told["val_loss"], told["best_val_loss"]) == (losses[-1], min(losses))
    assert told["passes_over_data"] > 0
    assert 0 < told["gzip_bits_per_byte"] < 8
    assert told["unigram_bits_per_byte"] > 0
    assert f"validation loss  {told['best_val_loss']:.3f} at step {told['best_val_step']}" in pipeline.outcome.stderr


def test_every_run_has_its_curve(pipeline, tmp_path):
    """It shows the steps and validations of the run's lines, under the run's name; a short run gets no PNG."""
    curve = read_loss_curve(pipeline.run)
    assert (curve.title, curve.steps.steps.tolist()) == ("run", list(range(1, 13)))
    assert curve.valid.steps.tolist() == [4, 5, 8, 10, 12]
    assert (pipeline.run / "loss.svg").read_bytes() == save_svg(curve, tmp_path / "loss.svg").read_bytes()
    assert not (pipeline.run / "loss.png").exists()


@pytest.mark.parametrize("ending", ["a signal", "an error"])
def test_a_run_of_some_time_has_a_png_whatever_ended_it(ending, pipeline, tmp_path, monkeypatch):
    """With matplotlib, the PNG comes after the SVG, after a signal and after losses that are not finite, too."""
    monkeypatch.setattr(summary, "PNG_FROM_SECONDS", 0.0)
    if ending == "a signal":
        stop_before(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    else:
        poison(monkeypatch, {6: math.nan})
    done = call("train", "--config", pipeline.train_toml, "--runs_dir", tmp_path, "--training.max_skipped_steps=0")
    assert done.code == {"a signal": STOP_CODES["SIGTERM"], "an error": 1}[ending], done.stderr
    assert ("loss.svg, loss.png" in done.stderr) == (ending == "a signal")
    assert (tmp_path / "run/loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "training" in (tmp_path / "run/loss.svg").read_text()


def test_the_commands_can_be_pasted(pipeline, tmp_path):
    """Each proposed command runs as it is: talk, measure, give away, train further."""
    proposed = commands_in(pipeline.outcome.stderr)
    verbs = [Path(words[0]).name.removeprefix("transformerlm-") for words in proposed.values()]
    assert verbs == ["infer", "eval", "export", "train"]
    for verb, words in zip(verbs, proposed.values(), strict=True):
        options = [word.replace(f"--output={pipeline.run}", f"--output={tmp_path}") for word in words[1:]]
        if verb == "train":  # the fixture's run must not change
            options += ["--runs_dir", str(tmp_path)]
        done = call(verb, *options, stdin="Ada\n")
        assert done.code == 0, done.stderr


@pytest.mark.parametrize("limit", [{"max_time": "1h"}, {}], ids=["with max_time", "without"])
def test_twice_the_steps_are_not_cut_by_the_time(limit, pipeline, tmp_path):
    """The command to train further removes a time limit that would end it early."""
    options = [f"--training.{name}={value}" for name, value in limit.items()]
    done = call("train", "--config", pipeline.train_toml, "--runs_dir", tmp_path, *options)
    words = commands_in(done.stderr)["# train it further, to twice the steps"]
    assert words[2:] == ["--training.max_steps=24", *(["--training.max_time=none"] if limit else [])]


def trained(stopped_by, **training):
    """Return a stand-in of a trainer that has ended at step 100, after 60 s."""
    settings = {"max_steps": 115, "max_time": "60s", "early_stop_patience": 3, "early_stop_min_delta": 0.0} | training
    state = SimpleNamespace(step=100, time_used=60.0)
    return SimpleNamespace(
        config=SimpleNamespace(training=SimpleNamespace(**settings)), state=state, stopped_by=stopped_by
    )


@pytest.mark.parametrize(
    ("stopped_by", "training", "options"),
    [
        ("max_time", {}, ["--training.max_time=120s", "--training.max_steps=230"]),
        ("max_time", {"max_steps": 1000}, ["--training.max_time=120s"]),
        ("max_time", {"max_time": "20s"}, ["--training.max_time=160s", "--training.max_steps=920"]),
        ("early_stop", {}, ["--training.early_stop_patience=0"]),
        (
            "early_stop",
            {"early_stop_min_delta": 0.01},
            ["--training.early_stop_patience=0", "--training.early_stop_min_delta=0"],
        ),
    ],
)
def test_what_ended_a_run_is_taken_away(stopped_by, training, options, tmp_path):
    """The command goes on for as long as it says: no other limit comes first, and no setting is refused."""
    _, line = summary.going_on(trained(stopped_by, **training), tmp_path)
    assert shlex.split(line)[-len(options) - 1 :] == [f"--config={tmp_path / 'config.toml'}", *options]


def test_a_rise_of_the_validation_loss_is_told_and_leads_to_the_best(pipeline, tmp_path, monkeypatch):
    """The commands then take `best`, and none trains further; infer says how much worse the newest is."""
    losses = {5: 2.0, 10: 4.0, 12: 9.0}
    monkeypatch.setattr(Trainer, "validate", lambda self: EvalResult(losses[self.state.step], bits_per_byte=1.0))
    done = call("train", "--config", pipeline.train_toml, "--runs_dir", tmp_path, "--training.eval_interval=5")
    assert "   Validation has risen since step 5: `best` is step 5.\n" in done.stderr
    proposed = commands_in(done.stderr)
    assert {words[1] for words in proposed.values()} == {f"--checkpoint={tmp_path / 'run/best'}"}
    assert len(proposed) == 3
    done = call("infer", f"--checkpoint={tmp_path / 'run'}", "--prompt=Ada", "--sampling.max_new_tokens=2")
    best = f"its best is {tmp_path / 'run/best'}: step 5, val loss 2.000"
    assert done.stderr == f"{tmp_path / 'run'}: step 12, val loss 9.000; {best}\n"


def test_a_command_that_runs_others_says_itself_what_is_next(pipeline, tmp_path, monkeypatch):
    """TRANSFORMERLM_HINTS=0 leaves the commands out, and nothing else."""
    monkeypatch.setenv("TRANSFORMERLM_HINTS", "0")
    done = call("train", "--config", pipeline.train_toml, "--runs_dir", tmp_path)
    assert "validation loss" in done.stderr
    assert commands_in(done.stderr) == {}


@pytest.mark.parametrize(
    ("place", "name", "line"),
    [
        (summary, "facts_of", "no summary"),
        (loss_curve, "save_svg", "no picture of the loss"),
        (loss_curve, "save_png", "no picture of the loss"),
    ],
    ids=["facts", "svg", "png"],
)
def test_a_summary_that_fails_ends_no_run(place, name, line, pipeline, tmp_path, monkeypatch):
    """The run is saved by then: a full disk or a lost log costs one line, and the rest is still shown."""

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(summary, "PNG_FROM_SECONDS", 0.0 if name == "save_png" else math.inf)
    monkeypatch.setattr(place, name, fail)
    done = call("train", "--config", pipeline.train_toml, "--runs_dir", tmp_path)
    assert done.code == 0
    assert done.stderr.count(f"{line}: [Errno 28] No space left on device\n") == 1
    assert ("validation loss  " in done.stderr) == (name != "facts_of")
    assert ("loss curve  " in done.stderr) == (name == "save_png")
    assert (tmp_path / "run/loss.svg").exists() == (name != "save_svg")
    assert done.records[-1]["event"] == "finished"


def test_losses_that_are_not_numbers_are_left_out():
    """A loss that was written as "nan" is neither the lowest nor the last."""
    lines = [
        {"step": 2, "metrics.loss": 3.0, "metrics.val_loss": 3.5, "metrics.val_bits_per_byte": 1.5},
        {"step": 3, "metrics.loss": "nan", "metrics.val_loss": "nan", "metrics.val_bits_per_byte": "nan"},
    ]
    numbers = {"val_loss": 3.5, "val_bits_per_byte": 1.5, "val_step": 2}
    assert summary._validations(lines) == numbers | {f"best_{name}": value for name, value in numbers.items()}
    assert summary._validations(lines[1:]) == {}


@pytest.mark.parametrize(
    ("duration", "used", "longer"),
    [("2m", 125.0, "4m"), ("1.5h", 5400.0, "3h"), ("1s", 5.0, "8s"), ("90s", 90.1, "180s")],
)
def test_twice_the_time_is_more_than_was_used(duration, used, longer):
    """A run that a slow step took far over its limit gets time to go on, too."""
    assert summary._longer(duration, used)[0] == longer
