"""`transformerlm-train`: JSON lines on stdout, words for people on stderr, and refusals in one line."""

from __future__ import annotations

import pytest

from tests.cli.commands import call
from tests.training.tiny_run import read_records


def test_stdout_is_the_log_file_line_by_line(pipeline):
    """Every line on stdout is JSON, and the lines are those of metrics.jsonl."""
    assert pipeline.outcome.code == 0
    assert pipeline.outcome.records == read_records(pipeline.run)


def test_the_first_line_announces_the_run(pipeline):
    """Before the first step one line says parameters, tokens per step, FLOPs, memory, device and ETA."""
    first = pipeline.outcome.records[0]
    assert first["event"] == "started"
    assert first["tokens_per_step"] == 8 * 16
    assert (first["step"], first["max_steps"], first["device"], first["precision"]) == (0, 12, "cpu", "fp32")
    for key in ("parameters", "flops_per_token", "memory_estimate_bytes", "eta_seconds"):
        assert first[key] > 0, key
    assert f"{first['parameters']:,} parameters" in pipeline.outcome.stderr.splitlines()[0]


def test_samples_come_while_training(pipeline):
    """Samples stand among the lines at their interval, and are shown to the person."""
    samples = [record for record in pipeline.outcome.records if record.get("event") == "sample"]
    assert [sample["step"] for sample in samples] == [6, 12]
    assert "step 6 sample: " in pipeline.outcome.stderr


def test_the_order_of_a_step_is_kept(pipeline):
    """A checkpoint is announced after its step's line, and the run's end comes last."""
    told = [(record.get("event", "step"), record["step"]) for record in pipeline.outcome.records]
    assert told.index(("step", 5)) < told.index(("checkpoint_saved", 5)) < told.index(("step", 6))
    last = [event for event, step in told if step == 12]
    assert last.index("checkpoint_saved") < last.index("finished") == len(last) - 1


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
    ],
)
def test_what_cannot_run_is_refused_in_one_line(change, message, pipeline, tmp_path):
    """Preflight refuses with exit 2 and one line before anything is written."""
    done = call("train", "--config", pipeline.train_toml, "--runs_dir", tmp_path / "runs", change)
    assert (done.code, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


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
    """A loss that is not finite is a failure, not a wrong input: exit 1, and one line at the end of stderr."""
    changes = ["--optimizer.name=sgd", "--optimizer.learning_rate=1000.0", "--optimizer.max_grad_norm=0.0"]
    done = call("train", "--config", pipeline.train_toml, "--runs_dir", tmp_path, *changes, "--training.max_steps=100")
    assert done.code == 1
    assert "lower optimizer.learning_rate" in done.stderr.splitlines()[-1]
    assert done.records
