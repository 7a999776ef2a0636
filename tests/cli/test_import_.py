"""`transformerlm-import`: another tool's model generates text and continues training here."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from config.io import dump_toml
from tests.cli.commands import call
from tests.training.tiny_run import read_records, tiny_config, write_tiny_files
from transformerlm.checkpoints.directory import resolve


@pytest.fixture(scope="module")
def exported(pipeline, tmp_path_factory):
    """Return the pipeline's model as a Hugging Face directory."""
    out = tmp_path_factory.mktemp("exported") / "model"
    assert call("export", "--checkpoint", pipeline.run, "--output", out, "--verify=false").code == 0
    return out


@pytest.fixture(scope="module")
def imported(exported, tmp_path_factory):
    """Return that directory imported again, with what the command said."""
    out = tmp_path_factory.mktemp("imported") / "run"
    done = call("import_", "--source", exported, "--output", out)
    return out, done


def test_a_model_is_imported_and_verified(imported):
    """One line on stderr says what was compared."""
    out, done = imported
    assert (done.code, done.stdout) == (0, "")
    assert f"{out}: written; verified with transformers: logits differ by" in done.stderr
    assert "verified with tokenizers: the ids of" in done.stderr


def test_an_imported_model_generates_what_the_first_one_does(imported, pipeline):
    """The same prompt and seed give the same text."""
    arguments = ["--prompt", "Ada", "--sampling.max_new_tokens=8", "--device=cpu"]
    first, again = (call("infer", "--checkpoint", path, *arguments) for path in (pipeline.run, imported[0]))
    assert first.records[0]["text.output"] == again.records[0]["text.output"]


def test_what_is_made_of_an_imported_model_says_so(imported, tmp_path):
    """Nobody here trained it, and of its configuration the model alone says anything."""
    assert call("export", "--checkpoint", imported[0], "--output", tmp_path / "again", "--verify=false").code == 0
    assert "architecture, exported with transformerlm" in (tmp_path / "again/README.md").read_text()
    done = call(
        "add_tokens", "--source", imported[0], "--output", tmp_path / "more", "--special_tokens", "<|im_start|>"
    )
    assert done.code == 0, done.stderr
    assert "--training.max_steps=1000 --training.batch_size=8 --optimizer.learning_rate=1e-4" in done.stderr
    (path,) = (tmp_path / "more/checkpoints").glob("step-*/config.toml")
    assert "only [model] says anything" in path.read_text().splitlines()[0]


def train(pipeline, home, **changes):
    """Train a tiny run with dotted keys changed, and return how it ended."""
    config = home / "train.toml"
    config.write_text(dump_toml(tiny_config(pipeline.files, home, {"training.max_steps": 4, **changes})))
    return call("train", "--config", config)


def test_training_goes_on_from_an_imported_model(imported, pipeline, tmp_path):
    """A new run begins with its weights, at step 1 with a fresh optimizer; its first loss shows what it knows."""
    done = train(pipeline, tmp_path, **{"checkpoint.init_from": str(imported[0])})
    assert done.code == 0
    assert f"begins with the weights of {imported[0]}" in done.stderr
    (tmp_path / "other").mkdir()
    train(pipeline, tmp_path / "other")
    with_weights, without = (
        next(record["metrics.loss"] for record in read_records(home / "run") if "metrics.loss" in record)
        for home in (tmp_path, tmp_path / "other")
    )
    assert with_weights < without - 0.5
    assert json.loads((resolve(tmp_path / "run") / "state.json").read_text())["step"] == 4


def test_a_rate_of_nearly_zero_leaves_the_weights_that_it_began_with(imported, pipeline, tmp_path):
    """A run begins with the weights of the checkpoint, all of them."""
    changes = {"optimizer.learning_rate": 1e-30, "checkpoint.init_from": str(imported[0])}
    assert train(pipeline, tmp_path, **changes).code == 0
    first, last = (load_file(resolve(run) / "model.safetensors") for run in (imported[0], tmp_path / "run"))
    assert first.keys() == last.keys()
    assert all(first[name].equal(last[name]) for name in first)


def test_a_run_that_has_a_checkpoint_goes_on_from_its_own(imported, pipeline, tmp_path):
    """`init_from` is for the first start; the same command resumes."""
    changes = {"checkpoint.init_from": str(imported[0])}
    train(pipeline, tmp_path, **changes)
    done = train(pipeline, tmp_path, **changes, **{"training.max_steps": 6})
    assert "resumed at step 4" in done.stderr
    assert "begins with" not in done.stderr


def test_another_context_length_is_no_other_architecture(imported, pipeline, tmp_path):
    """The weights do not depend on it."""
    changes = {"checkpoint.init_from": str(imported[0]), "model.context_length": 8}
    assert train(pipeline, tmp_path, **changes).code == 0


def test_a_longer_context_may_scale_the_rotary_embedding(imported, pipeline, tmp_path):
    """As Llama 3.1 does; without a longer context it would only be another function of the same weights."""
    changes = {"checkpoint.init_from": str(imported[0]), "model.rope_scaling": {"factor": 2.0}}
    assert train(pipeline, tmp_path, **changes, **{"model.context_length": 64}).code == 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.num_layers", 3, "of another architecture (model.num_layers is 2 there, 3 here)"),
        ("model.rope_theta", 5e5, "of another architecture (model.rope_theta is 10000.0 there, 500000.0 here)"),
        (
            "model.rope_scaling",
            {"factor": 2.0},
            "architecture (model.rope_scaling is None there, {'factor': 2.0, 'low_",
        ),
        ("checkpoint.init_from", "nowhere", "nowhere: no such checkpoint or run directory"),
    ],
)
def test_weights_that_do_not_fit_are_refused(key, value, message, imported, pipeline, tmp_path):
    """Each setting that differs is named with both values; nothing is trained."""
    done = train(pipeline, tmp_path, **{"checkpoint.init_from": str(imported[0]), key: value})
    assert done.code == 2
    assert message in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_weights_of_another_tokenizer_are_refused(imported, pipeline, tmp_path):
    """Its ids mean other tokens; the line names the tokenizer to use."""
    other = write_tiny_files(tmp_path, seed=1)
    config = tmp_path / "train.toml"
    config.write_text(dump_toml(tiny_config(other, tmp_path, {"checkpoint.init_from": str(imported[0])})))
    done = call("train", "--config", config)
    assert done.code == 2
    assert "was trained with the tokenizer" in done.stderr
    assert "set data.tokenizer to" in done.stderr


def test_an_imported_run_is_not_resumed(imported, pipeline):
    """It has no optimizer state to continue with, and the line names the right key."""
    done = train(pipeline, imported[0].parent)
    assert done.code == 2
    assert "an imported model: choose another logging.run_name, and name it in checkpoint.init_from" in done.stderr


def test_without_its_tokenizer_there_is_a_warning(exported, tmp_path):
    """Only the model is imported, and the command says what that cannot do."""
    done = call("import_", "--source", exported, "--output", tmp_path / "run", "--tokenizer=false", "--verify=false")
    assert done.code == 0
    assert "warning: imported without its tokenizer" in done.stderr
    assert not (resolve(tmp_path / "run") / "tokenizer").exists()


def test_a_tokenizer_is_imported_alone(exported, pipeline, tmp_path):
    """From a tokenizer.json comes a directory that other commands open."""
    arguments = ["--source", exported / "tokenizer.json", "--format", "tokenizer_json", "--output", tmp_path / "out"]
    assert call("import_", *arguments).code == 0
    again = ["--input", pipeline.files.text, "--tokenizer", tmp_path / "out", "--train", tmp_path / "train.npy"]
    assert call("make_data", *again).code == 0
    assert (tmp_path / "train.npy").read_bytes()


def test_a_run_of_ours_needs_no_import(pipeline, tmp_path):
    """A name that is not on this machine is an error that says so."""
    done = call("import_", "--source", pipeline.run, "--output", tmp_path / "out")
    assert done.code == 2
    assert "found a run of transformerlm, which needs no import" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "nowhere"], "nowhere: expected the directory of a model, found none"),
        (["--source", ".", "--format", "gpt2"], "vocab.json: expected GPT-2's vocab.json and merges.txt"),
        (["--source", "nowhere", "--format", "tiktoken", "--pattern=gpt2"], "nowhere: No such file or directory"),
        (
            ["--source", "nowhere", "--format", "tiktoken"],
            "pattern: expected gpt2, cl100k, llama3, qwen2, smollm, found none: a file of ranks",
        ),
        (["--source", ".", "--pattern=gpt2"], 'pattern does nothing with format = "hf"'),
        (["--source", ".", "--special_tokens", "<|x|>"], 'special_tokens does nothing with format = "hf"'),
        (
            ["--source", ".", "--format=gpt2", "--tokenizer=false"],
            'tokenizer = false does nothing with format = "gpt2"',
        ),
        (["--source", "."], ".: expected config.json and model.safetensors in it, found none"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch):
    """The command exits with 2, says why, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    done = call("import_", "--output", "out", *arguments)
    assert (done.code, len(done.stderr.splitlines())) == (2, 1)
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []
