"""The guard recognises bad steps, skips them or rolls the run back, counts them, and keeps their batches."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from cli.train import train
from config.io import dump_toml
from tests.training.faults import poison
from tests.training.test_resume_checks import train_until_killed, what_tells_them_apart
from tests.training.test_trainer import several, torchrun
from tests.training.tiny_run import read_records, step_lines, tiny_config, write_chat_files
from transformerlm.checkpoints.directory import newest_whole, resolve, step_of
from transformerlm.checkpoints.load import load_model
from transformerlm.checkpoints.validation import read_state
from transformerlm.experiments.run_checks import check_lines, read_run_lines
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.training import spike_guard, timer
from transformerlm.training.data import sample_starts
from transformerlm.training.reading import IGNORED
from transformerlm.training.spike_guard import NUM_LOSSES_BEFORE_SPIKES, GuardState, trouble_with, write_batch
from transformerlm.training.trainer import Trainer

NAN, INF = math.nan, math.inf


def events(run_dir, name):
    """Return a run's events of this name, without the name."""
    found = [record for record in read_records(run_dir) if record.get("event") == name]
    return [{key: value for key, value in record.items() if key != "event"} for record in found]


# --- the rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (INF, 1.0), (-INF, 1.0), (2.0, NAN), (2.0, INF)])
@pytest.mark.parametrize("max_loss", [INF, 3.0])
def test_what_is_not_finite_is_trouble(loss, norm, max_loss):
    """A loss or a norm that is not finite is refused, with or without a spike guard."""
    assert trouble_with(loss, norm, max_loss=max_loss) == "not_finite"


def test_a_spike_is_a_loss_above_the_factor_times_the_average():
    """A loss at the factor times the average is still ordinary, and above that a spike; without a factor none is."""
    state = GuardState()
    for _ in range(NUM_LOSSES_BEFORE_SPIKES):
        assert state.max_loss(2.0) == INF, "too early to know"
        state.made(3.0)
    assert state.max_loss(2.0) == pytest.approx(6.0)
    assert trouble_with(6.0, 1.0, max_loss=6.0) is None
    assert trouble_with(6.01, 1.0, max_loss=6.0) == "spike"
    assert state.max_loss(None) == INF


def test_the_average_is_the_mean_at_first_and_follows_later():
    """The first losses count equally; later the old ones fade, and the average approaches a new level."""
    state = GuardState()
    for loss in (4.0, 2.0, 3.0):
        state.made(loss)
    assert state.loss_average == pytest.approx(3.0)
    for _ in range(400):
        state.made(1.0)
    assert state.loss_average == pytest.approx(1.0, abs=0.01)


def test_skips_in_a_row_begin_anew_after_a_step_that_was_made():
    """One count is of all skips, one of those since the last step that was made; a skip leaves the average alone."""
    state = GuardState()
    state.made(2.0)
    state.skipped()
    state.skipped()
    assert (state.skipped_steps, state.skipped_in_a_row, state.loss_average) == (2, 2, 2.0)
    state.made(2.0)
    state.skipped()
    assert (state.skipped_steps, state.skipped_in_a_row) == (3, 1)


def test_only_the_first_batches_are_written(files, tmp_path, monkeypatch):
    """The folder takes a limited number of files; None says that a batch was not written."""
    monkeypatch.setattr(spike_guard, "MAX_BATCH_FILES", 2)
    data = TokenDataset(files.train)
    written = [
        write_batch(tmp_path / "skipped", step, data=data, starts=[0, 5], context_length=4, facts={"loss": NAN})
        for step in (3, 5, 7)
    ]
    assert written[2] is None
    assert sorted(path.name for path in (tmp_path / "skipped").iterdir()) == [
        "step-00000003.json",
        "step-00000005.json",
    ]
    record = json.loads(written[0].read_text())
    assert (record["loss"], record["starts"]) == ("nan", [0, 5])
    assert record["token_ids"] == [data.tokens[start : start + 5].tolist() for start in (0, 5)]


# --- in a run ----------------------------------------------------------------------------------------------------


def test_a_step_in_which_nothing_is_learnt_spoils_nothing(tmp_path, monkeypatch):
    """It is told of by its own name, changes no weight, state or average, has no loss, and is no reason to stop."""
    files, states = write_chat_files(tmp_path), []
    make, batches = Trainer.step, Trainer.micro_batches

    def watched(self):
        result = make(self)
        weights = [one.detach().clone() for one in self.raw_model.parameters()]
        kept = [one for values in self.optimizer.state_dict()["state"].values() for one in values.values()]
        moments = [torch.as_tensor(one).clone() for one in kept]
        states.append((weights + moments, asdict(self.state.guard), self.state.tokens))
        return result

    def masked(self, step):
        found = batches(self, step)
        return [(one, two * 0 + IGNORED) for one, two in found] if step in (4, 5) else found

    monkeypatch.setattr(Trainer, "step", watched)
    monkeypatch.setattr(Trainer, "micro_batches", masked)
    changes = {"data.packing": "documents", "data.order": "epoch", "training.max_skipped_steps": 0}
    assert train(tiny_config(files, tmp_path, {**changes, "training.eval_interval": 5})) == 0
    run = tmp_path / "run"
    assert events(run, "step_skipped") == [{"step": step, "reason": "nothing_learnt"} for step in (4, 5)]
    for before, after in ((2, 3), (3, 4)):
        assert all(one.equal(other) for one, other in zip(states[before][0], states[after][0], strict=True))
        assert states[before][1:] == states[after][1:]
    assert states[-1][1]["num_losses"] == 10
    lines = [record for record in read_records(run) if "metrics.tokens" in record]
    assert [line["step"] for line in lines if "metrics.loss" not in line] == [4, 5]
    assert not any("metrics.grad_l2_norm" in line for line in lines[3:5])
    assert "metrics.val_loss" in lines[4]
    assert not any("metrics.skipped_steps" in line for line in lines)
    assert not (run / "skipped").exists()
    assert list(check_lines(read_run_lines(run), [], 1)) == []
    (summary,) = events(run, "summary")
    assert math.isfinite(summary["train_loss"])
    losses = [line["metrics.val_loss"] for line in lines if "metrics.val_loss" in line]
    assert summary["best_val_loss"] == min(losses)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_bad_step_is_skipped_counted_told_and_kept(value, files, tmp_path, monkeypatch):
    """The run goes on with the next step and the next batch; the weights stay as they were."""
    weights = []
    make = Trainer.step

    def watched(self):
        result = make(self)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in self.raw_model.parameters()]))
        return result

    monkeypatch.setattr(Trainer, "step", watched)
    poison(monkeypatch, {4: value})
    assert train(tiny_config(files, tmp_path)) == 0
    lines, run = step_lines(tmp_path / "run"), tmp_path / "run"
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line.get("metrics.skipped_steps") for line in lines] == [None] * 3 + [1] * 9
    assert lines[3]["metrics.loss"] == str(value)
    assert lines[-1]["metrics.tokens"] == 11 * 8 * 16
    assert [torch.equal(weights[i], weights[i + 1]) for i in (1, 2, 3)] == [False, True, False]
    (told,) = events(run, "step_skipped")
    assert (told["step"], told["reason"], told["loss"]) == (4, "not_finite", str(value))
    record = json.loads((run / "skipped/step-00000004.json").read_text())
    data = TokenDataset(files.train)
    expected = sample_starts(len(data), batch_size=8, context_length=16, seed=1, step=4).tolist()
    assert (record["starts"], record["loss"], record["data_sha256"]) == (expected, str(value), data.sha256)
    assert record["token_ids"] == [data.tokens[start : start + 17].tolist() for start in expected]


@pytest.mark.parametrize(("limit", "last"), [(0, 6), (2, 8)])
def test_too_many_bad_steps_in_a_row_stop_the_run(limit, last, files, tmp_path, monkeypatch):
    """One step more than the limit ends it; a line says where, why and what to do; the last checkpoint stays."""
    poison(monkeypatch, {3: NAN} if limit else {})
    poison(monkeypatch, dict.fromkeys(range(6, 13), NAN))
    with pytest.raises(
        FloatingPointError, match=rf"step {last}: loss nan.*not finite.*last checkpoint is step 5; lower"
    ):
        train(tiny_config(files, tmp_path, {"training.max_skipped_steps": limit}))
    newest = newest_whole(tmp_path / "run/checkpoints")
    assert step_of(newest) == 5
    assert all(tensor.isfinite().all() for tensor in load_model(newest).parameters())


def test_a_folder_that_cannot_be_written_does_not_stop_the_run(files, tmp_path, monkeypatch):
    """A batch that cannot be kept costs a warning, and the run goes on."""
    poison(monkeypatch, {4: NAN})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/skipped").write_text("in the way")
    with pytest.warns(UserWarning, match="step 4: its batch could not be written"):
        assert train(tiny_config(files, tmp_path)) == 0


def test_skips_resume_bit_for_bit(files, tmp_path, monkeypatch):
    """A run with bad steps before and after a kill ends as the uninterrupted one, with the same count of them."""
    poison(monkeypatch, {4: NAN, 9: INF})
    whole, pieces = (tiny_config(files, tmp_path / name) for name in ("whole", "pieces"))
    train(whole)
    train_until_killed(pieces, step=8)
    assert train(pieces) == 0
    assert what_tells_them_apart(tmp_path / "pieces/run", tmp_path / "whole/run", [5]) is None
    assert step_lines(tmp_path / "pieces/run")[-1]["metrics.skipped_steps"] == 2


@pytest.fixture
def early_spikes(monkeypatch):
    """Let the guard recognise a spike after three losses, for a run of twelve steps."""
    monkeypatch.setattr(spike_guard, "NUM_LOSSES_BEFORE_SPIKES", 3)


def test_without_the_guard_a_spike_is_a_step(files, tmp_path, monkeypatch, early_spikes):
    """The guard is off by default."""
    poison(monkeypatch, {8: 10.0})
    train(tiny_config(files, tmp_path))
    assert events(tmp_path / "run", "step_skipped") == []


def test_a_spike_can_be_skipped(files, tmp_path, monkeypatch, early_spikes):
    """With `skip`, a step whose loss jumps is treated like one that is not finite, and reported as a spike."""
    poison(monkeypatch, {8: 10.0})
    train(tiny_config(files, tmp_path, {"training.spike_guard": "skip"}))
    (told,) = events(tmp_path / "run", "step_skipped")
    assert (told["step"], told["reason"]) == (8, "spike")
    assert [line["step"] for line in step_lines(tmp_path / "run")] == list(range(1, 13))


def test_a_spike_can_be_rolled_back(files, tmp_path, monkeypatch, early_spikes):
    """With `rollback`, the run goes on from its last checkpoint with later data, and logs each step once."""
    batches = []
    cut = Trainer.micro_batches
    monkeypatch.setattr(
        Trainer,
        "micro_batches",
        lambda self, step: (batches.append(step + self.state.guard.data_offset), cut(self, step))[1],
    )
    poison(monkeypatch, {8: 10.0})
    config = tiny_config(files, tmp_path, {"training.spike_guard": "rollback"})
    assert train(config) == 0
    assert batches[1:] == [*range(1, 9), *range(9, 16)]  # the first is drawn to time a step
    (told,) = events(tmp_path / "run", "rolled_back")
    assert (told["step"], told["from_step"]) == (5, 8)
    assert [line["step"] for line in step_lines(tmp_path / "run")] == list(range(1, 13))
    assert read_state(resolve(tmp_path / "run"))["guard"]["data_offset"] == 3


def test_rollbacks_to_one_checkpoint_are_bounded(files, tmp_path, monkeypatch, early_spikes):
    """A loss that jumps again and again ends the run, after as many rollbacks as steps may be skipped."""
    poison(monkeypatch, dict.fromkeys(range(8, 99), 10.0))
    config = tiny_config(files, tmp_path, {"training.spike_guard": "rollback", "training.max_skipped_steps": 3})
    with pytest.raises(FloatingPointError, match=r"step 6: .*far above the average .*max_skipped_steps is 3"):
        train(config)
    assert len(events(tmp_path / "run", "rolled_back")) == 3


def test_before_the_first_checkpoint_a_rollback_is_a_skip(files, tmp_path, monkeypatch, early_spikes):
    """With nothing to go back to yet, the step is skipped."""
    poison(monkeypatch, {4: 10.0})
    assert train(tiny_config(files, tmp_path, {"training.spike_guard": "rollback"})) == 0
    assert [told["step"] for told in events(tmp_path / "run", "step_skipped")] == [4]
    assert events(tmp_path / "run", "rolled_back") == []


def test_time_goes_on_over_kills_and_counts_repeated_steps_once(files, tmp_path, monkeypatch, early_spikes):
    """Where each step takes 7 s, step s is at 7 s seconds, though a kill and a rollback cost steps; saves take none."""
    clock, make = SimpleNamespace(now=1000.0), Trainer.step

    def slow(self):
        clock.now += 7.0
        return make(self)

    monkeypatch.setattr(Trainer, "step", slow)
    monkeypatch.setattr(timer, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    poison(monkeypatch, {7: 10.0})
    config = tiny_config(files, tmp_path, {"training.spike_guard": "rollback", "checkpoint.interval": 3})
    train_until_killed(config, step=5)
    assert train(config) == 0
    lines = [record for record in read_records(tmp_path / "run") if "metrics.loss" in record]
    assert len(events(tmp_path / "run", "rolled_back")) == 1
    assert [(line["step"], line["time.elapsed_s"]) for line in lines] == [(step, 7.0 * step) for step in range(1, 13)]
    assert read_state(resolve(tmp_path / "run"))["elapsed_s"] == 7.0 * 12


# One rank's loss jumps once; each rank saves its last weights.
SPIKE_ON_ONE_RANK = """
import os
import pytest
from safetensors.torch import save_file
from cli.train import main
from tests.training.faults import poison
from transformerlm.training import spike_guard, timer
from transformerlm.training.trainer import Trainer

spike_guard.NUM_LOSSES_BEFORE_SPIKES = 3
if os.environ["RANK"] == "1":
    poison(pytest.MonkeyPatch(), {8: 20.0})
finish = Trainer._finish
def finish_and_show(self, reason):
    finish(self, reason)
    weights = {name: rows.local for name, rows in self.shards.rows.items()}  # whole: each rank has a copy
    save_file(weights, self.checkpoints.parent / f"rank{os.environ['RANK']}.safetensors")
Trainer._finish = finish_and_show
main()
"""


@pytest.mark.slow
@several
def test_two_ranks_roll_back_together(files, tmp_path, monkeypatch, early_spikes):
    """A spike on one rank takes both back to the same step; both end with the steps and weights of one process."""
    runs = {}
    for name in ("one", "two"):
        config = tiny_config(files, tmp_path / name, {"training.spike_guard": "rollback"})
        runs[name] = tmp_path / name / "run"
        if name == "one":
            poison(monkeypatch, {8: 10.0})
            assert train(config) == 0
            continue
        (tmp_path / "two.toml").write_text(dump_toml(config))
        (tmp_path / "spike.py").write_text(SPIKE_ON_ONE_RANK)
        process = torchrun(tmp_path / "two.toml", program=(str(tmp_path / "spike.py"),))
        _, stderr = process.communicate(timeout=600)
        assert process.returncode == 0, stderr[-3000:]
    alone, together = step_lines(runs["one"]), step_lines(runs["two"])
    assert [line["step"] for line in together] == list(range(1, 13))
    for key in ("metrics.loss", "metrics.grad_l2_norm", "metrics.val_loss"):
        expected = [line[key] for line in alone if key in line]
        assert [line[key] for line in together if key in line] == pytest.approx(expected, rel=1e-5)
    for run in runs.values():
        ((told,), state) = events(run, "rolled_back"), read_state(resolve(run))
        assert (told["step"], told["from_step"], state["guard"]["data_offset"]) == (5, 8, 3)
    weights = load_model(resolve(runs["one"])).state_dict()
    first, second = (load_file(runs["two"] / f"rank{rank}.safetensors") for rank in (0, 1))
    for name, expected in weights.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=1e-5)
