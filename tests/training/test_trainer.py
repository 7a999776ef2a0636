"""Training runs learn, and a run that was stopped anywhere goes on as if nothing had happened."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from cli.prepare_run import prepare_run
from cli.train import train
from config.io import dump_toml
from tests.training.faults import Killed, kill, poison, stop_before
from tests.training.tiny_run import (
    read_records,
    step_lines,
    tiny_config,
    write_docstring_files,
    write_tiny_files,
)
from transformerlm.checkpoints.directory import list_checkpoints, newest_whole, resolve, step_name, step_of
from transformerlm.checkpoints.load import load_config_of
from transformerlm.checkpoints.validation import CheckpointError, read_state, verify
from transformerlm.distributed.world import World
from transformerlm.tokenizer import Tokenizer
from transformerlm.training import trainer
from transformerlm.training.build import num_accumulation_steps, sequences_per_pass, token_bytes
from transformerlm.training.loop import EvalResult
from transformerlm.training.resume_checks import check_same_data
from transformerlm.training.timer import Timer
from transformerlm.utils.json_files import values_sha256

ROOT = Path(__file__).parents[2]


def run_in_pieces(config, stops: list[int], monkeypatch) -> None:
    """Train with a kill before each of these steps; the same command starts the run again."""
    for step in stops:
        with monkeypatch.context() as patch:
            stop_before(patch, step, kill)
            with pytest.raises(Killed):
                train(config)
    assert train(config) == 0


def final_files(run_dir: Path) -> dict:
    """Return the tensors of a run's newest checkpoint."""
    directory = resolve(run_dir)
    return {**load_file(directory / "model.safetensors"), **load_file(directory / "optimizer.safetensors")}


def events(run_dir: Path, name: str) -> list[int]:
    """Return the steps of a run's events of this name."""
    return [record["step"] for record in read_records(run_dir) if record.get("event") == name]


# --- learning ----------------------------------------------------------------------------------------------------


def test_the_loss_falls(files, tmp_path):
    """After forty steps on simple sentences, training and validation loss are far below that of guessing."""
    config = tiny_config(files, tmp_path, {"training.max_steps": 40, "optimizer.learning_rate": 1e-2})
    assert train(config) == 0
    lines = step_lines(tmp_path / "run")
    validations = [line["metrics.val_loss"] for line in lines if "metrics.val_loss" in line]
    assert lines[0]["metrics.loss"] > 5.0
    assert lines[-1]["metrics.loss"] < 3.0
    assert validations[-1] < min(3.2, validations[0])


def test_step_lines_say_what_was_done(files, tmp_path):
    """A line counts the tokens and has the schedule's learning rate; bits per byte and perplexity match the loss."""
    config = tiny_config(files, tmp_path, {"training.log_norms": True})
    train(config)
    lines = step_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["metrics.tokens"] for line in lines] == [8 * 16 * step for step in range(1, 13)]
    assert [line["metrics.lr"] for line in lines[:3]] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert 0.0 < lines[-1]["metrics.lr"] < 1e-4  # the last step trains, too
    assert [line["step"] for line in lines if "metrics.val_loss" in line] == [4, 5, 8, 10, 12]
    last = lines[-1]
    assert last["metrics.val_perplexity"] == pytest.approx(2.718281828 ** last["metrics.val_loss"], rel=1e-4)
    assert {f"metrics.{kind}_l2_norm.layers.{i}" for kind in ("weight", "activation") for i in (0, 1)} <= set(last)
    finished = [record for record in read_records(tmp_path / "run") if record.get("event") == "finished"]
    assert finished == [{"event": "finished", "step": 12, "reason": "max_steps"}]


def test_log_interval_thins_the_lines_out(files, tmp_path):
    """With an interval, only its multiples, validations, checkpoints and the last step have lines."""
    train(tiny_config(files, tmp_path, {"training.log_interval": 6, "training.eval_interval": 0}))
    assert [line["step"] for line in step_lines(tmp_path / "run")] == [5, 6, 10, 12]


def test_weights_do_not_depend_on_what_is_logged_or_validated(files, tmp_path):
    """Validation, norms and samples read the model and change nothing."""
    quiet = {"training.eval_interval": 0, "training.log_interval": 12, "checkpoint.interval": 0}
    noisy = {
        "training.eval_interval": 1,
        "training.log_norms": True,
        "samples.interval": 3,
        "samples.sampling": {"max_new_tokens": 4},
    }
    for name, changes in (("quiet", quiet), ("noisy", noisy)):
        train(tiny_config(files, tmp_path / name, changes))
    torch.testing.assert_close(final_files(tmp_path / "quiet/run"), final_files(tmp_path / "noisy/run"), rtol=0, atol=0)
    samples = [record for record in read_records(tmp_path / "noisy/run") if record.get("event") == "sample"]
    assert [record["step"] for record in samples] == [3, 6, 9, 12]
    assert all(isinstance(record["text.output"], str) for record in samples)


def test_a_model_that_gives_no_numbers_is_not_sampled_from(files, tmp_path, monkeypatch):
    """After a step whose loss is not finite its logits may not be either; the run goes on, as far as it may."""
    poison(monkeypatch, {6: math.nan})
    assert train(tiny_config(files, tmp_path, {"samples.interval": 3, "samples.sampling": {"max_new_tokens": 4}})) == 0
    records = read_records(tmp_path / "run")
    assert [record["step"] for record in records if record.get("event") == "sample"] == [3, 9, 12]


# --- resuming ----------------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "accumulation": {"training.micro_batch_size": 2},
    "bf16": {"training.precision": "bf16"},
    "recompute": {"model.activation_checkpointing": True, "training.log_norms": True},
    "wsd": {"schedule.name": "wsd", "schedule.decay_steps": 5, "schedule.min_learning_rate": 1e-4},
    "sgd": {"optimizer.name": "sgd", "optimizer.momentum": 0.9},
    "muon": {"optimizer.name": "muon", "training.z_loss": 1e-3, "model.logit_soft_cap": 15.0},
    "muon in bf16": {"optimizer.name": "muon", "training.precision": "bf16", "model.zero_init_outputs": True},
    "dropout": {"model.dropout": {"embedding": 0.1, "attention": 0.1, "residual": 0.1}, "data.order": "epoch"},
    "tied": {"model.tie_embeddings": True, "model.num_kv_heads": 1, "model.qk_norm": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_equals_uninterrupted_bit_for_bit(variant, files, tmp_path, monkeypatch):
    """Killed twice and started again, a run logs the same numbers, each step once, and ends with the same weights."""
    whole, pieces = (tiny_config(files, tmp_path / name, VARIANTS[variant]) for name in ("whole", "pieces"))
    train(whole)
    run_in_pieces(pieces, [8, 12], monkeypatch)
    assert step_lines(tmp_path / "pieces/run") == step_lines(tmp_path / "whole/run")
    torch.testing.assert_close(
        final_files(tmp_path / "pieces/run"), final_files(tmp_path / "whole/run"), rtol=0, atol=0
    )
    assert events(tmp_path / "pieces/run", "resumed") == [5, 10]
    assert events(tmp_path / "pieces/run", "checkpoint_saved") == [5, 10, 12]


def test_a_kill_before_the_first_checkpoint_starts_over(files, tmp_path, monkeypatch):
    """Without a checkpoint the same command starts at step 1, and the file still has each step once."""
    config = tiny_config(files, tmp_path)
    run_in_pieces(config, [4], monkeypatch)
    assert [line["step"] for line in step_lines(tmp_path / "run")] == list(range(1, 13))
    assert events(tmp_path / "run", "resumed") == []


@pytest.mark.parametrize("gone", ["step-*", "*"])
def test_a_run_whose_checkpoints_are_gone_is_refused(gone, files, tmp_path):
    """Whoever removed them, the run does not start over, and its log stays as it is."""
    config = tiny_config(files, tmp_path)
    assert train(config) == 0
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for path in list((tmp_path / "run" / "checkpoints").glob(gone)):
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    with pytest.raises(CheckpointError, match=r"expected a whole checkpoint.*to begin anew, remove"):
        train(config)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(files, tmp_path, monkeypatch, capsys):
    """A line on stderr says that it is set aside, and the run ends as if nothing had happened."""
    whole, config = (tiny_config(files, tmp_path / name, {"checkpoint.interval": 3}) for name in ("whole", "damaged"))
    train(whole)
    with monkeypatch.context() as patch:
        stop_before(patch, 8, kill)
        with pytest.raises(Killed):
            train(config)
    run_dir = tmp_path / "damaged/run"
    weights = run_dir / "checkpoints/step-00000006/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert train(config) == 0
    assert "model.safetensors is damaged" in capsys.readouterr().err
    assert (run_dir / "checkpoints/step-00000006.bad").is_dir()
    assert events(run_dir, "resumed") == [3]
    assert step_lines(run_dir) == step_lines(tmp_path / "whole/run")


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_left_as_it_is(files, tmp_path):
    """The run does not start over in silence: every start is refused, names each checkpoint, and keeps the metrics."""
    config = tiny_config(files, tmp_path)
    train(config)
    for weights in (tmp_path / "run/checkpoints").glob("step-*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:100])
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    for resume in ("auto", "required", "never"):
        with pytest.raises(CheckpointError, match=r"step-00000012.*step-00000010.*begin anew"):
            train(tiny_config(files, tmp_path, {"checkpoint.resume": resume, "training.max_steps": 20}))
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def test_a_run_copied_with_links_followed_goes_on(files, tmp_path):
    """Where `latest` and `best` have become directories, they become links again, and the run ends as the original."""
    train(tiny_config(files, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "copied", symlinks=False)
    for name in ("whole", "copied"):
        assert train(tiny_config(files, tmp_path / name, {"training.max_steps": 20})) == 0
    assert step_lines(tmp_path / "copied/run") == step_lines(tmp_path / "whole/run")
    names = [
        sorted(path.name for path in (tmp_path / name / "run/checkpoints").iterdir()) for name in ("whole", "copied")
    ]
    assert names[0] == names[1]
    assert (tmp_path / "copied/run/checkpoints/best").is_symlink()


def test_a_finished_run_has_nothing_left_to_do(files, tmp_path):
    """The same command ends at once: it repeats no step, no line and no checkpoint."""
    config = tiny_config(files, tmp_path)
    train(config)
    before = final_files(tmp_path / "run")
    assert train(config) == 0
    assert [line["step"] for line in step_lines(tmp_path / "run")] == list(range(1, 13))
    assert events(tmp_path / "run", "checkpoint_saved") == [5, 10, 12]
    torch.testing.assert_close(final_files(tmp_path / "run"), before, rtol=0, atol=0)


def test_more_steps_extend_a_finished_run(files, tmp_path):
    """With a larger max_steps the run goes on from its last checkpoint."""
    train(tiny_config(files, tmp_path))
    assert train(tiny_config(files, tmp_path, {"training.max_steps": 15})) == 0
    assert [line["step"] for line in step_lines(tmp_path / "run")] == list(range(1, 16))
    assert events(tmp_path / "run", "resumed") == [12]


def test_new_optimizer_settings_hold_after_a_resume(files, tmp_path, monkeypatch):
    """A changed weight decay or beta holds after the resume; the checkpoint's does not silently replace it."""
    train(tiny_config(files, tmp_path))
    seen = []
    monkeypatch.setattr(
        trainer, "train_step", lambda model, optimizer, *args, **kwargs: seen.append(optimizer) or kill()
    )
    with pytest.raises(Killed):
        train(
            tiny_config(
                files,
                tmp_path,
                {"training.max_steps": 15, "optimizer.weight_decay": 0.5, "optimizer.beta2": 0.9},
            )
        )
    assert [group["weight_decay"] for group in seen[0].param_groups] == [0.5, 0.0]
    assert seen[0].param_groups[0]["betas"] == (0.9, 0.9)


CHANGES = {
    "width": ({"model.d_model": 48}, r"model\.d_model was 32, now 48"),
    "tying": ({"model.tie_embeddings": True}, r"model\.tie_embeddings was False, now True"),
    "optimizer": ({"optimizer.name": "sgd"}, r"optimizer\.name was adamw, now sgd"),
    "Muon": ({"optimizer.name": "muon"}, r"optimizer\.name was adamw, now muon"),
    "soft cap": ({"model.logit_soft_cap": 30.0}, r"model\.logit_soft_cap was None, now 30.0"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_model_or_optimizer_is_refused(name, files, tmp_path):
    """A resume with other shapes or another optimizer says what changed, and leaves the run as it was."""
    train(tiny_config(files, tmp_path))
    metrics = (tmp_path / "run/metrics.jsonl").read_bytes()
    changes, message = CHANGES[name]
    with pytest.raises(ValueError, match=message):
        train(tiny_config(files, tmp_path, {**changes, "training.max_steps": 20}))
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize(
    "changes",
    [
        {"model.attention": "reference"},
        {"model.activation_checkpointing": True},
        {"model.num_kv_heads": 2},  # the default, spelled out
        {"training.micro_batch_size": 4},
        {"training.z_loss": 1e-4},
        {"model.zero_init_outputs": True},  # only for initial weights
        {"model.dropout": {"residual": 0.1}},
    ],
    ids=str,
)
def test_another_way_to_compute_the_same_may_resume(changes, files, tmp_path):
    """Settings that change how, but not what, a model computes may change between two starts."""
    train(tiny_config(files, tmp_path))
    assert train(tiny_config(files, tmp_path, {**changes, "training.max_steps": 14})) == 0


def test_changed_data_is_refused_by_fingerprint(files, tmp_path):
    """The refusal of another token file of the same tokenizer names both fingerprints."""
    train(tiny_config(files, tmp_path))
    saved = read_state(resolve(tmp_path / "run"))["data"]["train_sha256"]
    config = tiny_config(files, tmp_path, {"data.train": str(files.valid), "training.max_steps": 20})
    with pytest.raises(ValueError, match="train has changed since this checkpoint") as caught:
        train(config)
    now = json.loads(files.valid.with_suffix(".json").read_text())["sha256"]
    assert saved[:12] in str(caught.value)
    assert now[:12] in str(caught.value)


def test_a_changed_tokenizer_is_refused_by_fingerprint(files, tmp_path):
    """Data and tokenizer that are replaced together fit each other, but not the checkpoint, so the run is refused."""
    train(tiny_config(files, tmp_path))
    (tmp_path / "other").mkdir()
    other = write_tiny_files(tmp_path / "other", seed=1)
    config = tiny_config(other, tmp_path, {"training.max_steps": 20})
    with pytest.raises(ValueError, match="has changed since this checkpoint"):
        train(config)
    fingerprints = [Tokenizer.from_directory(place.tokenizer).fingerprint() for place in (files, other)]
    same_data = resolve(tmp_path / "run") / "state.json"
    state = json.loads(same_data.read_text())
    state["data"]["train_sha256"] = json.loads(other.train.with_suffix(".json").read_text())["sha256"]
    state["state_sha256"] = values_sha256(state, kept_in="state_sha256")
    same_data.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="tokenizer has changed since this checkpoint") as caught:
        train(config)
    assert all(fingerprint[:12] in str(caught.value) for fingerprint in fingerprints)


@pytest.mark.parametrize(("before", "now", "is_refused"), [("a", "b", True), ("a", None, True), (None, "b", False)])
def test_other_targets_of_the_same_ids_are_refused(before, now, is_refused):
    """What of a conversation is learnt may change while its ids stay; earlier checkpoints do not say what it was."""
    theirs, ours = ({"train_sha256": "x"} | ({"train_mask_sha256": one} if one else {}) for one in (before, now))
    with pytest.raises(ValueError, match="train_mask has changed") if is_refused else nullcontext():
        check_same_data(Path("step"), theirs, ours)


def test_a_state_without_what_a_resume_needs_is_refused(files, tmp_path):
    """The refusal of a checkpoint that another tool wrote names the keys that it lacks."""
    train(tiny_config(files, tmp_path))
    path = resolve(tmp_path / "run") / "state.json"
    state = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("rng", "data")}
    path.write_text(json.dumps({**state, "state_sha256": values_sha256(state, kept_in="state_sha256")}))
    with pytest.raises(CheckpointError, match="does not hold data, rng"):
        train(tiny_config(files, tmp_path))


@pytest.mark.parametrize(("resume", "done_before"), [("never", True), ("required", False)])
def test_resume_can_be_forbidden_or_demanded(resume, done_before, files, tmp_path):
    """`never` refuses a run with a checkpoint, `required` a run without one; neither touches a file."""
    if done_before:
        train(tiny_config(files, tmp_path))
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(OSError, match=f'checkpoint.resume = "{resume}"'):
        train(tiny_config(files, tmp_path, {"checkpoint.resume": resume}))
    assert sorted(path for path in tmp_path.rglob("*")) == before


# --- ending early ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_ends_with_its_code(number, code, files, tmp_path, monkeypatch, capsys):
    """The current step is finished and saved, the exit code names the signal, and the run then goes on bit for bit."""
    whole, config = tiny_config(files, tmp_path / "whole"), tiny_config(files, tmp_path / "stopped")
    train(whole)
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_before(patch, 7, lambda: os.kill(os.getpid(), number))
        assert train(config) == code
    assert signal.getsignal(number) == handler
    run_dir = tmp_path / "stopped/run"
    assert events(run_dir, "checkpoint_saved") == [5, 7]
    assert f"{signal.Signals(number).name}: saving after this step" in capsys.readouterr().err
    assert train(config) == 0
    assert events(run_dir, "resumed") == [7]
    numbers = [{k: v for k, v in line.items() if "val" not in k} for line in step_lines(run_dir)]
    assert numbers == [{k: v for k, v in line.items() if "val" not in k} for line in step_lines(tmp_path / "whole/run")]
    torch.testing.assert_close(final_files(run_dir), final_files(tmp_path / "whole/run"), rtol=0, atol=0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_real_process_obeys_a_signal(files, tmp_path):
    """The command as users start it writes lines while it runs; SIGTERM ends it with 143 and a whole checkpoint.

    On one process it imports neither torch's compiler nor FSDP2, which would take longer than all else of a start.
    """
    config = tiny_config(files, tmp_path, {"training.max_steps": 10**6, "checkpoint.interval": 0})
    config = config.model_copy(update={"logging": config.logging.model_copy(update={"backend": "console"})})
    (tmp_path / "train.toml").write_text(dump_toml(config))
    with (tmp_path / "stderr").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-X", "importtime", "-m", "cli.train", "--config", tmp_path / "train.toml"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
    for line in process.stdout:
        if json.loads(line).get("step") == 3:
            break
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=600)
    stderr = (tmp_path / "stderr").read_text()
    assert process.returncode == 143
    assert "Traceback" not in stderr
    imported = {line.split("|")[-1].strip() for line in stderr.splitlines() if line.startswith("import time:")}
    assert {"torch", "torch.optim"} <= imported
    assert imported.isdisjoint({"torch._dynamo", "torch.distributed.fsdp"})
    records = [json.loads(line) for line in stdout.splitlines()]
    assert [record["event"] for record in records[-3:]] == ["checkpoint_saved", "summary", "finished"]
    assert records[-1]["reason"] == "signal"
    directory = newest_whole(tmp_path / "run/checkpoints")
    assert directory is not None
    assert step_of(directory) == records[-1]["step"]


def a_clock(monkeypatch, seconds_per_look: float) -> None:
    """Let that much time pass between two looks of a run at its clock; it looks once each step."""

    def seconds(self):
        self.looks = getattr(self, "looks", -1) + 1
        return self._before + seconds_per_look * self.looks

    monkeypatch.setattr(Timer, "seconds", seconds)


def test_max_time_saves_and_ends(files, tmp_path, monkeypatch):
    """A run out of time ends after a step, validated, saved and sampled from, and says why; later it goes on."""
    a_clock(monkeypatch, 1.0)
    changes = {"training.max_steps": 10**6, "schedule.warmup_steps": 2, "training.max_time": "20s"}
    changes |= {"samples.interval": 15, "samples.sampling": {"max_new_tokens": 4}}
    assert train(tiny_config(files, tmp_path, changes)) == 0
    last = read_records(tmp_path / "run")[-1]
    assert (last["event"], last["step"], last["reason"]) == ("finished", 20, "max_time")
    assert events(tmp_path / "run", "checkpoint_saved")[-1] == 20
    assert events(tmp_path / "run", "sample") == [15, 20]
    lines = step_lines(tmp_path / "run")
    rates = [line["metrics.lr"] for line in lines]
    assert rates[:2] == pytest.approx([1.5e-3, 3e-3], rel=0.02)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] < 0.01 * max(rates)
    assert "metrics.val_loss" in lines[-1]
    assert train(tiny_config(files, tmp_path, changes)) == 0
    assert step_lines(tmp_path / "run") == lines  # its time is over, however often it is started
    assert train(tiny_config(files, tmp_path, {**changes, "training.max_time": "30s"})) == 0
    assert read_records(tmp_path / "run")[-1]["step"] == 30


def test_time_counts_before_there_was_a_limit(files, tmp_path, monkeypatch):
    """A limit that comes later is that of the whole run."""
    a_clock(monkeypatch, 1.0)
    monkeypatch.setattr(Timer, "elapsed_s", lambda self: 8.0)
    assert train(tiny_config(files, tmp_path, {"training.max_steps": 8})) == 0
    changes = {"training.max_steps": 10**6, "training.max_time": "12s"}
    assert train(tiny_config(files, tmp_path, changes)) == 0
    assert read_records(tmp_path / "run")[-1]["step"] == 12


def test_time_counts_while_there_is_no_limit(files, tmp_path, monkeypatch):
    """Also of a run that had a limit before."""
    a_clock(monkeypatch, 1.0)
    run = tiny_config(files, tmp_path, {"training.max_steps": 4, "training.max_time": "20s"})
    assert train(run) == 0
    assert read_state(resolve(tmp_path / "run"))["seconds"] == 4.0
    assert train(tiny_config(files, tmp_path, {"training.max_steps": 9})) == 0
    assert read_state(resolve(tmp_path / "run"))["seconds"] == 9.0
    assert train(tiny_config(files, tmp_path, {"training.max_steps": 10**6, "training.max_time": "12s"})) == 0
    assert read_records(tmp_path / "run")[-1]["step"] == 12


def test_a_run_whose_time_is_used_up_before_there_is_a_limit_is_done(files, tmp_path, monkeypatch):
    """Started again with a limit that it has passed, it makes nothing and leaves its settings as they are."""
    monkeypatch.setattr(Timer, "elapsed_s", lambda self: 8.0)
    assert train(tiny_config(files, tmp_path, {"training.max_steps": 8})) == 0
    settings, number = (tmp_path / "run/config.toml").read_text(), len(read_records(tmp_path / "run"))
    assert train(tiny_config(files, tmp_path, {"training.max_steps": 10**6, "training.max_time": "5s"})) == 0
    assert (tmp_path / "run/config.toml").read_text() == settings
    assert {line.get("event") for line in read_records(tmp_path / "run")[number:]} <= {"summary", "finished"}


def test_what_else_says_on_what_a_run_is_measured(files, tmp_path):
    """Rows of documents are others for each length of a row; the mask of documents changes what a token sees."""
    found = []
    documents = {"data.order": "epoch", "data.packing": "documents"}
    for name, changes in enumerate([{}, documents, {**documents, "model.document_mask": True}]):
        train(tiny_config(files, tmp_path / str(name), {**changes, "training.max_steps": 3}))
        found.append(read_state(resolve(tmp_path / str(name) / "run"))["measured_on"])
    keys = ("valid_packing", "valid_context_length", "document_mask", "valid_mask_sha256")
    assert [tuple(one.get(key) for key in keys) for one in found] == [
        (None, None, False, None),
        ("documents", 16, False, None),
        ("documents", 16, True, None),
    ]


def test_another_validation_text_begins_anew(files, tmp_path):
    """Its losses are not compared with those before: the first checkpoint with one is the best again."""
    changes = {"training.max_steps": 8, "checkpoint.interval": 4, "training.eval_interval": 4}
    train(tiny_config(files, tmp_path, changes))
    before = read_state(resolve(tmp_path / "run"))
    other = {**changes, "training.max_steps": 12, "training.eval_tokens": 64}
    with pytest.warns(UserWarning, match="the best checkpoint and early stopping begin anew"):
        train(tiny_config(files, tmp_path, other))
    after = read_state(resolve(tmp_path / "run"))
    assert before["measured_on"]["valid_tokens"] > after["measured_on"]["valid_tokens"]
    assert (after["best_step"], after["best_val_loss"]) == (12, after["val_loss"])
    assert after["validations_since_lowest"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tiny_config(files, tmp_path, {**other, "training.max_steps": 16}))


def test_a_run_with_a_time_limit_goes_on_with_the_time_that_is_left(files, tmp_path, monkeypatch):
    """Killed and started again, it makes the same steps at the same rates as an undisturbed run."""
    a_clock(monkeypatch, 1.0)
    changes = {"training.max_steps": 10**6, "schedule.warmup_steps": "10%", "training.max_time": "20s"}
    whole, pieces = (tiny_config(files, tmp_path / name, changes) for name in ("whole", "pieces"))
    train(whole)
    run_in_pieces(pieces, [8, 18], monkeypatch)
    assert step_lines(tmp_path / "pieces/run") == step_lines(tmp_path / "whole/run")
    states = [read_state(resolve(tmp_path / name / "run")) for name in ("whole", "pieces")]
    assert states[0]["seconds"] == states[1]["seconds"] == 20.0


@pytest.mark.parametrize("stopped_by", ["max_steps", "max_time", "SIGTERM"])
def test_a_run_in_slices_stops_early_where_an_uninterrupted_one_does(stopped_by, files, tmp_path, monkeypatch):
    """The validation at the end of a slice counts as any other, so the saved counts are the same."""
    changes = {
        "training.max_steps": 100,
        "training.eval_interval": 2,
        "training.early_stop_patience": 3,
        "schedule.name": "constant",
        "schedule.warmup_steps": 0,
        "checkpoint.interval": 1,
    }
    losses = [9.0, 5.0, 3.9, 4.0, 3.8, 4.5, 3.7, 4.25, 3.6, 4.0, 3.5, 3.0]  # the odd steps' are not counted
    monkeypatch.setattr(
        trainer.Trainer, "validate", lambda self: EvalResult(loss=losses[self.state.step - 1], bits_per_byte=1.0)
    )
    train(tiny_config(files, tmp_path / "whole", changes))
    a_clock(monkeypatch, 1.0)
    for end in (1, 2, 3, 6, 9, 12):
        limits = {"max_steps": {"training.max_steps": end}, "max_time": {"training.max_time": f"{end}s"}}
        slices = {**changes, **limits.get(stopped_by, {})}
        with monkeypatch.context() as patch:
            if stopped_by == "SIGTERM":
                stop_before(patch, end, lambda: os.kill(os.getpid(), signal.SIGTERM))
            train(tiny_config(files, tmp_path / "slices", slices))
    whole, slices = (read_state(resolve(tmp_path / name / "run")) for name in ("whole", "slices"))
    counted = ("step", "tokens", "best_val_loss", "best_step", "lowest_val_loss", "validations_since_lowest")
    assert {name: slices[name] for name in counted} == {name: whole[name] for name in counted}
    assert (whole["step"], whole["lowest_val_loss"], whole["validations_since_lowest"]) == (10, 4.0, 3)


def test_a_run_that_gets_no_better_stops_early(files, tmp_path, monkeypatch, capsys):
    """It saves and stops at the validation where patience ends, resumed or not; with more patience it goes on."""
    changes = {
        "training.max_steps": 60,
        "training.eval_interval": 2,
        "training.early_stop_patience": 3,
        "optimizer.learning_rate": 0.3,
        "schedule.name": "constant",
    }
    whole, pieces = (tiny_config(files, tmp_path / name, changes) for name in ("whole", "pieces"))
    assert train(whole) == 0
    assert "stopped by training.early_stop_patience = 3 at step" in capsys.readouterr().err
    lines, last = step_lines(tmp_path / "whole/run"), read_records(tmp_path / "whole/run")[-1]
    losses = {line["step"]: line["metrics.val_loss"] for line in lines if line["step"] % 2 == 0}
    assert (last["event"], last["reason"]) == ("finished", "early_stop")
    assert last["step"] == min(losses, key=losses.__getitem__) + 2 * 3 < 60
    assert events(tmp_path / "whole/run", "checkpoint_saved")[-1] == last["step"]
    run_in_pieces(pieces, [last["step"] - 3, last["step"]], monkeypatch)
    assert step_lines(tmp_path / "pieces/run") == lines
    assert train(pieces) == 0
    assert step_lines(tmp_path / "pieces/run") == lines
    assert train(tiny_config(files, tmp_path / "pieces", {**changes, "training.early_stop_patience": 4})) == 0
    assert step_lines(tmp_path / "pieces/run")[-1]["step"] > last["step"]


def test_small_improvements_do_not_reset_patience_until_they_add_up(files, tmp_path, monkeypatch):
    """A run in pieces stops where the whole one does: after three validations that are not lower by more than 0.5."""
    changes = {
        "training.max_steps": 30,
        "training.eval_interval": 1,
        "training.early_stop_patience": 3,
        "training.early_stop_min_delta": 0.5,
        "checkpoint.interval": 2,
    }
    losses = [5.0, 4.75, 4.25, 4.0, 3.75, 3.0, 2.75, 2.625, 2.5, 1.0]  # lower by enough at steps 1, 3 and 6
    monkeypatch.setattr(
        trainer.Trainer, "validate", lambda self: EvalResult(loss=losses[self.state.step - 1], bits_per_byte=1.0)
    )
    train(tiny_config(files, tmp_path / "whole", changes))
    run_in_pieces(tiny_config(files, tmp_path / "pieces", changes), [4, 8], monkeypatch)
    for name in ("whole", "pieces"):
        state = read_state(resolve(tmp_path / name / "run"))
        assert (state["step"], state["patience_val_loss"], state["lowest_val_loss"]) == (9, 3.0, 2.5)
        assert (state["best_step"], read_records(tmp_path / name / "run")[-1]["reason"]) == (9, "early_stop")


@pytest.mark.parametrize(
    ("without", "message"),
    [("data.valid", "needs a token file in data.valid"), ("training.eval_interval", "needs eval_interval >= 1")],
)
def test_stopping_early_needs_validations(without, message, files, tmp_path):
    """The configuration refuses patience without a validation file or an interval."""
    tree = tiny_config(files, tmp_path).model_dump(mode="json", exclude_none=True)
    tree["training"]["early_stop_patience"] = 1
    section, name = without.split(".")
    tree[section][name] = 0 if section == "training" else None
    with pytest.raises(ValueError, match=message):
        trainer.TrainConfig.model_validate(tree)


def test_a_diverging_run_stops_and_says_what_to_do(files, tmp_path):
    """When the numbers stay not finite, the run ends with the step, the last checkpoint and a remedy."""
    config = tiny_config(
        files,
        tmp_path,
        {
            "optimizer.name": "sgd",
            "optimizer.learning_rate": 1e3,
            "optimizer.max_grad_norm": 0.0,
            "checkpoint.interval": 1,
            "training.max_steps": 100,
        },
    )
    with pytest.raises(FloatingPointError, match=r"step \d+: .*not finite[,;] .*lower optimizer\.learning_rate"):
        train(config)
    assert newest_whole(tmp_path / "run/checkpoints") is not None


def test_weights_that_are_not_finite_are_not_saved(files, tmp_path, monkeypatch):
    """A bad weight that no loss depends on, the embedding of a byte that never comes, still ends the run unsaved."""
    make = trainer.Trainer.step

    def spoil(self):
        result = make(self)
        if self.state.step == 7:
            with torch.no_grad():
                self.raw_model.token_embeddings.weight[0] = torch.inf
        return result

    monkeypatch.setattr(trainer.Trainer, "step", spoil)
    with pytest.raises(FloatingPointError, match=r"step 10: token_embeddings\.weight is not finite, not saved"):
        train(tiny_config(files, tmp_path))
    assert step_of(newest_whole(tmp_path / "run/checkpoints")) == 5


# --- checkpoints -------------------------------------------------------------------------------------------------


def test_latest_and_best_point_where_they_should(files, tmp_path, monkeypatch):
    """`latest` is the last step; `best` is the saved step with the lowest validation loss, and is never pruned."""
    losses = iter([5.0, 4.0, 3.0, 3.5, 4.5, 3.25])
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: EvalResult(loss=next(losses), bits_per_byte=1.0))
    changes = {"training.max_steps": 12, "training.eval_interval": 2}
    train(tiny_config(files, tmp_path, {**changes, "checkpoint.interval": 2, "checkpoint.keep": 2}))
    root = tmp_path / "run/checkpoints"
    assert (root / "best").resolve().name == step_name(6)
    assert (root / "latest").resolve().name == step_name(12)
    assert [step_of(path) for path in list_checkpoints(root)] == [12, 10, 6]
    assert read_state(root / "latest")["best_val_loss"] == 3.0


@pytest.mark.parametrize(
    ("first", "gone", "best", "losses"),
    [(12, 12, 4, [3.0, 3.4, 2.9, 3.6, 3.7]), (8, 4, 8, [3.0, 3.4, 3.6, 3.7])],
    ids=["the best one", "the best one of the one that is left"],
)
def test_where_the_best_checkpoint_is_gone_another_is(first, gone, best, losses, files, tmp_path, monkeypatch):
    """The links name what is there; where the best one is gone, that from which the run goes on counts."""
    told = iter(losses)
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: EvalResult(loss=next(told), bits_per_byte=1.0))
    changes = {"training.eval_interval": 4, "checkpoint.interval": 4, "checkpoint.keep": 4}
    train(tiny_config(files, tmp_path, {**changes, "training.max_steps": first}))
    root = tmp_path / "run/checkpoints"
    assert (root / "best").resolve() == root / step_name(gone)
    shutil.rmtree(root / step_name(gone))
    train(tiny_config(files, tmp_path, {**changes, "training.max_steps": 16}))
    state = read_state(root / "latest")
    assert (state["step"], state["best_step"], state["best_val_loss"]) == (16, best, {4: 3.0, 8: 3.4}[best])
    assert (root / "best").resolve() == root / step_name(best)


@pytest.mark.parametrize(
    ("losses", "best"),
    [([3.0, 3.0, 3.0, 3.0], 2), ([3.0, 3.0 + 1e-6, 3.0 + 2e-6, 3.0], 2), ([3.0, 2.999999, 2.999999, 3.0], 4)],
    ids=str,
)
def test_best_is_the_first_of_equally_good_checkpoints(losses, best, files, tmp_path, monkeypatch):
    """Only a lower loss moves it, not an equal one and not one that is the least bit higher."""
    told = iter(losses)
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: EvalResult(loss=next(told), bits_per_byte=1.0))
    changes = {"training.max_steps": 8, "training.eval_interval": 2, "checkpoint.interval": 2}
    train(tiny_config(files, tmp_path, changes))
    state = read_state(tmp_path / "run/checkpoints/latest")
    assert (state["best_step"], state["best_val_loss"]) == (best, min(losses))
    assert (tmp_path / "run/checkpoints/best").resolve().name == step_name(best)


def test_lines_are_written_before_the_checkpoint_is_announced(files, tmp_path, monkeypatch):
    """When `checkpoint_saved` is printed, the checkpoint is whole and the file has every step line up to it."""
    seen = []
    original = trainer.prune

    def prune(root, keep):
        lines = read_records(tmp_path / "run")
        assert lines[-1] == {"event": "checkpoint_saved", "step": step_of(resolve(root))}
        seen.append([line["step"] for line in lines if "metrics.loss" in line])
        verify(resolve(root))
        original(root, keep)

    monkeypatch.setattr(trainer, "prune", prune)
    train(tiny_config(files, tmp_path))
    assert seen == [list(range(1, step + 1)) for step in (5, 10, 12)]


def test_the_run_directory_holds_the_resolved_configuration(files, tmp_path):
    """`config.toml` of the run and of its checkpoints are the configuration of the run."""
    config = tiny_config(files, tmp_path)
    train(config)
    run_dir = tmp_path / "run"
    assert (run_dir / "config.toml").read_text() == dump_toml(config)
    assert load_config_of(resolve(run_dir)) == config


def test_a_run_without_validation_has_no_best(files, tmp_path):
    """Without `data.valid` nothing is validated, and only `latest` is kept up to date."""
    config = tiny_config(files, tmp_path).model_dump(mode="json", exclude_none=True)
    del config["data"]["valid"]
    train(trainer.TrainConfig.model_validate(config))
    assert not any("metrics.val_loss" in line for line in step_lines(tmp_path / "run"))
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
        "latest",
        "step-00000010",
        "step-00000012",
    ]


# --- refusals and pieces -----------------------------------------------------------------------------------------


def test_a_refused_run_leaves_no_directory(files, tmp_path):
    """Data that cannot be used is refused before anything is written."""
    with pytest.raises(ValueError, match="fewer than"):
        train(tiny_config(files, tmp_path / "runs", {"model.context_length": 10**6}))
    assert not (tmp_path / "runs").exists()


def sizes(batch_size: int, micro_batch_size: int | None) -> SimpleNamespace:
    """Return the sizes of batches, as in [training]."""
    return SimpleNamespace(batch_size=batch_size, micro_batch_size=micro_batch_size)


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "world_size", "expected"),
    [
        *[(8, None, 1, 1), (8, 2, 1, 4), (8, 2, 2, 2), (8, None, 4, 1), (1, None, 1, 1)],
        *[(8, 3, 1, 3), (8, 4, 4, 1), (9, None, 2, 1), (8, None, 3, 1), (8, 1, 3, 3), (7, 2, 3, 2)],  # uneven
    ],
)
def test_accumulation_steps(batch_size, micro_batch_size, world_size, expected):
    """A batch is cut into equally many micro-batches for every rank, none of them larger than asked for."""
    per_pass = sequences_per_pass(sizes(batch_size, micro_batch_size), world_size)
    assert per_pass <= math.ceil(batch_size / world_size)  # what no rank passes at once needs no memory
    assert num_accumulation_steps(batch_size, per_pass, world_size) == expected


def test_a_rank_without_a_sequence_is_refused():
    """The refusal names both numbers, and comes before any batch."""
    with pytest.raises(ValueError, match=r"batch_size: expected a sequence for each of the 4 processes, found 2"):
        num_accumulation_steps(2, sequences_per_pass(sizes(2, None), 4), 4)


def test_token_bytes_cover_the_model_vocabulary(files):
    """Special tokens and ids without a token have no bytes; the others have those of their text."""
    tokenizer = Tokenizer.from_directory(files.tokenizer)
    lengths = token_bytes(tokenizer, tokenizer.vocab_size + 10, torch.device("cpu"))
    assert len(lengths) == tokenizer.vocab_size + 10
    assert lengths[-10:].sum() == 0
    text = "Émile finds two 🍎.\n"
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


# --- several processes -------------------------------------------------------------------------------------------


COMMAND = ("--no-python", sys.executable, "-m", "cli.train")


def torchrun(config: Path, *changes: str, program: tuple[str, ...] = COMMAND) -> subprocess.Popen[str]:
    """Start the command, or a Python program that calls it, on two gloo ranks, as the docs start the console script."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command += [f"--master-port={port}", *program, "--config", str(config), *changes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Return the processes that torchrun has started, as Linux lists them."""
    return [int(number) for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


several = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="gloo on loopback is tested on Linux")


@pytest.mark.slow
@several
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_ranks_give_the_losses_of_one_process(optimizer, files, tmp_path):
    """Two gloo ranks use the same batches, agree to 1e-5, write one log and one set of checkpoints, and resume."""
    changes = {"schedule.name": "constant", "optimizer.name": optimizer}
    train(tiny_config(files, tmp_path / "one", changes))
    config = tiny_config(files, tmp_path / "two", changes)
    (tmp_path / "two.toml").write_text(dump_toml(config))
    for steps in (8, 12):
        process = torchrun(tmp_path / "two.toml", f"--training.max_steps={steps}")
        _, stderr = process.communicate(timeout=600)
        assert process.returncode == 0, stderr[-3000:]
    alone, together = step_lines(tmp_path / "one/run"), step_lines(tmp_path / "two/run")
    assert [line["step"] for line in together] == list(range(1, 13))
    for key in ("metrics.loss", "metrics.grad_l2_norm"):
        assert [line[key] for line in together] == pytest.approx([line[key] for line in alone], rel=1e-5)
    assert [line["metrics.tokens"] for line in together] == [line["metrics.tokens"] for line in alone]
    assert events(tmp_path / "two/run", "resumed") == [8]


@pytest.mark.slow
@several
@pytest.mark.parametrize("told", ["rank 0", "rank 1", "all at once", "torchrun"])
def test_a_signal_to_any_rank_stops_all_at_the_same_step(told, files, tmp_path):
    """Whether one rank, all ranks or torchrun gets the signal, one checkpoint is saved, and all ranks end."""
    config = tiny_config(files, tmp_path, {"training.max_steps": 10**6, "logging.backend": "console"})
    (tmp_path / "two.toml").write_text(dump_toml(config))
    process = torchrun(tmp_path / "two.toml")
    for line in process.stdout:
        if '"step": 3' in line:
            break
    if told == "all at once":  # as Ctrl-C does in a terminal: torchrun then tells the ranks once more
        os.killpg(process.pid, signal.SIGINT)
    elif told == "torchrun":
        process.terminate()
    else:
        os.kill(sorted(ranks_of(process))[int(told[-1])], signal.SIGUSR1)
    stdout, stderr = process.communicate(timeout=600)
    records = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    name = {"all at once": "SIGINT", "torchrun": "SIGTERM"}.get(told, "SIGUSR1")
    assert {"reason": "signal", "signal": name}.items() <= records[-1].items(), stderr[-3000:]
    assert step_of(newest_whole(tmp_path / "run/checkpoints")) == records[-1]["step"]
    assert (process.returncode == 0) == (name == "SIGUSR1")


@pytest.mark.slow
@several
def test_two_ranks_skip_the_same_steps(files, tmp_path):
    """When the loss is no longer finite, all ranks skip, and stop together with the line that says so."""
    changes = {"optimizer.name": "sgd", "optimizer.learning_rate": 1e3, "optimizer.max_grad_norm": 0.0}
    changes |= {"training.eval_interval": 0, "checkpoint.interval": 0}  # a validation would end the run
    changes |= {"training.max_steps": 100, "training.max_skipped_steps": 3}
    config = tiny_config(files, tmp_path, changes)
    (tmp_path / "two.toml").write_text(dump_toml(config))
    process = torchrun(tmp_path / "two.toml")
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 1
    skipped = events(tmp_path / "run", "step_skipped")
    assert skipped == list(range(skipped[0], skipped[0] + 4))
    assert stderr.count("training.max_skipped_steps is 3; the last checkpoint is") == 2


# --- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bf16_ends_where_fp32_ends(tmp_path):
    """After 2,000 steps on real text the validation loss in bf16 is within 1 % of that in fp32; no step was skipped."""
    files = write_docstring_files(tmp_path)
    changes = {
        "model": {"vocab_size": 512, "context_length": 64, "d_model": 64, "num_layers": 2, "num_heads": 2},
        "training.max_steps": 2000,
        "training.log_interval": 100,
        "training.eval_interval": 0,
        "training.eval_tokens": 50 * 8 * 64,
        "schedule": {"warmup_steps": 100, "min_learning_rate": 3e-4},
        "checkpoint.interval": 0,
    }
    losses = {}
    for precision in ("fp32", "bf16"):
        assert train(tiny_config(files, tmp_path / precision, changes | {"training.precision": precision})) == 0
        assert events(tmp_path / precision / "run", "step_skipped") == []
        losses[precision] = step_lines(tmp_path / precision / "run")[-1]["metrics.val_loss"]
    print(f"validation loss after 2,000 steps: {losses}")
    assert losses["fp32"] < 3.5, "neither learned anything: the comparison would say nothing"
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)


@pytest.mark.parametrize(
    "changes", [{"training.micro_batch_size": 1}, {"training.micro_batch_size": 4}, {"training.batch_size": 3}], ids=str
)
def test_a_validation_does_not_depend_on_the_batch(changes, files, tmp_path):
    """The sizes of batches change its speed, not what it measures: the whole windows in the first `eval_tokens`."""
    results = []
    for name, settings in (("whole", {}), ("cut", changes)):
        settings = {**settings, "training.eval_tokens": 16 * 5 + 3}
        run = prepare_run(tiny_config(files, tmp_path / name, settings), tmp_path / name, world=World())
        results.append(run.trainer().validate())
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-6)
    assert results[1].bits_per_byte == pytest.approx(results[0].bits_per_byte, rel=1e-6)


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"micro_batch_size": 4}, 3 * 4 * 16),
        ({}, 3 * 8 * 16),
        ({"micro_batch_size": "auto"}, 2**16),
        ({"eval_tokens": 100}, 100),
    ],
    ids=str,
)
def test_the_eval_batches_of_earlier_versions_are_read(training, expected, files, tmp_path):
    """They mean the same number of tokens as before; with "auto" that number is unknown, and the default holds."""
    tree = tiny_config(files, tmp_path).model_dump(mode="json", exclude_none=True)
    del tree["training"]["eval_tokens"]
    tree["training"] |= {"eval_batches": 3} | training
    config = trainer.TrainConfig.model_validate(tree)
    assert config.training.eval_tokens == expected
    assert "eval_batches =" not in dump_toml(config)
    if "eval_tokens" not in training:  # which is of a later file, and then the older key says nothing
        with pytest.raises(ValueError, match="eval_batches"):
            trainer.TrainConfig.model_validate(tree | {"training": tree["training"] | {"eval_batches": "3"}})
