"""`transformerlm-plan` reads train's own file, prints one JSON line, and leaves no trace in the run."""

from __future__ import annotations

import tomllib

import pytest

from cli import plan as command
from tests.cli.commands import ROOT, call, shipped


def plan(pipeline, *arguments):
    """Plan the tiny run, and return how that ended and its facts."""
    done = call("plan", "--config", pipeline.train_toml, *arguments)
    assert done.code == 0, done.stderr
    (facts,) = done.records
    return done, facts


def test_the_file_of_train_is_planned_as_it_is(pipeline):
    """The same TOML gives the parameters, memory and FLOPs that the run itself announced, and a measured speed."""
    done, facts = plan(pipeline, "--calibration_steps", "2")
    started = pipeline.outcome.records[0]
    assert facts["parameters.total"] == started["parameters"]
    assert facts["flops.per_token"] == started["flops_per_token"]
    assert facts["memory.total_bytes"] == started["memory_estimate_bytes"]
    assert facts["micro_batch_size"] == started["micro_batch_size"]
    assert facts["calibration.steps"] == 2
    assert facts["tokens_per_second"] * facts["calibration.seconds_per_step"] == pytest.approx(8 * 16)
    steps, validations = (facts[f"calibration.seconds_per_{what}"] for what in ("step", "validation"))
    assert facts["eta_seconds"] == pytest.approx(12 * steps + 3 * validations)
    assert 0 < facts["flops_utilisation"] < 1
    # It is 0 where earlier tests in this process have used more memory.
    assert ("measured at the peak" in done.stderr) == bool(facts["calibration.peak_memory_bytes"])
    assert f"times the {facts['data.tokens']:,} of the data" in done.stderr


def test_the_run_is_not_touched(pipeline):
    """A plan of an existing run changes none of its files."""

    def state():
        return {path: path.stat().st_mtime_ns for path in pipeline.run.parent.rglob("*")}

    before = state()
    plan(pipeline, "--calibration_steps=1")
    assert state() == before


def test_no_data_and_no_steps_are_needed(pipeline):
    """Without token files and with calibration_steps = 0, a plan is arithmetic alone."""
    done, facts = plan(pipeline, "--calibration_steps=0", "--data.train=nowhere.npy", "--data.tokenizer=nowhere")
    assert not {"data.tokens", "tokens_per_second", "eta_seconds"} & facts.keys()
    assert "measured" not in done.stderr
    assert "tokens/s" not in done.stderr


@pytest.mark.parametrize(
    ("tokens_per_parameter", "words"),
    [
        (2, "far below 20: with these FLOPs a smaller model on more tokens would be better"),
        (20, "near the 20 that are best for a given number of FLOPs"),
        (200, "far above 20: with these FLOPs a larger model on fewer tokens would be better"),
    ],
)
def test_tokens_per_parameter_come_with_what_they_mean(pipeline, tokens_per_parameter, words):
    """The plan says whether the model is too large or too small for the tokens that it is trained on."""
    steps = tokens_per_parameter * pipeline.outcome.records[0]["parameters"] // (8 * 16)
    done, facts = plan(pipeline, "--calibration_steps=0", f"--training.max_steps={steps}")
    assert f"{facts['tokens.per_parameter']:.3g} tokens, {words}\n" in done.stderr


def test_the_shipped_file_needs_no_training_of_that_size():
    """The shipped plan, of a model too large for a test, answers by arithmetic and chooses its micro-batch."""
    done = call("plan", "--config", shipped("plan"))
    (facts,) = done.records
    assert done.code == 0
    assert facts["parameters.total"] == 123_587_328
    assert 'chosen by micro_batch_size = "auto"' in done.stderr


def test_a_model_too_large_is_told_what_to_change(pipeline):
    """A run that does not fit is not measured; the plan lists changes that save memory, with their totals."""
    done, facts = plan(pipeline, "--model.d_model=262144", "--model.d_ff=1048576")
    assert facts["memory.fits"] is False
    assert "tokens_per_second" not in facts
    assert "not measured: the estimate exceeds the memory that is free" in done.stderr
    assert "does not fit: cpu has " in done.stderr
    assert "with training.micro_batch_size = 1: " in done.stderr
    assert "with model.activation_checkpointing = true: " in done.stderr


def test_a_device_that_runs_out_of_memory_does_not_fit(pipeline, monkeypatch):
    """The measurement has the last word."""
    import torch

    from transformerlm.training.planning import calibration

    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(calibration, "calibrate", full)
    done, facts = plan(pipeline)
    assert facts["memory.fits"] is False
    assert "does not fit" in done.stderr


def test_gpus_that_are_not_here_are_planned_for(tmp_path):
    """The recipe of 124 M parameters on 8 GPUs, planned on a CPU, has the cut of the batch and an assumed time."""
    recipe = ROOT / "docs/recipes/openwebtext/train-125m.toml"
    printed = call("plan", "--config", recipe, "--gpus=8", "--gpu_memory=80GB", "--print-config").stdout
    (tmp_path / "plan.toml").write_text(printed)
    again = call("plan", "--config", tmp_path / "plan.toml", "--print-config")
    assert (again.code, again.stdout) == (0, printed), again.stderr
    done = call("plan", "--config", recipe, "--machine.gpu=H100", "--machine.num_gpus=8", "--machine.mfu=0.4")
    (facts,) = done.records
    assert (done.code, facts["device"], facts["precision"]) == (0, "8 x H100", "bf16")
    assert "480 = 60 x 8 GPUs x 1 forward pass a step on each" in done.stderr
    assert "fits: 8 x H100 with 80.0 GB each" in done.stderr
    assert "tokens/s on 8 x H100 in bf16: assumed, not measured" in done.stderr
    assert "40% of the 989 TFLOP/s that each has on paper" in done.stderr
    assert not {"tokens_per_second", "disk.free_bytes"} & facts.keys()
    done = call("plan", "--config", recipe, "--machine.gpu=L4", "--machine.num_gpus=7")
    assert "480 on 7 GPUs: 68 or 69 each, in 3 forward passes a step on each" in done.stderr


LARGE = ("--config", shipped("plan"), "--model.d_model=6144", "--model.num_layers=48")


def test_a_number_of_gpus_is_enough_to_plan_for_them():
    """`--gpus` and `--gpu_memory` are keys of [machine]; a table shows which shard fits, and no speed is made up."""
    done = call("plan", *LARGE, "--gpus", "64", "--gpu_memory", "80GB")
    (facts,) = done.records
    assert (done.code, facts["num_processes"], facts["memory.device_bytes"]) == (0, 64, 80e9)
    assert [row["shard_size"] for row in facts["sharding"]] == [1, 2, 4, 8, 16, 32, 64]
    assert (facts["shard_size"], facts["memory.fits"]) == (8, True)
    assert facts["sharding"][3]["total_bytes"] == facts["memory.total_bytes"]
    assert not [name for name in facts if name.startswith("assumed")]
    lines = done.stderr.splitlines()
    assert f'{"shard":<14}8 GPUs to a copy of the model, 8 copies: parallel.shard = "auto"' in lines
    table = [line.split() for line in lines if line.startswith("  ") and "fit" in line and "GPU" not in line]
    assert [row[0] for row in table] == ["1", "2", "4", "8", "16", "32", "64"]
    assert [" ".join(row[-2:]) for row in table if row[0] in ("1", "8")] == ["not fit", "fits, auto"]
    assert f"{facts['checkpoint.write_seconds'] // 60:.0f}:" in done.stderr
    assert "to write it at 2 GB/s: assumed, not measured" in done.stderr
    chosen = call("plan", *LARGE, "--gpus=64", "--parallel.shard=16")
    assert chosen.records[0]["shard_size"] == 16
    assert [line for line in chosen.stderr.splitlines() if line.endswith("fits, used")]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--gpus", "0"], "--gpus: expected an integer >= 1 and <= 1048576, found 0 (an integer)"),
        (["--machine.num_gpus=0"], "--machine.num_gpus: expected an integer >= 1 and <= 1048576, found 0 (an integer)"),
        (["--gpu_memory=80TB"], 'or a size such as "80GB", found "80TB" (a string)'),
        (["--gpus"], "transformerlm-plan: argument --gpus: expected one argument"),
        (["--gpu", "3"], "transformerlm-plan: --gpu is not a known option (did you mean --machine.gpu"),
        (["--gpus=6", "--parallel.shard=4"], "error: parallel.shard = 4: expected a number that divides the 6 "),
        (["--gpus=12", "--parallel.shard=node"], 'error: parallel.shard = "node": expected the same number of '),
    ],
)
def test_errors_name_the_option_as_it_was_typed(arguments, line):
    """A short name has errors of its own."""
    done = call("plan", *LARGE, *arguments)
    assert (done.code, done.stdout) == (2, "")
    assert line in done.stderr


def test_without_cuda_the_way_to_plan_for_it_is_named(pipeline):
    """The error about a device that is not here says how to plan for it."""
    done = call("plan", "--config", pipeline.train_toml, "--training.device=cuda:99")
    assert done.code == 2
    assert "to plan for GPUs that are not here, give them: --machine.gpu=H100" in done.stderr


def test_speeds_on_paper_are_those_of_bf16(pipeline):
    """A run in fp32 is not planned by them."""
    arguments = ("--config", pipeline.train_toml, "--training.precision=fp32", "--machine.gpu=L4")
    done = call("plan", *arguments)
    assert done.code == 2
    assert 'training.precision = "fp32": the peak of machine.gpu is that of bf16' in done.stderr
    assert call("plan", *arguments, "--machine.tokens_per_second=9000").records[0]["precision"] == "fp32"


def test_training_takes_the_file_of_a_plan(tmp_path):
    """Training omits the keys that only a plan needs, and says so; plan reports a typo in them."""
    (tmp_path / "plan.toml").write_text(shipped("plan").read_text() + '\n[machine]\ngpu = "H100"\n')
    done = call("train", "--config", tmp_path / "plan.toml", "--print-config")
    assert (done.code, done.stderr) == (
        0,
        "warning: training leaves calibration_steps, machine to transformerlm-plan\n",
    )
    assert not {"calibration_steps", "machine"} & tomllib.loads(done.stdout).keys()
    assert call("plan", "--config", tmp_path / "plan.toml").records[0]["device"] == "1 x H100"


def test_a_wrong_key_is_one_line(pipeline):
    """Errors look as in every command."""
    done = call("plan", "--config", pipeline.train_toml, "--calibration_steps=-1")
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr == "--calibration_steps: expected an integer >= 0, found -1 (an integer)\n"
    assert command.PlanConfig.model_fields["calibration_steps"].default == 10
