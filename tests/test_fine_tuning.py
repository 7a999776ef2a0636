"""Fine-tuning as a user sees it: a base run, runs that begin with its weights, and what other commands make of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from config.io import dump_toml
from tests.cli.commands import Outcome, call
from tests.cli.test_serve import completed, serving
from tests.experiments.verified_run import replay_here
from tests.training.tiny_run import TinyFiles, read_records, step_lines, tiny_config, write_tiny_files
from transformerlm.checkpoints.directory import resolve
from transformerlm.checkpoints.load import load_config_of, load_model, load_weights, weights_of
from transformerlm.checkpoints.more_tokens import add_tokens
from transformerlm.checkpoints.validation import CheckpointError
from transformerlm.models.fine_tuning import is_lora
from transformerlm.training.build import build_model

CPU = torch.device("cpu")
LORA = {"rank": 4, "alpha": 8.0, "targets": ["layers.*"]}
OPTIMIZERS = {
    "adamw": {},
    "sgd": {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.learning_rate": 0.1},
    "muon": {"optimizer.name": "muon"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TinyFiles]:
    """Return a folder with a base run, and its files."""
    folder = tmp_path_factory.mktemp("fine-tuning")
    files = write_tiny_files(folder)
    done = train(files, folder, "base")
    assert done.code == 0, done.stderr
    return folder, files


def train(files: TinyFiles, folder: Path, name: str, *options: str, **changes: Any) -> Outcome:
    """Train a tiny run of this name, with dotted keys changed."""
    settings = {"logging.backend": "json", "logging.run_name": name, **changes}
    path = folder / f"{name}.toml"
    path.write_text(dump_toml(tiny_config(files, folder, settings)))
    return call("train", "--config", path, *options)


def tune(home: tuple[Path, TinyFiles], name: str, *options: str, **changes: Any) -> Outcome:
    """Train a run that begins with the weights of the base run."""
    folder, files = home
    return train(files, folder, name, *options, **{"checkpoint.init_from": str(folder / "base"), **changes})


def tensors(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors of a run's newest checkpoint, or of a step's."""
    directory = resolve(run) if step is None else run / "checkpoints" / f"step-{step:08d}"
    return load_file(directory / "model.safetensors") | {
        f"optimizer.{name}": one for name, one in load_file(directory / "optimizer.safetensors").items()
    }


@pytest.fixture(scope="module")
def lora_run(home: tuple[Path, TinyFiles]) -> Path:
    """Return a run with LoRA of a few samples."""
    done = tune(
        home,
        "lora",
        **{
            "fine_tuning.lora": {**LORA, "dropout": 0.1},
            "optimizer.learning_rate": 0.02,
            "samples.interval": 6,
            "samples.prompts": ["Ada"],
            "samples.sampling.max_new_tokens": 8,
            "samples.sampling.temperature": 0.0,
        },
    )
    assert done.code == 0, done.stderr
    assert "by LoRA of rank 4; all others are frozen" in done.stderr
    return home[0] / "lora"


# --- freezing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"training.micro_batch_size": 2, "model.activation_checkpointing": True, "model.dropout": {"residual": 0.1}}],
    ids=["plain", "accumulation"],
)
def test_frozen_weights_stay_and_have_no_states(optimizer, changes, home):
    """They are those of the base, bit for bit, without decay; all others have moved; states are for those alone."""
    name = f"freeze-{optimizer}-{len(changes)}"
    frozen = ["token_embeddings", "layers.0.attn", "layers.1.ffn.w?"]
    done = tune(home, name, **{"fine_tuning.freeze": frozen, **OPTIMIZERS[optimizer], **changes})
    assert done.code == 0, done.stderr
    before, after = tensors(home[0] / "base"), tensors(home[0] / name)
    weights = {key for key in after if not key.startswith("optimizer.")}
    same = {key for key in weights if after[key].equal(before[key])}
    assert same == {key for key in weights if key.startswith(("token_embeddings", "layers.0.attn", "layers.1.ffn"))}
    moving = sum(after[key].numel() for key in weights - same)
    each = {"adamw": 2, "sgd": 1, "muon": None}[optimizer]
    states = sum(one.numel() for key, one in after.items() if key.startswith("optimizer.") and one.ndim)
    assert states == each * moving if each else moving <= states < 2 * moving
    (started,) = [record for record in read_records(home[0] / name) if record.get("event") == "started"]
    assert started["trained_parameters"] == moving < started["parameters"]
    assert f"trains {moving:,} of them; all others are frozen" in done.stderr


def test_the_norm_that_is_clipped_is_that_of_trained_weights(home):
    """With everything but one vector frozen, the logged norm is that vector's alone, a part of the whole one."""
    once = {"training.max_steps": 1, "schedule.warmup_steps": 0}
    tune(home, "one", **{"fine_tuning.freeze": ["token_embeddings", "layers", "lm_head"], **once})
    tune(home, "all", **once)
    (one,), (whole,) = step_lines(home[0] / "one"), step_lines(home[0] / "all")
    assert one["metrics.loss"] == whole["metrics.loss"]
    assert 0 < one["metrics.grad_l2_norm"] < 0.9 * whole["metrics.grad_l2_norm"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["freeze", "lora"])
def test_a_run_resumes_exactly(kind, optimizer, home):
    """A run that goes on from a checkpoint has lines and tensors of one that was not interrupted."""
    fine_tuning = {
        "freeze": {"fine_tuning.freeze": ["layers.0"]},
        "lora": {"fine_tuning.lora": {**LORA, "dropout": 0.2, "train": ["lm_head"]}},
    }[kind]
    changes = {**fine_tuning, **OPTIMIZERS[optimizer], "schedule.name": "constant"}
    whole, half = f"whole-{kind}-{optimizer}", f"half-{kind}-{optimizer}"
    assert tune(home, whole, **changes).code == 0
    assert tune(home, half, "--training.max_steps=7", **changes).code == 0
    done = tune(home, half, **changes)
    assert "resumed at step 7" in done.stderr
    ours, theirs = (
        [{key: value for key, value in line.items() if "val" not in key} for line in step_lines(home[0] / name)]
        for name in (half, whole)
    )
    assert ours == theirs
    found, expected = tensors(home[0] / half), tensors(home[0] / whole)
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fine_tuning.freeze": ["token_embedding"]},
            "'token_embedding' is no weight of this model; near it: token_emb",
        ),
        ({"fine_tuning.freeze": ["*"]}, "fine_tuning.freeze: * freezes all 21 weights of the model"),
        ({"fine_tuning.lora": {**LORA, "targets": ["attention"]}}, "'attention' is no linear layer of the blocks"),
        ({"fine_tuning.lora": {**LORA, "train": ["head"]}}, "fine_tuning.lora.train: 'head' is no weight"),
    ],
)
def test_names_that_mean_nothing_are_refused(changes, message, home, tmp_path):
    """One line with the key and near names, exit code 2, before anything is written; of transformerlm-plan, too."""
    folder, files = home
    done = train(files, tmp_path, "bad", **{"checkpoint.init_from": str(folder / "base"), **changes})
    assert (done.code, message in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "bad" / "checkpoints").exists()
    planned = call("plan", "--config", tmp_path / "bad.toml", "--calibration_steps=0")
    assert (planned.code, message in planned.stderr) == (2, True), planned.stderr


def test_settings_that_contradict_each_other_are_refused(home):
    """LoRA needs trained weights, and freezes by itself."""
    arguments = ("--config", home[0] / "base.toml", "--fine_tuning.lora.rank=4")
    done = call("train", *arguments)
    assert done.code == 2
    assert "fine_tuning.lora needs trained weights: expected a run in checkpoint.init_from, found none" in done.stderr
    done = call("train", *arguments, f"--checkpoint.init_from={home[0] / 'base'}", "--fine_tuning.freeze=lm_head")
    assert done.code == 2
    assert "fine_tuning: freeze is not for LoRA" in done.stderr


def test_a_lora_run_with_more_tokens_is_a_plain_model(lora_run, tmp_path):
    """The matrices are in the weights, so the checkpoint's settings have no LoRA, and it can be read."""
    added = add_tokens(lora_run, tmp_path / "more", ["<|im_start|>"])
    assert load_config_of(added.path).fine_tuning.lora is None
    before, after = load_model(resolve(lora_run)), load_model(added.path)
    name = "layers.0.attn.q_proj.weight"
    assert torch.equal(after.get_parameter(name), before.get_parameter(name))


def test_a_run_does_not_change_what_it_trains(home, lora_run):
    """A resumed run with other patterns or another rank is refused; each key is named. Dropout may change."""
    before = {"checkpoint.init_from": str(home[0] / "base"), "training.max_steps": 13}
    done = train(home[1], home[0], "lora", **before, **{"fine_tuning.lora": {**LORA, "rank": 8}})
    assert done.code == 2
    assert "fine_tuning.lora.rank was 4, now 8" in done.stderr
    done = train(home[1], home[0], "base", "--fine_tuning.freeze=lm_head", "--training.max_steps=13")
    assert done.code == 2
    assert "fine_tuning.freeze was [], now ['lm_head']" in done.stderr


# --- LoRA --------------------------------------------------------------------------------------------------------


def test_lora_begins_as_the_base_and_changes_its_matrices_alone(home, lora_run):
    """The first loss is the base's next one; base weights stay bit for bit, and only A and B have states."""
    before, after = tensors(home[0] / "base"), tensors(lora_run)
    weights = {key for key in after if not key.startswith("optimizer.")}
    base = {key for key in weights if not is_lora(key)}
    assert len(weights - base) == 2 * 2 * 7
    assert all(after[key].equal(before[key]) for key in base)
    assert all(after[key].any() for key in weights - base)
    states = sum(one.numel() for key, one in after.items() if key.startswith("optimizer.") and one.ndim)
    assert states == 2 * sum(after[key].numel() for key in weights - base)
    losses = [line["metrics.val_loss"] for line in step_lines(lora_run) if "metrics.val_loss" in line]
    known = [line["metrics.val_loss"] for line in step_lines(home[0] / "base") if "metrics.val_loss" in line][-1]
    assert losses[-1] < losses[0] < known


def test_what_is_loaded_is_the_merged_model(home, lora_run):
    """A checkpoint of a run with LoRA is a plain model, whose logits are those of the layers as they are trained."""
    directory = resolve(lora_run)
    layered = build_model(load_config_of(directory), device=CPU)
    load_weights(weights_of(layered), directory)
    plain, base = load_model(directory), load_model(resolve(home[0] / "base"))
    assert plain.state_dict().keys() == base.state_dict().keys()
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad():
        expected = layered.eval()(ids)
        torch.testing.assert_close(plain(ids), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(base(ids), expected, atol=0.05)


def test_samples_are_those_of_the_merged_model(lora_run):
    """What the run shows while it trains is what transformerlm-infer writes of its checkpoint."""
    (sample,) = [one for one in read_records(lora_run) if one.get("event") == "sample" and one["step"] == 12]
    sampling = ("--sampling.temperature=0", "--sampling.max_new_tokens=8", "--device=cpu")
    (record,) = call("infer", "--checkpoint", lora_run, "--prompt", "Ada", *sampling).records
    assert record["text.output"] == sample["text.output"]


@pytest.fixture(scope="module")
def twin(home, lora_run):
    """Return a run that holds the merged weights as a plain model: exported, and imported again."""
    out = home[0] / "exported"
    assert call("export", "--checkpoint", lora_run, "--output", out, "--verify=false").code == 0
    assert call("import_", "--source", out, "--output", home[0] / "twin", "--verify=false").code == 0
    return home[0] / "twin"


@pytest.mark.parametrize("form", ["hf", "gguf", "html"])
def test_every_export_holds_the_merged_model(form, home, lora_run, twin, tmp_path):
    """The files are those of the plain model with the same weights, and pass their own check."""
    names = {"hf": "model.safetensors", "gguf": "", "html": ""}
    suffix = {"hf": "", "gguf": ".gguf", "html": ".html"}[form]
    found = []
    for name, run in (("ours", lora_run), ("twin", twin)):
        output = tmp_path / name / f"model{suffix}"
        output.parent.mkdir()
        done = call("export", "--checkpoint", run, "--output", output, f"--format={form}")
        assert done.code == 0, done.stderr
        assert "verified" in done.stderr
        data = (output / names[form] if names[form] else output).read_bytes()
        found.append(data[-200_000:] if form == "gguf" else data)
    if form == "html":  # besides the weights it holds facts of the run
        assert abs(len(found[0]) - len(found[1])) < 2_000
        return
    assert found[0] == found[1]


def test_other_commands_read_the_merged_model(home, lora_run, twin):
    """eval and infer give the numbers and texts of the plain model with the same weights."""
    outputs = []
    for run in (lora_run, twin):
        evaluated = call("eval", "--checkpoint", run, "--input", home[1].valid, "--device=cpu", "--resamples=0")
        sampled = call("infer", "--checkpoint", run, "--prompt", "Ada", "--device=cpu", "--sampling.max_new_tokens=8")
        assert (evaluated.code, sampled.code) == (0, 0), evaluated.stderr + sampled.stderr
        outputs.append((evaluated.records[0]["metrics.loss"], sampled.records[0]["text.output"]))
    assert outputs[0] == outputs[1]
    logged = [line["metrics.val_loss"] for line in step_lines(lora_run) if "metrics.val_loss" in line][-1]
    arguments = ("--checkpoint", lora_run, "--input", home[1].valid, "--mode=sliding", "--stride=16", "--device=cpu")
    (record,) = call("eval", *arguments, "--resamples=0").records
    assert record["metrics.loss"] == pytest.approx(logged, rel=0.03)


def test_a_server_answers_with_the_merged_model(lora_run, twin):
    """To the same prompts transformerlm-serve gives the answers of the plain model."""
    sampling = ("--sampling.max_new_tokens=8", "--sampling.temperature=0")
    inferred = call("infer", "--checkpoint", twin, "--prompt", "Ada", "Bob", *sampling)
    with serving(lora_run) as (_, url):
        answer = completed(url, prompt=["Ada", "Bob"], max_tokens=8, temperature=0)
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [record["text.output"] for record in inferred.records]


def test_another_run_begins_with_the_merged_weights(home, lora_run):
    """`init_from` a run with LoRA: all weights at once, or LoRA once more on top of it."""
    plain = load_model(resolve(lora_run)).state_dict()
    still = {"checkpoint.init_from": str(lora_run), "optimizer.learning_rate": 1e-30}
    assert train(home[1], home[0], "after", **still).code == 0
    begun = tensors(home[0] / "after")
    assert all(begun[name].equal(one) for name, one in plain.items())
    again = {**still, "fine_tuning.lora": {**LORA, "targets": ["layers.1"]}}
    assert train(home[1], home[0], "again", **again).code == 0
    begun = tensors(home[0] / "again")
    assert all(begun[name].equal(one) for name, one in plain.items())
    assert all(one.abs().max() < 1e-20 for name, one in begun.items() if name.endswith("lora_b"))


def test_a_checkpoint_with_other_matrices_is_refused(lora_run, tmp_path):
    """The rank in config.toml must be that of the tensors: the error names the tensor and both shapes."""
    copied = tmp_path / "step-00000012"
    shutil.copytree(resolve(lora_run), copied)
    settings = (copied / "config.toml").read_text()
    assert "rank = 4\n" in settings
    (copied / "config.toml").write_text(settings.replace("rank = 4\n", "rank = 5\n"))
    with pytest.raises(CheckpointError, match=r"lora_a: expected shape \(5, 32\), found \(4, 32\)"):
        load_model(copied, is_verified=True)
    (copied / "config.toml").write_text(settings.replace("layers.*", "layers.0"))
    with pytest.raises(CheckpointError, match=r"weights do not fit the model of config.toml: layers.1.attn"):
        load_model(copied, is_verified=True)


def test_a_plan_counts_what_is_trained(lora_run):
    """Parameters, memory and FLOPs are those of the run; nothing is said of tokens per parameter."""
    done = call("plan", "--config", lora_run / "config.toml", "--calibration_steps=2")
    assert done.code == 0, done.stderr
    (plan,) = done.records
    (started,) = [one for one in read_records(lora_run) if one.get("event") == "started"]
    assert plan["parameters.trained"] == started["trained_parameters"]
    assert plan["memory.total_bytes"] == started["memory_estimate_bytes"]
    assert plan["flops.per_token"] == started["flops_per_token"]
    assert plan["memory.gradients_bytes"] == 4 * plan["parameters.trained"]
    saved = sum(path.stat().st_size for path in resolve(lora_run).glob("*.safetensors"))
    assert saved == pytest.approx(plan["checkpoint.bytes"], rel=0.05)
    assert "in LoRA's matrices, beside those" in done.stderr
    assert "per parameter" not in done.stderr


def test_a_run_with_lora_verifies(lora_run, monkeypatch):
    """transformerlm-runs verify makes its last steps once more, with the same bits."""
    replay_here(monkeypatch)
    done = call("runs_verify", lora_run)
    assert done.code == 0, done.stderr
    assert done.records[0]["verdict"] == "verified"
