"""A model whose checkpoint is several files: every command that reads checkpoints reads it."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from config.io import dump_toml
from tests.cli.commands import call
from tests.training.tiny_run import step_lines, tiny_config, write_tiny_files
from transformerlm.checkpoints.directory import resolve

LARGE = {
    "model.d_model": 128,
    "model.d_ff": 512,
    "model.num_heads": 4,
    "training.max_steps": 2,
    "schedule.warmup_steps": 0,
    "checkpoint.interval": 1,
    "logging.backend": "json",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Train the same steps twice: with files of 1 MB, and in one file each."""
    folder = tmp_path_factory.mktemp("several")
    files = write_tiny_files(folder)
    for name, changes in (("run", {"checkpoint.max_file_mb": 1}), ("one", {})):
        config = tiny_config(files, folder, {**LARGE, **changes, "logging.run_name": name})
        (folder / f"{name}.toml").write_text(dump_toml(config))
        done = call("train", "--config", folder / f"{name}.toml")
        assert done.code == 0, done.stderr
    return folder


def test_large_parts_are_several_files(home):
    """No file is larger than the limit, the index names all, and the tensors are those of the single file."""
    several, one = resolve(home / "run"), resolve(home / "one")
    states = [json.loads((directory / "state.json").read_text()) for directory in (several, one)]
    assert [state["format"] for state in states] == [2, 1]
    for kind, count in (("model", 3), ("optimizer", 5)):
        parts = sorted(several.glob(f"{kind}-*.safetensors"))
        assert len(parts) >= count
        assert all(part.stat().st_size < 1.01e6 for part in parts)
        index = json.loads((several / f"{kind}.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {part.name for part in parts}
        tensors = {name: tensor for part in parts for name, tensor in load_file(part).items()}
        expected = load_file(one / f"{kind}.safetensors")
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
        assert tensors.keys() == expected.keys()
        assert all(tensors[name].equal(expected[name]) for name in tensors)


def outputs(run, files_home, out):
    """Return what the commands that read a checkpoint make of it."""
    infer = call("infer", "--checkpoint", run, "--prompt", "Ada", "--sampling.max_new_tokens=4", "--device=cpu")
    evaluate = call("eval", "--checkpoint", run, "--input", files_home / "valid.npy", "--device=cpu")
    gguf = call("export", "--checkpoint", run, "--format=gguf", "--output", out / "m.gguf", "--verify=false")
    hf = call("export", "--checkpoint", run, "--output", out / "hf", "--verify=false")
    again = call("import_", "--source", out / "hf", "--output", out / "again", "--verify=false")
    for done in (infer, evaluate, gguf, hf, again):
        assert done.code == 0, done.stderr
    texts = [record["text.output"] for record in infer.records]
    losses = [record["metrics.loss"] for record in evaluate.records]
    weights = [(out / "m.gguf").read_bytes()[-1_000_000:], (out / "hf/model.safetensors").read_bytes()]
    return texts, losses, weights, (resolve(out / "again") / "model.safetensors").read_bytes()


def test_commands_make_of_it_what_they_make_of_one_file(home, tmp_path):
    """infer, eval, export in both formats and import give the same as for a single file."""
    found = []
    for name in ("run", "one"):
        (tmp_path / name).mkdir()
        found.append(outputs(home / name, home, tmp_path / name))
    assert found[0] == found[1]
    assert found[0][0]
    assert found[0][1]


def test_a_run_goes_on_and_another_begins_with_its_weights(home):
    """A resumed run repeats what a run of single files does, and `init_from` reads several files."""
    losses = []
    for name in ("run", "one"):
        done = call("train", "--config", home / f"{name}.toml", "--training.max_steps=3")
        assert done.code == 0, done.stderr
        losses.append([line["metrics.loss"] for line in step_lines(home / name)])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    options = (f"--checkpoint.init_from={home / 'run'}", "--logging.run_name=new", "--optimizer.learning_rate=1e-30")
    assert call("train", "--config", home / "one.toml", *options).code == 0
    first = load_file(resolve(home / "one") / "model.safetensors")
    begun = load_file(resolve(home / "new") / "model.safetensors")
    assert all(begun[name].equal(first[name]) for name in first)
