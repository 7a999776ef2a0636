"""`transformerlm-train`: JSON lines on stdout, words for people on stderr, and refusals in one line."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
import torch

import logger
from cli import prepare_run
from cli import train as command
from cli.terminal import framed
from config.io import dump_toml, load_config, read_toml
from config.train import TrainConfig
from tests.cli.commands import ROOT, call, call_in_terminal, lines_on_screen
from tests.training.faults import Killed, kill_at, stop_before
from tests.training.test_resume_checks import what_tells_them_apart
from tests.training.tiny_run import read_records, step_lines, tiny_config
from transformerlm.checkpoints import save
from transformerlm.checkpoints.directory import newest_whole, resolve, step_of
from transformerlm.checkpoints.load import load_model
from transformerlm.distributed.world import World
from transformerlm.inference.predictor import Predictor
from transformerlm.training.loop import EvalResult
from transformerlm.training.planning.calibration import estimate_seconds
from transformerlm.training.trainer import Trainer
from transformerlm.utils.interrupts import ctrl_c_held_back


def test_stdout_is_the_log_file_line_by_line(pipeline):
    """Every line on stdout is JSON, and the lines are those of metrics.jsonl."""
    assert pipeline.outcome.code == 0
    assert pipeline.outcome.records == read_records(pipeline.run)


def test_the_first_line_announces_the_run(pipeline):
    """Before the first step, one line has parameters, tokens per step, FLOPs, memory, device and ETA."""
    first = pipeline.outcome.records[0]
    assert first["event"] == "started"
    assert first["tokens_per_step"] == 8 * 16
    assert (first["step"], first["max_steps"], first["device"], first["precision"]) == (0, 12, "cpu", "fp32")
    for key in ("parameters", "flops_per_token", "memory_estimate_bytes", "eta_seconds"):
        assert first[key] > 0, key
    assert f"{first['parameters']:,} parameters" in pipeline.outcome.stderr.splitlines()[0]


def test_samples_come_while_training(pipeline):
    """The lines have samples at their interval, and people see them, too."""
    samples = [record for record in pipeline.outcome.records if record.get("event") == "sample"]
    assert [sample["step"] for sample in samples] == [6, 12]
    for sample in samples:
        assert framed(f"step {sample['step']}", sample["text.output"]) in pipeline.outcome.stderr


def test_the_order_of_a_step_is_kept(pipeline):
    """A checkpoint is announced after its step's line, and the run's end comes last."""
    told = [(record.get("event", "step"), record["step"]) for record in pipeline.outcome.records]
    assert told.index(("step", 5)) < told.index(("checkpoint_saved", 5)) < told.index(("step", 6))
    last = [event for event, step in told if step == 12]
    assert last.index("checkpoint_saved") < last.index("summary") < last.index("finished") == len(last) - 1


def test_a_report_is_written_if_asked_for(pipeline, tmp_path):
    """With logging.report the run's directory has a report of its end; where it cannot be, the run ends well, too."""
    changes = [f"--runs_dir={tmp_path}", "--training.max_steps=4", "--logging.report=true"]
    taken = tmp_path / "second" / "report.html"
    taken.mkdir(parents=True)
    for name in ("first", "second"):
        done = call("train", "--config", pipeline.train_toml, *changes, f"--logging.run_name={name}")
        assert done.code == 0, done.stderr
        assert ("no report: " in done.stderr) == (name == "second")
    text = (tmp_path / "first" / "report.html").read_text()
    assert "first finished after 4 steps." in text
    assert not (pipeline.run / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--data.train=nowhere.npy", "nowhere.npy: no such token file"),
        ("--data.valid=nowhere.npy", "nowhere.npy: no such token file"),
        ("--data.tokenizer=nowhere", "nowhere"),
        ("--model.context_length=1000000", "fewer than model.context_length + 1 = 1000001"),
        ("--model.vocab_size=289", "model.vocab_size (289) is smaller than the tokenizer's (290)"),
        ("--training.device=cuda:99", "cuda:99"),
        ("--checkpoint.resume=required", "no checkpoint to resume"),
        ("--model.d_model=1000000", "training needs about"),
        ("--samples.prompts=caf\udce9", "samples.prompts.0: expected text in UTF-8"),
        ("--data.train=caf\udce9.npy", "data.train: expected text in UTF-8"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(change, message, pipeline, tmp_path):
    """Preflight refuses with exit 2 and one line before anything is written."""
    done = call("train", "--config", pipeline.train_toml, "--runs_dir", tmp_path / "runs", change)
    assert (done.code, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_backend_that_is_not_installed_is_refused_before_the_run_is_there(package, pipeline, tmp_path, monkeypatch):
    """Without the package nothing is written, not even a directory, whatever other backends are named."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    where = ("--config", pipeline.train_toml, "--runs_dir", tmp_path / "runs")
    done = call("train", *where, f"--logging.backend=console,{package}")
    assert (done.code, len(done.stderr.splitlines())) == (2, 1)
    assert f"{package} is not installed" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs the extra tensorboard")
def test_tensorboard_has_what_the_file_has_after_a_kill_too(pipeline, tmp_path):
    """Its event files are in the run directory, with each step once and the settings; stdout has the lines, too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"logging.backend": ["json", "tensorboard"], "samples.interval": 4}
    config = tiny_config(pipeline.files, tmp_path, changes)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, step=8)
        with pytest.raises(Killed):
            command.train(config)
    (tmp_path / "train.toml").write_text(dump_toml(config))
    done = call("train", "--config", tmp_path / "train.toml")
    assert done.records[-1]["event"] == "finished"
    found = EventAccumulator(str(tmp_path / "run/tensorboard"))
    found.Reload()
    lines = step_lines(tmp_path / "run")
    for key in ("metrics.loss", "metrics.val_loss"):
        points = [(point.step, point.value) for point in found.Scalars(key)]
        assert points == [(line["step"], pytest.approx(line[key])) for line in lines if key in line]
    assert [sample.step for sample in found.Tensors("sample/1")] == [4, 8, 12]
    settings = found.Tensors("config")[0].tensor_proto.string_val[0].decode()
    assert json.loads(settings)["logging"]["backend"] == ["json", "tensorboard"]


def test_a_prompt_that_is_refused_is_refused_before_the_run_is_there(pipeline, tmp_path, monkeypatch):
    """A prompt is checked before the first step, as the first sample would check it, and nothing is written."""

    def refuse(self, prompt, *_):
        raise ValueError(f"predictor: {prompt} cannot be read")

    monkeypatch.setattr(Predictor, "_encode", refuse)
    done = call("train", "--config", pipeline.train_toml, f"--runs_dir={tmp_path / 'runs'}", "--samples.prompts=One")
    assert done.code == 2
    assert done.stderr.splitlines()[-1] == "error: predictor: One cannot be read"
    assert not (tmp_path / "runs").exists()


def test_validating_on_the_training_data_is_said(pipeline, tmp_path):
    """Even under another file name, one line says that the validation loss is that of training text."""
    for suffix in (".npy", ".json"):
        shutil.copy(pipeline.files.train.with_suffix(suffix), tmp_path / f"other{suffix}")
    done = call("train", "--config", pipeline.train_toml, "--runs_dir", tmp_path, f"--data.valid={tmp_path}/other.npy")
    assert done.code == 0
    assert done.stderr.splitlines()[0].startswith("warning: data.valid holds the same tokens as data.train")
    assert "same tokens" not in pipeline.outcome.stderr


@pytest.mark.parametrize("limit", ["max_steps", "early_stop_patience", "max_time"])
def test_a_finished_run_says_so(limit, pipeline, tmp_path, monkeypatch):
    """The same command names what ended the run and what to raise, instead of an ETA for no steps."""
    monkeypatch.setattr(Trainer, "validate", lambda self: EvalResult(loss=1.0 + self.state.step, bits_per_byte=1.0))
    setting = {"max_steps": "12", "early_stop_patience": "1", "max_time": "0.01s"}[limit]
    arguments = ("--config", pipeline.train_toml, "--runs_dir", tmp_path, f"--training.{limit}={setting}")
    first = call("train", *arguments)
    settings = (tmp_path / "run/config.toml").read_text()
    second = call("train", *arguments, "--training.seed=77")
    assert (first.code, second.code) == (0, 0)
    assert (tmp_path / "run/config.toml").read_text() == settings  # nothing was trained with another seed
    assert {record.get("event") for record in second.records} == {"finished"}
    assert "ETA" in first.stderr
    step = first.records[-1]["step"]
    *_, said, _, _, command_line = second.stderr.splitlines()
    reason = f"training.{limit} = {setting}"
    assert said == f"nothing left to do: the run has ended at step {step} by {reason}; raise it to go on"
    assert "ETA" not in second.stderr
    assert not [record for record in second.records if record.get("event") == "summary"]
    verb, *options = shlex.split(command_line)
    assert verb.endswith("transformerlm-train")
    assert options[0] == f"--config={tmp_path / 'run/config.toml'}"
    if limit != "max_time":  # twice as long as the run took, which is more than the limit
        assert options[1:] == [f"--training.{limit}={24 if limit == 'max_steps' else 0}"]
    assert call("train", *options).records[-1]["step"] > step


def test_the_eta_knows_the_limit_of_time(pipeline, tmp_path):
    """The ETA is at most what is left of max_time."""
    limited = tiny_config(pipeline.files, tmp_path, {"training.max_steps": 10**9, "training.max_time": "20s"})
    trainer = prepare_run.prepare_run(limited, tmp_path, world=World()).trainer()
    trainer.state.seconds = 15.0
    assert estimate_seconds(trainer)[0] == 5.0


def test_a_run_without_a_name_is_called_after_its_start(pipeline, tmp_path):
    """Without logging.run_name each start is a run of its own."""
    text = pipeline.train_toml.read_text().replace('run_name = "run"\n', "")
    (tmp_path / "train.toml").write_text(text)
    done = call("train", "--config", tmp_path / "train.toml", "--runs_dir", tmp_path / "runs", "--training.max_steps=3")
    assert done.code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.replace("-", "").isdigit()
    assert (run / "checkpoints/latest/state.json").is_file()


def test_training_that_diverges_exits_1(pipeline, tmp_path):
    """A loss that stays not finite is a failure, not a wrong input: exit 1, a last line on stderr and an event."""
    changes = ["--optimizer.name=sgd", "--optimizer.learning_rate=1000.0", "--optimizer.max_grad_norm=0.0"]
    done = call("train", "--config", pipeline.train_toml, "--runs_dir", tmp_path, *changes, "--training.max_steps=100")
    assert done.code == 1
    assert "lower optimizer.learning_rate" in done.stderr.splitlines()[-1]
    assert done.records[-1]["event"] == "failed"
    assert "lower optimizer.learning_rate" in done.records[-1]["error"]


@pytest.mark.parametrize("keep", [0, 1])
def test_a_single_checkpoint_is_not_enough(keep, pipeline):
    """`checkpoint.keep` below 2 is refused in one line: damage to the only one would leave nothing to go back to."""
    done = call("train", "--config", pipeline.train_toml, f"--checkpoint.keep={keep}")
    assert done.code == 2
    (line,) = done.stderr.splitlines()
    assert f"checkpoint.keep: expected an integer >= 2 and <= 1000000, found {keep}" in line


def test_the_micro_batch_that_was_chosen_is_kept(pipeline, tmp_path, monkeypatch):
    """With "auto" a resumed run takes its checkpoint's number, though another fits now: all stays bit for bit."""
    from transformerlm.training.planning import micro_batch

    def choose(size):
        monkeypatch.setattr(micro_batch, "_largest_within", lambda *_, **__: size)

    auto = {"training.micro_batch_size": "auto", "logging.backend": "console", "checkpoint.interval": 3}
    whole, cut = (tiny_config(pipeline.files, tmp_path / name, auto) for name in ("whole", "cut"))
    choose(4)
    assert command.train(whole) == 0
    with monkeypatch.context() as patch:
        kill_at(patch, step=8)
        with pytest.raises(Killed):
            command.train(cut)
    choose(1)
    assert command.train(cut) == 0
    records = read_records(tmp_path / "cut/run")
    assert [record["micro_batch_size"] for record in records if record.get("event") == "started"] == [4, 4]
    assert what_tells_them_apart(tmp_path / "cut/run", tmp_path / "whole/run", [6]) is None
    assert load_config(TrainConfig, tmp_path / "cut/run/config.toml").training.micro_batch_size == 4


def test_a_moved_run_goes_on_where_its_config_is(pipeline, tmp_path, monkeypatch):
    """By any path, its own config.toml finds the run beside it; the place that the file names is left alone."""
    moved = tmp_path / "archive/renamed"
    shutil.copytree(pipeline.run, moved, symlinks=True)
    before = sorted(pipeline.run.rglob("*"))
    done = call("train", "--config", moved / "config.toml", "--training.max_steps=13")
    assert (done.code, done.records[0]["step"]) == (0, 12)
    assert f"goes on where its file is, in {moved}" in done.stderr
    assert sorted(pipeline.run.rglob("*")) == before
    monkeypatch.chdir(moved)
    done = call("train", "--config", "config.toml", "--training.max_steps=14")
    assert (done.code, done.records[0]["step"]) == (0, 13)
    assert "goes on where its file is" not in done.stderr  # by now the file names this place
    assert read_records(moved)[-1]["step"] == 14


def test_a_run_without_a_name_goes_on_by_its_own_file(pipeline, tmp_path):
    """Its directory is named by the time, which its file does not say; nothing is said of another place."""
    named, other = tmp_path / "20260101-000000", {"runs_dir": str(tmp_path)}
    shutil.copytree(pipeline.run, named, symlinks=True)
    tree = read_toml(named / "config.toml") | other
    del tree["logging"]["run_name"]
    (named / "config.toml").write_text(tomli_w.dumps(tree))
    done = call("train", "--config", named / "config.toml", "--training.max_steps=13")
    assert (done.code, done.records[0]["step"]) == (0, 12), done.stderr
    assert "goes on where its file is" not in done.stderr
    (tmp_path / "longer.toml").write_text("[training]\nmax_steps = 14\n")
    done = call("train", "--config", named / "config.toml", "--config", tmp_path / "longer.toml")
    assert (done.code, done.records[0]["step"]) == (0, 13), done.stderr


# --- outputs that fail --------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="sets a limit on file sizes")
def test_a_disk_that_fills_up_is_one_line_and_the_next_start_goes_on(pipeline, tmp_path, monkeypatch):
    """A save that does not fit ends with exit 1 and one line; older checkpoints are whole; a later start goes on."""
    import resource

    whole = tiny_config(pipeline.files, tmp_path / "whole", {"checkpoint.interval": 3})
    assert command.train(whole) == 0
    config = tiny_config(pipeline.files, tmp_path / "full", {"checkpoint.interval": 3})
    (tmp_path / "full.toml").write_text(dump_toml(config))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        stop_before(patch, 8, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old[1])))
        try:
            done = call("train", "--config", tmp_path / "full.toml")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    run = tmp_path / "full/run"
    assert done.code == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {run}/checkpoints/step-00000009: cannot be written: ")
    assert last.endswith("older checkpoints are whole; free some space and start the same command again")
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["best", "latest", "step-00000003", "step-00000006"]
    assert call("train", "--config", tmp_path / "full.toml").code == 0
    assert what_tells_them_apart(run, tmp_path / "whole/run", [6]) is None


@pytest.fixture
def pipe(monkeypatch):
    """Let stdout be a full pipe, and return its two ends."""
    if sys.platform == "win32":
        pytest.skip("waits for a pipe")
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    os.set_blocking(writing, True)
    stream = os.fdopen(writing, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    yield reading, writing
    stream.close()
    os.close(reading)


@pytest.mark.parametrize("reader", ["stuck", "gone"])
def test_a_reader_of_stdout_cannot_stop_the_run(reader, pipeline, tmp_path, monkeypatch, pipe):
    """With a reader that takes nothing or has gone, the lines on stdout are lost, and nothing else."""
    monkeypatch.setattr(command, "STDOUT_PATIENCE", 0.05)
    quiet = tiny_config(pipeline.files, tmp_path / "quiet")
    assert command.train(quiet) == 0
    if reader == "gone":
        os.dup2(os.open(os.devnull, os.O_RDONLY), pipe[0])
    assert command.train(tiny_config(pipeline.files, tmp_path / "piped", {"logging.backend": "console"})) == 0
    assert step_lines(tmp_path / "piped/run") == step_lines(tmp_path / "quiet/run")
    assert step_of(newest_whole(tmp_path / "piped/run/checkpoints")) == 12


FAKE_WANDB = """
import re, time
class Run:
    def define_metric(self, name, step_metric): pass
    def log(self, record):
        {log}
    def log_artifact(self, artifact): pass
    def finish(self): pass
class Artifact:
    def __init__(self, name, type): assert re.fullmatch("[a-zA-Z0-9_.-]+", name) and len(name) <= 128, name
    def add_dir(self, path): pass
def init(**options):
    {init}
    return Run()
"""


@pytest.mark.parametrize(
    ("where", "fault"), [("init", "time.sleep(600)"), ("log", "time.sleep(600)"), ("log", "raise OSError('down')")]
)
def test_losses_do_not_depend_on_wandb(where, fault, pipeline, tmp_path, monkeypatch):
    """If W&B hangs or raises, at the start or at a line, every number and weight is the same as without it."""
    pytest.importorskip("wandb")
    package = tmp_path / "fake/wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_WANDB.format(**{"init": "pass", "log": "pass", where: fault}))
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
    impatient = functools.partial(logger.WandbLogger, init_timeout=0.2, close_timeout=0.2)
    monkeypatch.setattr(logger, "WandbLogger", impatient)
    runs = {}
    for backend in ("noop", "wandb"):
        config = tiny_config(pipeline.files, tmp_path / backend, {"logging.backend": backend})
        assert command.train(config) == 0
        runs[backend] = tmp_path / backend / "run"
    assert step_lines(runs["wandb"]) == step_lines(runs["noop"])
    ours, theirs = (load_model(resolve(run)).state_dict() for run in runs.values())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_wandb_may_delay_a_start_by_five_seconds():
    """By default a run waits for W&B for five seconds at its start."""
    assert inspect.signature(logger.WandbLogger).parameters["init_timeout"].default == 5.0


# --- signals -----------------------------------------------------------------------------------------------------

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


def signal_in(monkeypatch, place: str, number: int) -> None:
    """Let the signal come at start-up, or at the first batch, validation, sample or save."""
    owner, name = {
        "start-up": (prepare_run, "_find_checkpoint"),
        "data": (Trainer, "micro_batches"),
        "evaluation": (Trainer, "validate"),
        "sampling": (Predictor, "stream"),
        "saving": (save, "_write_facts"),
    }[place]
    original, calls = getattr(owner, name), [0]

    def interrupted(*args, **settings):
        calls[0] += 1
        # The first batch is for timing a step, and the first sample is only checked.
        if calls[0] == (2 if place in ("data", "sampling") else 1):
            os.kill(os.getpid(), number)
        return original(*args, **settings)

    monkeypatch.setattr(owner, name, interrupted)


@posix
@pytest.mark.parametrize(("place", "step"), [("data", 1), ("evaluation", 5), ("sampling", 6), ("saving", 8)])
def test_a_signal_at_any_moment_saves_the_last_finished_step(place, step, pipeline, tmp_path, monkeypatch):
    """SIGUSR1 while a run waits for data, validates, samples or saves: at most one more step, a save, exit 0."""
    intervals = {
        "checkpoint.interval": 7 if place == "saving" else 0,
        "training.eval_interval": 4,
        "samples.interval": 5,
    }
    if place != "evaluation":
        intervals["training.eval_interval"] = 0
    config = tiny_config(pipeline.files, tmp_path, intervals)
    with monkeypatch.context() as patch:
        signal_in(patch, place, signal.SIGUSR1)
        assert command.train(config) == 0
    newest = newest_whole(tmp_path / "run/checkpoints")
    assert step_of(newest) == step
    told = [record for record in read_records(tmp_path / "run") if "event" in record][-2:]
    assert told == [
        {"event": "requeue", "step": step},
        {"event": "finished", "step": step, "reason": "signal", "signal": "SIGUSR1"},
    ]
    assert command.train(config) == 0
    assert [line["step"] for line in step_lines(tmp_path / "run")] == list(range(1, 13))


@posix
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129), ("SIGUSR1", 0)])
def test_a_signal_at_start_up_ends_the_run_there(name, code, pipeline, tmp_path, monkeypatch, capsys):
    """Before the first step there is nothing to save: the run ends with the signal's code and leaves no lock."""
    config = tiny_config(pipeline.files, tmp_path)
    with monkeypatch.context() as patch:
        signal_in(patch, "start-up", signal.Signals[name])
        with pytest.raises(SystemExit) as ended:
            command.train(config)
    assert ended.value.code == code
    assert f"{name}: stopped before the first step" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@posix
@pytest.mark.parametrize("environment", [{}, {"TORCHELASTIC_RUN_ID": "none"}], ids=["alone", "torchrun"])
def test_a_second_signal_ends_at_once_but_an_echo_does_not(environment):
    """A signal right after the first is its echo; a later one ends the process, even if Python cannot see it come."""
    program = """
import hashlib, os, signal, threading
from cli import train
train.ECHO_SECONDS = train.BRIEF_ECHO_SECONDS = 0.5
with train.StopSignals() as signals:
    signals.deferred = "saving"
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    print(signals.received, "and two echoes", flush=True)
    waiting, = [thread for thread in threading.enumerate() if thread.name == "echo"]
    def once_more():
        waiting.join()
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=once_more).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # half an hour during which Python calls no handler
    print("never")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == "SIGINT and two echoes\n"


@posix
@pytest.mark.parametrize("deferred", ["saving", ""])
def test_an_echo_never_undoes_what_the_first_signal_began(deferred, capsys):
    """Echoes change nothing while the run saves or ends before its first step; afterwards all is restored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.suppress(SystemExit), command.StopSignals() as signals:
        signals.deferred = deferred
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
    assert signals.received == "SIGTERM"
    assert capsys.readouterr().err.count("SIGTERM: ") == 1
    assert before == {number: signal.getsignal(number) for number in before}


@posix
def test_once_more_ends_it_also_after_a_save_has_held_ctrl_c_back(monkeypatch):
    """Who holds it back puts Python's handler in the place of the system's."""
    raised = []
    monkeypatch.setattr(signal, "raise_signal", lambda number: raised.append((number, signal.getsignal(number))))
    with command.StopSignals() as signals:
        signals.deferred = "saving"
        os.kill(os.getpid(), signal.SIGINT)
        signals._is_echo_over = True
        with ctrl_c_held_back():
            pass
        os.kill(os.getpid(), signal.SIGINT)
    assert raised == [(signal.SIGINT, signal.SIG_DFL)]


# What passes a signal on to the program that it starts, and ends with a code of its own, as srun and torchrun do.
PASSING_ON = """#!/usr/bin/env bash
echo "$@" >> {folder}/{name}
while [ "$1" != {inner} ]; do shift; done
"$@" &
child=$!
trap 'kill -USR1 $child; wait $child; exit {code}' USR1
wait $child
exit {code}
"""


def slurm_job(script: str, folder: Path, config: TrainConfig) -> subprocess.Popen[str]:
    """Start a job's script as SLURM does, with tools that note how they were called; torchrun ends with 1, as ever."""
    tools = folder / "bin"
    tools.mkdir()
    (tools / "transformerlm-train").write_text(f'#!/bin/sh\nexec {sys.executable} -m cli.train "$@"\n')
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/scontrol\n[ "$1" != show ] || echo gpu3\n')
    for name, inner in (("srun", "torchrun"), ("torchrun", "transformerlm-train")):
        (tools / name).write_text(PASSING_ON.format(folder=folder, name=name, inner=inner, code=1))
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (folder / "train.toml").write_text(dump_toml(config))
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu[3-4]", "SLURM_GPUS_ON_NODE": "8"}
    environment = os.environ | slurm | {"PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        ["bash", f"docs/examples/{script}", folder / "train.toml"],
        cwd=ROOT,
        env=environment | {"RUNS_DIR": str(config.runs_dir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@posix
@pytest.mark.parametrize("script", ["train.sbatch", pytest.param("train-nodes.sbatch", marks=pytest.mark.slow)])
def test_the_slurm_script_saves_requeues_and_goes_on(script, pipeline, tmp_path):
    """The documented scripts, on the signal for the last minutes, save a whole checkpoint and requeue the job once."""
    config = tiny_config(pipeline.files, tmp_path, {"training.max_steps": 10**6, "logging.backend": "console"})
    job = slurm_job(script, tmp_path, config)
    for line in job.stdout:
        if '"step": 3' in line:
            break
    job.send_signal(signal.SIGUSR1)
    stdout, stderr = job.communicate(timeout=600)
    assert job.returncode == 0, stderr
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "requeue 7"
    assert (tmp_path / "scontrol").read_text().count("requeue") == 1
    assert '"event": "requeue"' in stdout
    run = tmp_path / "slurm-7"
    newest = newest_whole(run / "checkpoints")
    assert step_of(newest) == read_records(run)[-1]["step"]
    if script == "train-nodes.sbatch":
        says_what_torchrun_wants((tmp_path / "torchrun").read_text().split())


def says_what_torchrun_wants(options: list[str]) -> None:
    """Let torchrun itself read the options: machines, processes, the first machine, the signals that it passes on."""
    from torch.distributed.run import parse_args

    said = parse_args(options)
    assert (said.nnodes, said.nproc_per_node, said.rdzv_backend, said.rdzv_id) == ("1:2", "8", "c10d", "7")
    assert said.rdzv_endpoint == "gpu3:20007"
    assert said.signals_to_handle == "SIGTERM,SIGINT,SIGHUP,SIGUSR1"
    assert said.shutdown_timeout < 300  # SLURM gives so many seconds
    assert said.no_python
    assert said.training_script == "transformerlm-train"


@posix
@pytest.mark.slow
def test_the_slurm_script_for_several_machines_does_not_requeue_a_failure(pipeline, tmp_path):
    """A run that is refused ends the job with torchrun's code; the next piece of one that has saved is judged anew."""
    (tmp_path / "slurm-7").mkdir()
    (tmp_path / "slurm-7/metrics.jsonl").write_text('{"event": "requeue", "step": 3}\n')  # by an earlier piece
    config = tiny_config(pipeline.files, tmp_path, {"checkpoint.resume": "required"})
    config = config.model_copy(update={"data": config.data.model_copy(update={"train": tmp_path / "no.npy"})})
    job = slurm_job("train-nodes.sbatch", tmp_path, config)
    _, stderr = job.communicate(timeout=600)
    assert job.returncode == 1
    assert "no.npy: no such token file" in stderr
    assert (tmp_path / "scontrol").read_text() == "show hostnames gpu[3-4]\n"


# --- a terminal --------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("backend", ["console", "json"])
def test_on_a_terminal_json_is_for_who_asks_for_it(backend, pipeline, tmp_path):
    """On a pseudo-terminal "console" shows words alone and nothing twice; "json" shows every line of the log."""
    where = ("--runs_dir", tmp_path, f"--logging.backend={backend}")
    done = call_in_terminal("train", "--config", pipeline.train_toml, *where)
    assert done.code == 0
    lines = lines_on_screen(done.stdout)
    records = [json.loads(line) for line in lines if line.startswith("{")]
    assert records == (read_records(tmp_path / "run") if backend == "json" else [])
    assert '{"' not in "".join(line for line in lines if not line.startswith("{"))
    assert sum("step 12/12" in line for line in lines) == 1
    assert sum(line.startswith("── step 12 ─") for line in lines) == 1
