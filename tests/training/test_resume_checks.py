"""A resumed run equals the uninterrupted one, and the tests notice every field that a checkpoint could forget."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import logger
from cli.prepare_run import prepare_run
from cli.train import train
from config.train import TrainConfig
from tests.training.faults import Killed, kill_at, poison
from tests.training.tiny_run import TinyFiles, read_records, step_lines, tiny_config
from transformerlm.checkpoints.directory import resolve
from transformerlm.checkpoints.validation import read_state
from transformerlm.distributed.world import World
from transformerlm.training import resume_checks, spike_guard
from transformerlm.training.data import sample_starts
from transformerlm.training.loop import EvalResult
from transformerlm.training.timer import Timer
from transformerlm.training.trainer import Trainer, TrainState
from transformerlm.utils.files import file_sha256
from transformerlm.utils.json_files import values_sha256
from transformerlm.utils.seed import rng_state, seed_everything

# --- a run in which every field of the state matters -------------------------------------------------------------

EVENTFUL = {
    "checkpoint.interval": 3,
    "training.micro_batch_size": 4,
    "training.spike_guard": "rollback",
    "training.max_skipped_steps": 1,
    "training.eval_interval": 1,
    "training.early_stop_min_delta": 0.5,
    "training.early_stop_patience": 100,
    "schedule.min_learning_rate": 1e-4,
    "training.max_time": "110s",
}


def eventful(patch: pytest.MonkeyPatch) -> None:
    """Make every field of the state matter.

    Batch 2 is not finite, so a step was skipped before the first checkpoint, and batch 5 is a spike, so the data are
    shifted from the second on. The validation loss rises after step 3, so the best step lies before; that one is too
    little lower to count for early stopping. Each step's line shows numbers of all generators. Logging begins with
    another id where it is not told the old one. By the clock each step takes 7 seconds, so the time is ahead of the
    steps and says how far the schedule is. Each look at the time that the log shows finds it 3 seconds later.
    """

    def seconds(self: Timer) -> float:
        self.looks = getattr(self, "looks", -1) + 1
        return self._before + 7.0 * self.looks

    def elapsed_s(self: Timer) -> float:
        self.reads = getattr(self, "reads", 0) + 1
        return self._elapsed_before + 3.0 * self.reads

    patch.setattr(Timer, "seconds", seconds)
    patch.setattr(Timer, "elapsed_s", elapsed_s)
    poison(patch, {2: float("nan"), 5: 10.0})
    patch.setattr(spike_guard, "NUM_LOSSES_BEFORE_SPIKES", 3)
    patch.setattr(
        Trainer,
        "validate",
        lambda self: EvalResult(loss=max(4.2, 1 + self.state.step) if self.state.step != 3 else 4.0, bits_per_byte=1.0),
    )
    metrics, create = Trainer._metrics, logger.create_logger

    def with_noise(self: Trainer, *args: Any) -> dict[str, float]:
        import random

        noise = {"python": random.random(), "numpy": np.random.rand(), "torch": torch.rand(()).item()}
        return metrics(self, *args) | noise

    def with_id(backend: str, *, jsonl_path: Path, run_id: str | None, **settings: Any) -> logger.MultiLogger:
        made = create(backend, jsonl_path=jsonl_path, **settings)
        number = len(read_records(jsonl_path.parent))
        patch.setattr(type(made), "run_id", property(lambda self: run_id or f"began-at-line-{number}"))
        return made

    patch.setattr(Trainer, "_metrics", with_noise)
    patch.setattr(logger, "create_logger", with_id)


def train_until_killed(config: TrainConfig, **kill: Any) -> None:
    """Train until `kill_at` strikes."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, **kill)
        with pytest.raises(Killed):
            train(config)


@pytest.fixture(scope="module")
def eventful_runs(files: TinyFiles, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the directories of two eventful runs: one whole, one killed before step 8, after the save of step 6."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("eventful")
    with pytest.MonkeyPatch.context() as patch:
        eventful(patch)
        assert train(tiny_config(files, home / "whole", EVENTFUL)) == 0
        train_until_killed(tiny_config(files, home / "killed", EVENTFUL), step=8)
    return home / "whole/run", home / "killed/run"


def what_tells_them_apart(
    run: Path, whole: Path, resumed: list[int], *, but_for: Sequence[str] = ("elapsed_s",)
) -> str | None:
    """Return the first difference between what a finished run and the uninterrupted one have written, or None.

    Left out is what a real clock measures; `but_for` are such keys of the state.
    """
    ours, theirs = (resolve(path) for path in (run, whole))
    if [record["step"] for record in read_records(run) if record.get("event") == "resumed"] != resumed:
        return "resumed from another checkpoint"
    if step_lines(run) != step_lines(whole):
        return "step lines"
    for name in ("model.safetensors", "optimizer.safetensors"):
        left, right = load_file(ours / name), load_file(theirs / name)
        if not all(torch.equal(left[key], right[key]) for key in right):
            return name
    states = [read_state(directory) for directory in (ours, theirs)]
    for state in states:
        del state["state_sha256"], state["sha256"]["config.toml"]  # it names the run's own directory
        for key in but_for:
            del state[key]
    return None if states[0] == states[1] else "state"


def go_on(files: TinyFiles, eventful_runs: tuple[Path, Path], home: Path, mutate: Any) -> str | None:
    """Change the killed run's checkpoint, start the same command again, and return what notices the change."""
    whole, killed = eventful_runs
    shutil.copytree(killed, home / "run", symlinks=True)
    directory = home / "run/checkpoints/step-00000006"
    mutate(directory)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        eventful(patch)
        try:
            train(tiny_config(files, home, EVENTFUL))
        except (ValueError, FloatingPointError) as error:
            return f"refused: {error}"
    return f"warned: {caught[0].message}" if caught else what_tells_them_apart(home / "run", whole, [6], but_for=())


def rewrite(directory: Path, change: Any) -> None:
    """Change a checkpoint's state with checksums that fit, as a program would that forgets something."""
    state = json.loads((directory / "state.json").read_text())
    change(state)
    if isinstance(state.get("sha256"), dict):
        state["sha256"] = {name: file_sha256(directory / name) for name in state["sha256"]}
    if "state_sha256" in state:
        state["state_sha256"] = values_sha256(state, kept_in="state_sha256")
    (directory / "state.json").write_text(json.dumps(state))


def drop(state: dict[str, Any], name: str) -> None:
    """Remove a dotted name; `*` stands for each entry."""
    first, _, rest = name.partition(".")
    for key in list(state) if first == "*" else [first]:
        drop(state[key], rest) if rest else state.pop(key)


FRESH = {key: value for key, value in asdict(TrainState()).items() if key != "guard"}
DROPPED = [
    *("format", "sha256", "state_sha256", "wandb_id", "computed_with", "data", "rng", "optimizer", "guard", *FRESH),
    *(f"guard.{key}" for key in asdict(TrainState())["guard"] if key != "skipped_in_a_row"),
    *("data.train_sha256", "data.tokenizer_sha256"),
    *("rng.python", "rng.numpy", "rng.torch", "rng.cuda"),
    *("optimizer.state", "optimizer.param_groups", "optimizer.state.*.exp_avg", "optimizer.state.*.exp_avg_sq"),
    "optimizer.state.*.step",
]


def test_what_the_eventful_run_has_met(eventful_runs):
    """It skips a step, rolls back, keeps an old best, and dies with all of that in its checkpoint."""
    whole, killed = eventful_runs
    state = read_state(killed / "checkpoints/step-00000006")
    assert (state["guard"]["skipped_steps"], state["guard"]["data_offset"], state["best_step"]) == (1, 2, 3)
    told = {record["event"] for record in read_records(whole) if "event" in record}
    assert told >= {"step_skipped", "rolled_back", "checkpoint_saved", "finished"}
    assert [line["step"] for line in step_lines(whole)] == list(range(1, 13))


def test_the_eventful_run_resumes_bit_for_bit(files, eventful_runs, tmp_path):
    """Resumed from an untouched checkpoint, it has the uninterrupted run's lines, weights, optimizer and state."""
    assert go_on(files, eventful_runs, tmp_path, lambda directory: rewrite(directory, lambda state: None)) is None


def test_every_field_of_the_state_is_checked(eventful_runs):
    """The next two tests drop every field that a run takes from a checkpoint; others are for readers, or may lack."""
    state = read_state(eventful_runs[1] / "checkpoints/step-00000006")
    assert set(state) - {"document_ids", "measured_on", "val_loss"} == {name.partition(".")[0] for name in DROPPED}
    for section in ("guard", "rng", "data"):
        named = {name.removeprefix(f"{section}.") for name in DROPPED if name.startswith(f"{section}.")}
        assert set(state[section]) - {"skipped_in_a_row"} == named
    kept = {key for values in state["optimizer"]["state"].values() for key in values}
    assert kept == {name.rpartition(".")[2] for name in DROPPED if "*" in name}


@pytest.mark.parametrize("name", DROPPED)
def test_a_dropped_field_is_noticed(name, files, eventful_runs, tmp_path):
    """Whichever field a checkpoint lacks, the resume is refused, warns, or differs from the uninterrupted run."""
    noticed = go_on(files, eventful_runs, tmp_path, lambda path: rewrite(path, lambda state: drop(state, name)))
    assert noticed is not None


@pytest.mark.parametrize("name", [*FRESH, "wandb_id", "rng"])
def test_a_field_that_is_not_taken_over_is_noticed(name, files, eventful_runs, tmp_path):
    """A resume with a fresh value of a field differs visibly from the uninterrupted run."""
    seed_everything(1)
    fresh = {name: {**FRESH, "wandb_id": None, "rng": rng_state()}[name]}
    noticed = go_on(files, eventful_runs, tmp_path, lambda path: rewrite(path, lambda state: state.update(fresh)))
    assert noticed is not None


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_tensors_that_are_not_taken_over_are_noticed(name, files, eventful_runs, tmp_path):
    """One wrong tensor of weights or of moments shows in the lines that follow."""

    def forget(directory: Path) -> None:
        tensors = load_file(directory / f"{name}.safetensors")
        last = sorted(tensors)[-1]
        save_file(tensors | {last: torch.zeros_like(tensors[last])}, directory / f"{name}.safetensors")
        rewrite(directory, lambda state: None)

    assert go_on(files, eventful_runs, tmp_path, forget) == "step lines"


def test_the_count_of_skips_in_a_row_is_taken_over(files, tmp_path, monkeypatch):
    """A run that is killed between bad steps stops after as many of them as the uninterrupted one."""
    changes = {"checkpoint.interval": 5, "training.max_skipped_steps": 1}
    poison(monkeypatch, {5: float("nan"), 6: float("nan")})
    whole, pieces = (tiny_config(files, tmp_path / name, changes) for name in ("whole", "pieces"))
    train_until_killed(pieces, step=6)
    for config in (whole, pieces):
        with pytest.raises(FloatingPointError, match="step 6: loss nan"):
            train(config)


# --- killed anywhere ---------------------------------------------------------------------------------------------

SCHEDULES = {
    "wsd": {"schedule.name": "wsd", "schedule.decay_steps": 5, "schedule.min_learning_rate": 1e-4},
    "cosine": {"schedule.min_learning_rate": 1e-4},
}
HARD = {
    "training.precision": "bf16",
    "training.micro_batch_size": 2,
    "model.activation_checkpointing": True,
    "model.dropout": {"embedding": 0.1, "attention": 0.1, "residual": 0.1},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resumed_equals_uninterrupted_in_every_phase(schedule, files, tmp_path):
    """Killed in warm-up, middle and decay, between micro-batches and in validations, a hard run ends bit for bit equal.

    Hard: bf16 autocast, four micro-batches a step, recomputed activations, dropout.
    """
    changes = {
        **HARD,
        **SCHEDULES[schedule],
        "checkpoint.interval": 1,
        "training.eval_interval": 1,
        "training.eval_tokens": 128,
    }
    whole, pieces = (tiny_config(files, tmp_path / name, changes) for name in ("whole", "pieces"))
    train(whole)
    for step, place in ((2, "micro-batch"), (6, "evaluation"), (9, "micro-batch"), (12, "evaluation")):
        train_until_killed(pieces, step=step, place=place)
    assert train(pieces) == 0
    assert what_tells_them_apart(tmp_path / "pieces/run", tmp_path / "whole/run", [1, 5, 8, 11]) is None


# --- the order of the data ---------------------------------------------------------------------------------------


def test_any_micro_batches_and_ranks_read_the_same_windows(files, tmp_path):
    """Cut as 8x1, 4x2 or 2x4, on one rank or two, the parts together are the windows of (seed, step), in order."""
    for size, world_size in itertools.product((8, 4, 2), (1, 2)):
        if size * world_size > 8:
            continue
        run = prepare_run(
            tiny_config(files, tmp_path, {"training.micro_batch_size": size}), tmp_path / "run", world=World()
        )
        for step in (1, 2, 12):
            parts = []
            for rank in range(world_size):
                trainer = run.trainer(world=World(rank=rank, world_size=world_size))
                parts.append([inputs for inputs, _ in trainer.micro_batches(step)])
            read = torch.cat([part for own in parts for part in own])  # one rank's windows after the other's
            tokens = run.data.train.tokens
            starts = sample_starts(len(tokens), batch_size=8, context_length=16, seed=1, step=step)
            assert read.tolist() == [tokens[start : start + 16].tolist() for start in starts]


def test_micro_batches_change_the_losses_by_rounding_only(files, tmp_path):
    """Runs with 8x1, 4x2 and 2x4 log the same losses to six digits."""
    losses = {}
    for size in (8, 4, 2):
        train(
            tiny_config(files, tmp_path / str(size), {"training.micro_batch_size": size, "training.eval_interval": 0})
        )
        losses[size] = [line["metrics.loss"] for line in step_lines(tmp_path / str(size) / "run")]
    assert losses[4] == pytest.approx(losses[8], rel=1e-5)
    assert losses[2] == pytest.approx(losses[8], rel=1e-5)


# --- what the last bits depend on --------------------------------------------------------------------------------


def test_a_checkpoint_says_what_it_was_computed_with(files, tmp_path):
    """It holds torch's build, the threads, processor, vector instructions, device, precision and processes."""
    train(tiny_config(files, tmp_path))
    held = read_state(resolve(tmp_path / "run"))["computed_with"]
    assert held == resume_checks.computed_with(torch.device("cpu"), "fp32", world_size=1)
    assert (held["torch"], held["num_threads"], held["device"]) == (torch.__version__, 1, "cpu")
    assert held["cpu_capability"] == torch.backends.cpu.get_cpu_capability()


@pytest.mark.parametrize(
    ("name", "before", "message"),
    [
        ("torch", "2.9.0", f"torch was 2.9.0, now {torch.__version__}"),
        ("num_threads", 64, "num_threads was 64, now 1"),
        ("cpu_flags", ["avx2", "avx1024"], "cpu_flags was with avx1024"),
        ("precision", "bf16", "precision was bf16, now fp32"),
        ("cpu_flags", [{"by": "a stranger"}], "cpu_flags was with {'by': 'a stranger'}"),
    ],
)
def test_a_resume_by_other_means_is_said_in_one_line(name, before, message, files, tmp_path):
    """Another build, thread count, processor or precision is no error: one warning names it, and the run goes on."""
    train(tiny_config(files, tmp_path))
    directory = resolve(tmp_path / "run")
    rewrite(directory, lambda state: state["computed_with"].update({name: before}))
    with pytest.warns(UserWarning, match="may differ from an uninterrupted one in its last bits") as caught:
        assert train(tiny_config(files, tmp_path, {"training.max_steps": 13})) == 0
    assert len(caught) == 1
    assert message in str(caught[0].message)
    assert "\n" not in str(caught[0].message)


def test_a_checkpoint_from_before_the_guard_resumes(files, tmp_path):
    """A run goes on from a checkpoint of the first release, which knew neither guard nor machine, with a warning."""
    train(tiny_config(files, tmp_path))
    rewrite(resolve(tmp_path / "run"), lambda state: [state.pop(key) for key in ("guard", "computed_with")])
    with pytest.warns(UserWarning, match="does not say what it was computed with"):
        assert train(tiny_config(files, tmp_path, {"training.max_steps": 14})) == 0
    assert [line["step"] for line in step_lines(tmp_path / "run")] == list(range(1, 15))


def test_processors_without_a_list_of_flags_are_fine(monkeypatch, tmp_path):
    """Where the system has no /proc/cpuinfo, the processor is unknown and nothing fails."""
    monkeypatch.setattr(resume_checks, "_CPUINFO", tmp_path / "none")
    held = resume_checks.computed_with(torch.device("cpu"), "fp32", world_size=2)
    assert (held["cpu"], held["cpu_flags"], held["processes"]) == ("unknown", [], 2)
