"""Whether a run is what it says: an honest one is verified, and each planted change is found."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.experiments.verified_run import (
    change_event,
    change_lines,
    change_settings,
    change_step,
    make_run,
    make_sums_right,
    replay_here,
    take_weights,
)
from tests.training.faults import poison
from tests.training.tiny_run import read_records, write_tiny_files
from transformerlm.experiments.verify import _base, verify
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.training.trainer import Trainer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a run of 12 steps with three checkpoints."""
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture
def run(made, tmp_path):
    """Return a copy of the run, to be changed."""
    return made.copy(tmp_path)


def words(receipt: dict[str, Any]) -> str:
    return "\n".join(f"{one['kind']}: {one['what']}" for one in receipt["findings"])


def files_of(directory: Path) -> dict[Path, tuple[int, bytes]]:
    """Each file's bytes and its time."""
    found = {path: path.lstat().st_mtime_ns for path in directory.rglob("*")}
    return {path: (time, path.read_bytes() if path.is_file() else b"") for path, time in found.items()}


def test_data_of_another_project_do_not_stand_for_the_runs_own(tmp_path, monkeypatch):
    """Where the name is there, too, the data decide; without the right data anywhere, the name here counts."""
    for seed, name in enumerate(("own", "other")):
        (tmp_path / name).mkdir()
        write_tiny_files(tmp_path / name, seed=seed)
    config = {"data.train": "train.npy"}
    said = {"directory": str(tmp_path / "own"), "data.train.sha256": TokenDataset(tmp_path / "own/train.npy").sha256}
    monkeypatch.chdir(tmp_path / "other")
    assert _base(said, config) == tmp_path / "own"
    assert _base(said | {"data.train.sha256": "0" * 64}, config) == tmp_path / "other"


def test_an_honest_run_is_verified_and_left_as_it_is(made, monkeypatch):
    """All of it is replayed, bit for bit; nothing in its directory changes, and the receipt is JSON."""
    ends, before = replay_here(monkeypatch), files_of(made.directory)
    receipt = verify(made.directory, share=1.0, seed=0)
    assert (receipt["verdict"], receipt["findings"]) == ("verified", [])
    assert (ends, receipt["share_replayed"]) == ([4, 8, 12], 1.0)
    assert {(one["losses"], one["weights"], one["lines"]) for one in receipt["replays"]} == {("equal", "equal", 4)}
    assert files_of(made.directory) == before
    assert json.loads(json.dumps(receipt, allow_nan=False)) == receipt


# --- what a look at the files finds ------------------------------------------------------------------------------


def _line_removed(run: Path) -> None:
    change_lines(run, lambda record: None if record.get("step") == 6 and "metrics.loss" in record else record)


def _line_torn(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace('"metrics.loss"', '"metrics.loss', 1))


def _line_doubled(run: Path) -> None:
    path = run / "metrics.jsonl"
    line = next(line for line in path.read_text().splitlines() if '"metrics.loss"' in line)
    path.write_text(path.read_text().replace(line, f"{line}\n{line}"))


def _save_removed(run: Path) -> None:
    change_lines(run, lambda record: None if record.get("event") == "checkpoint_saved" else record)


def _seed_in_settings(run: Path) -> None:
    path = run / "config.toml"
    path.write_text(path.read_text().replace("seed = 1", "seed = 2"))


def _weights_of_another_step(run: Path) -> None:
    source, goal = (run / "checkpoints" / f"step-{step:08d}" / "model.safetensors" for step in (4, 8))
    shutil.copyfile(source, goal)


def _state_changed(run: Path) -> None:
    path = run / "checkpoints/step-00000012/state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokens": 7}))


def _line_added(record: dict[str, Any], end: str = "\n") -> Callable[[Path], None]:
    def add(run: Path) -> None:
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + end)

    return add


BETTER = {"step": 6, "metrics.val_bits_per_byte": 0.05, "time.elapsed_s": 0.1}
FOREIGN = "1 lines are such as no training writes"
CHANGED = {
    "a line that is no step": (_line_added(BETTER), FOREIGN),
    "an event that measures": (_line_added({"event": "x", **BETTER}), FOREIGN),
    "a last line without an end": (_line_added({"metrics.loss": 1.0, **BETTER}, end=""), FOREIGN),
    "bits per byte alone": (
        lambda run: change_step(run, 8, **{"metrics.val_bits_per_byte": 0.05}),
        "metrics.val_bits_per_byte does not fit metrics.val_loss: at step 8",
    ),
    "validation at a checkpoint": (
        lambda run: change_step(run, 8, **{"metrics.val_loss": 1.0}),
        "step 8: metrics.val_loss is 1.0, but",
    ),
    "tokens": (lambda run: change_step(run, 4, **{"metrics.tokens": 1}), "step 4: metrics.tokens is 1, but 512"),
    "time before a checkpoint": (lambda run: change_step(run, 7, **{"time.elapsed_s": 9e5}), "runs backwards: 900000"),
    "time after a checkpoint": (lambda run: change_step(run, 9, **{"time.elapsed_s": 0.0}), "then 0.000 s at step 9"),
    "a line removed": (_line_removed, "1 lines of steps are missing: 6"),
    "a line torn": (_line_torn, "1 lines are no JSON objects"),
    "a line doubled": (_line_doubled, "expected each step once, in order"),
    "no line of a save": (_save_removed, "step-00000004: no line says that it was saved"),
    "seed in the settings": (_seed_in_settings, "config.toml was changed: expected sha256"),
    "weights": (_weights_of_another_step, "step-00000008: model.safetensors was changed: expected sha256"),
    "state": (_state_changed, "step-00000012: state.json was changed"),
    "environment": (
        lambda run: change_event(run, "environment", tokenizer_sha256="0" * 64),
        "is not the tokenizer of the run: its sha256 has changed",
    ),
}


@pytest.mark.parametrize("change", CHANGED)
def test_what_was_changed_afterwards_is_found_without_training(change, run, monkeypatch):
    """Each plain change contradicts another file, which is named."""
    monkeypatch.setattr("transformerlm.experiments.verify.choose_segments", lambda *args, **kwargs: [])
    plant, message = CHANGED[change]
    plant(run)
    receipt = verify(run, share=0.05, seed=0)
    assert receipt["verdict"] == "differs"
    assert message in words(receipt)


@pytest.mark.parametrize("name", ["train", "valid", "tokenizer"])
def test_swapped_data_is_found(name, made, tmp_path, monkeypatch):
    """Other data of the same name, whole by its own sums, is not that of the run."""
    monkeypatch.setattr("transformerlm.experiments.verify.choose_segments", lambda *args, **kwargs: [])
    (tmp_path / "other").mkdir()
    others = write_tiny_files(tmp_path / "other", seed=5)
    ours, theirs = getattr(made.files, name), getattr(others, name)
    kept = tmp_path / "kept"
    shutil.copytree(made.files.text.parent, kept, symlinks=True)
    try:
        for path in theirs.iterdir() if theirs.is_dir() else theirs.parent.glob(f"{theirs.stem}.*"):
            shutil.copyfile(path, ours / path.name if ours.is_dir() else ours.parent / path.name)
        found = words(verify(made.directory, share=0.05, seed=0))
        with (made.files.train).open("r+b") as file:  # and a number of it, without its sums
            file.seek(-2, 2)
            file.write(b"\x07\x00")
        damaged = words(verify(made.directory, share=0.05, seed=0))
    finally:
        shutil.copytree(kept, made.files.text.parent, symlinks=True, dirs_exist_ok=True)
    assert f"differs: data.{name}: " in found
    assert "of the run: its sha256 has changed" in found
    assert "differs: data.train: " in damaged


@pytest.mark.parametrize("what", ["loss", "validation"])
def test_a_run_that_failed_is_no_fake(what, tmp_path, monkeypatch):
    """The step with which it failed has events, but no line: nobody took that away."""
    monkeypatch.setattr("transformerlm.experiments.verify.choose_segments", lambda *args, **kwargs: [])
    validate = Trainer.validate
    if what == "loss":
        poison(monkeypatch, {8: math.nan})
    else:
        worst = {8: math.nan}
        monkeypatch.setattr(
            Trainer, "validate", lambda self: replace(validate(self), loss=worst.get(self.state.step, 1.0))
        )
    with pytest.raises(FloatingPointError, match="step 8: "):
        make_run(tmp_path, **{"training.max_skipped_steps": 0})
    directory = tmp_path / "runs" / "run"
    assert read_records(directory)[-1]["event"] == "failed"
    receipt = verify(directory, share=0.05, seed=0)
    assert words(receipt) == "undecided: steps 5 to 8 cannot be replayed: no two checkpoints hold them"


@pytest.mark.parametrize(
    ("event", "step", "missing"),
    [("step_skipped", 13, ""), ("failed", 13, ""), ("failed", 15, "13, 14"), ("sample", 13, "13")],
)
def test_an_event_promises_the_lines_before_it(event, step, missing, run, monkeypatch):
    """A step that is skipped, or fails, is told of before its own line; a kill may come between the two."""
    monkeypatch.setattr("transformerlm.experiments.verify.choose_segments", lambda *args, **kwargs: [])
    _line_added({"event": event, "step": step})(run)
    found = words(verify(run, share=0.05, seed=0))
    assert ("lines of steps are missing" in found) == bool(missing)
    assert f"are missing: {missing}\n" in f"{found}\n" or not missing


# --- what only a replay finds ------------------------------------------------------------------------------------


def test_an_edited_loss_is_found(run, monkeypatch):
    """One digit in one line of a replayed segment is enough; with an honest clock and sums, no file contradicts it."""
    replay_here(monkeypatch)
    loss = json.loads(next(x for x in (run / "metrics.jsonl").read_text().splitlines() if '"step": 10' in x))
    change_step(run, 10, **{"metrics.loss": loss["metrics.loss"] - 1e-6})
    receipt = verify(run, share=0.05, seed=0)
    assert receipt["verdict"] == "differs"
    assert "steps 9 to 12: a replay gives other values for the numbers from step 10 on" in words(receipt)
    assert receipt["replays"][-1]["first_step"] == 10


def test_weights_that_were_never_trained_are_found_in_the_last_checkpoint(run, monkeypatch):
    """However few steps are replayed, the last segment is among them, though all sums are right."""
    replay_here(monkeypatch)
    take_weights(run, 12, run / "checkpoints/step-00000008")
    receipt = verify(run, share=0.01, seed=3)
    assert (receipt["verdict"], len(receipt["replays"])) == ("differs", 2)
    assert "steps 9 to 12: a replay gives other values for the weights" in words(receipt)


def test_a_measurement_that_was_taken_away_is_found(run, monkeypatch):
    """A line must have all that its replay has."""
    replay_here(monkeypatch)
    without = "metrics.grad_l2_norm"
    change_lines(run, lambda one: {k: v for k, v in one.items() if k != without} if one.get("step") == 10 else one)
    receipt = verify(run, share=0.05, seed=0)
    assert receipt["verdict"] == "differs"
    assert "the numbers from step 10 on" in words(receipt)


@pytest.mark.parametrize("gone", ["step-00000008", "step-00000012"])
def test_an_end_that_cannot_be_replayed_is_undecided(gone, run, monkeypatch):
    """Whoever removes a checkpoint, and the line of it, could invent the rest."""
    replay_here(monkeypatch)
    shutil.rmtree(run / "checkpoints" / gone)
    step = int(gone[-2:])
    change_lines(run, lambda one: None if (one.get("event"), one.get("step")) == ("checkpoint_saved", step) else one)
    receipt = verify(run, share=0.05, seed=0)
    end = {8: 12, 12: 8}[step]
    expected = "verified" if end == 12 else "undecided"
    assert receipt["verdict"] == expected
    assert ("steps 9 to 12 cannot be replayed" in words(receipt)) == (expected == "undecided")


def test_a_save_before_a_kill_is_no_tampering(run, monkeypatch):
    """A run that was killed before it said that it saved went on from there, and says so."""
    replay_here(monkeypatch)

    def change(record: dict[str, Any]) -> dict[str, Any]:
        is_save = (record.get("event"), record.get("step")) == ("checkpoint_saved", 8)
        return {"event": "resumed", "step": 8} if is_save else record

    change_lines(run, change)
    assert verify(run, share=1.0, seed=0)["verdict"] == "verified"


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 8])
def test_foreign_weights_in_the_middle_are_found(step, run, monkeypatch):
    """The segment that ends there gives other weights, and the one that begins there other losses."""
    replay_here(monkeypatch)
    take_weights(run, step, run / "checkpoints/step-00000012")
    receipt = verify(run, share=1.0, seed=0)
    assert receipt["verdict"] == "differs"
    assert f"steps {step - 3} to {step}: a replay gives other values for the weights" in words(receipt)
    assert f"steps {step + 1} to {step + 4}: a replay gives other values for the numbers from step" in words(receipt)


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), [("seed = 1", "seed = 2"), ("residual = 0.1", "residual = 0.2")])
def test_other_settings_with_right_sums_are_found(old, new, run, monkeypatch):
    """A seed or a dropout that the run was not made with gives other losses."""
    replay_here(monkeypatch)
    change_settings(run, old, new)
    receipt = verify(run, share=0.05, seed=0)
    assert receipt["verdict"] == "differs"
    assert "a replay gives other values" in words(receipt)


def test_an_earlier_part_with_other_settings_is_found(run, monkeypatch):
    """Steps that were made with other data or another rate have a checkpoint whose settings are not those told."""
    replay_here(monkeypatch)
    checkpoint = run / "checkpoints/step-00000004"
    path = checkpoint / "config.toml"
    path.write_text(path.read_text() + "\n# the settings of another run\n")
    make_sums_right(checkpoint)
    receipt = verify(run, share=0.05, seed=0)
    assert receipt["verdict"] == "differs"
    assert "step-00000004: its config.toml is not that of the process that saved it" in words(receipt)


def test_a_start_that_made_no_step_hides_nothing(run, monkeypatch):
    """After it the settings are others, which is no proof; lines that are missing before it are one."""
    replay_here(monkeypatch)
    settings = run / "config.toml"
    settings.write_text(settings.read_text().replace("seed = 1", "seed = 2"))
    begun = {"event": "environment", "step": 12, "config_sha256": sha256(settings.read_bytes()).hexdigest()}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    environment = next(json.loads(line) for line in lines if '"environment"' in line)
    (run / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(environment | begun)]) + "\n")
    receipt = verify(run, share=0.05, seed=0)
    assert receipt["verdict"] == "undecided"
    assert "undecided: config.toml has other settings than step-00000012: training.seed is 2, there 1" in words(receipt)
    change_lines(run, lambda record: None if record.get("step") == 3 and "metrics.loss" in record else record)
    assert "lines of steps are missing: 3" in words(verify(run, share=0.05, seed=0))


def test_a_kill_before_the_line_of_the_last_save_is_no_proof(run, monkeypatch):
    """The checkpoint is there, and its segment is replayed; nothing came after it."""
    replay_here(monkeypatch)

    def change(record: dict[str, Any]) -> dict[str, Any] | None:
        return None if record.get("event") in ("checkpoint_saved", "finished") and record["step"] == 12 else record

    change_lines(run, change)
    receipt = verify(run, share=0.05, seed=0)
    assert receipt["verdict"] == "undecided"
    assert "undecided: step-00000012: no line says that it was saved" in words(receipt)


# --- what cannot be told here ------------------------------------------------------------------------------------


def test_another_machine_is_no_proof_of_tampering(run, monkeypatch):
    """Where versions or processor are not those of the run, other values are undecided, and the reason is named."""
    replay_here(monkeypatch)
    change_event(run, "environment", processor="another processor")
    receipt = verify(run, share=0.05, seed=0)
    assert receipt["verdict"] == "verified"  # the same bits all the same
    change_step(run, 12, **{"metrics.grad_l2_norm": 0.5})
    receipt = verify(run, share=0.05, seed=0)
    assert receipt["verdict"] == "undecided"
    assert "may be no more than rounding: processor was another processor, here" in words(receipt)


def test_a_run_that_kept_too_few_checkpoints_says_what_to_set(run, monkeypatch):
    """What can be replayed is, and the rest is named with the setting that would have kept it."""
    monkeypatch.setattr("transformerlm.experiments.verify.choose_segments", lambda *args, **kwargs: [])
    shutil.rmtree(run / "checkpoints/step-00000004")
    receipt = verify(run, share=0.5, seed=0)
    assert receipt["verdict"] == "undecided"
    assert "33.3% of its steps can be replayed, 50.0% were asked for" in words(receipt)
    assert "set checkpoint.keep (here 10) to 3 or more" in words(receipt)
    assert verify(run, share=0.3, seed=0)["verdict"] == "verified"


def test_a_run_without_its_environment_is_undecided(run, monkeypatch):
    """Runs of earlier versions do not say what they were made with."""
    monkeypatch.setattr("transformerlm.experiments.verify.choose_segments", lambda *args, **kwargs: [])
    change_lines(run, lambda record: None if record.get("event") == "environment" else record)
    assert verify(run, share=0.05, seed=0)["verdict"] == "undecided"


def _no_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "expected the directory of a run, found no metrics.jsonl"),
        (lambda run: (run / "config.toml").write_text("= 3"), "expected a TOML file"),
        (_no_checkpoints, "expected a run with a checkpoint, found none"),
    ],
)
def test_what_is_no_run_is_refused(spoil, message, run):
    """The error names what is missing."""
    spoil(run)
    with pytest.raises(ValueError, match=message):
        verify(run, share=0.05, seed=0)


@pytest.mark.slow
def test_replays_are_processes_of_their_own(made):
    """As users start them, with the threads of the run: the verdict is that of replays within this process."""
    receipt = verify(made.directory, share=0.05, seed=0)
    assert (receipt["verdict"], receipt["findings"]) == ("verified", [])
    assert receipt["replays"][0]["seconds"] > 0
