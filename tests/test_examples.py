"""The programs of docs/examples: the bare training loop is the trainer's, and the notebook runs from top to bottom."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from tests.training.test_trainer import train
from tests.training.tiny_run import VOCAB_SIZE, step_lines, tiny_config, write_tiny_files
from transformerlm.models.transformer import TransformerLM

EXAMPLES = Path(__file__).parents[1] / "docs/examples"
SIZES = {"context_length": 16, "d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a tiny run."""
    return write_tiny_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(autouse=True, scope="module")
def threads_as_they_are():
    """Let `wait_politely`, which these programs begin with, find that the environment has its say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        yield


@pytest.fixture(scope="module")
def minimal() -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("minimal_train", EXAMPLES / "minimal_train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_bare_loop_has_the_losses_of_the_product(minimal, files, tmp_path):
    """With the same settings, step by step: training loss, validation loss and bits per byte."""
    changes = {"optimizer.learning_rate": 3e-3, "schedule.min_learning_rate": 1e-4, "checkpoint.interval": 0}
    config = tiny_config(files, tmp_path, changes | {"training.eval_tokens": 256 * 16})
    train(config)
    schedule = {**minimal.SCHEDULE, "warmup_steps": 3, "max_steps": 12}
    found: dict[int, dict[str, float]] = {}
    named = {"train": files.train, "valid": files.valid, "tokenizer": files.tokenizer}
    predictor = minimal.train(
        named, sizes=SIZES, schedule=schedule, report=found.__setitem__, batch_size=8, seed=1, eval_interval=4
    )
    lines = step_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == list(found)
    for line in lines:
        expected = {name: line[f"metrics.{name}"] for name in found[line["step"]]}
        assert found[line["step"]] == pytest.approx(expected, rel=1e-5)
    assert [step for step, losses in found.items() if "val_loss" in losses] == [4, 8, 12]
    assert predictor.generate("Ada", max_new_tokens=4, seed=0).startswith("Ada")


def test_the_bare_loop_runs_as_a_program(minimal, files, tmp_path, monkeypatch, capsys):
    """It saves weights that a model takes, and shows a text; without its arguments it says what they are."""
    source = (EXAMPLES / "minimal_train.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 80
    monkeypatch.setattr("sys.argv", ["minimal_train.py"])
    with pytest.raises(SystemExit, match="A whole training run on one page"):
        exec(compile(source, "minimal_train.py", "exec"), {"__name__": "__main__", "__doc__": minimal.__doc__})
    short = source.replace('"max_steps": 1000', '"max_steps": 2').replace('"warmup_steps": 100', '"warmup_steps": 1')
    short = short.replace('{"context_length": 128, "d_model": 256, "num_layers": 4, "num_heads": 4}', repr(SIZES))
    weights = tmp_path / "model.safetensors"
    places = [files.train, files.valid, files.tokenizer, weights]
    monkeypatch.setattr("sys.argv", ["minimal_train.py", *map(str, places)])
    exec(compile(short, "minimal_train.py", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.startswith("1 {'loss': ")
    model = TransformerLM(vocab_size=VOCAB_SIZE, **SIZES)
    model.load_state_dict(load_file(weights))
    assert torch.isfinite(model(torch.zeros(1, 3, dtype=torch.int64))).all()


def cells_of_the_notebook():
    """Return the notebook's cells of code."""
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    """Each cell in its turn, in one namespace and an empty directory; it learns, and keeps what it has learned."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict[str, object] = {"__name__": "notebook"}
    for cell in cells_of_the_notebook():
        exec("".join(cell["source"]), names)
    assert len(names["losses"]) == 50
    assert names["losses"][-1] < names["losses"][0] - 1.5
    assert 2 < names["found"].bits_per_byte < 5
    assert {"model.safetensors", "tokenizer", "train.npy", "valid.npy"} <= {path.name for path in tmp_path.iterdir()}
    assert "bits per byte" in capsys.readouterr().out


def test_the_notebook_shows_a_real_run():
    """Its cells have the numbers and the picture of one, run once from the top; no error, and no path of a machine."""
    cells = cells_of_the_notebook()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result", "display_data"}
    text = json.dumps(outputs)
    assert "step 50  loss" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert len(text) < 100_000
    assert not [place for place in ("/home", "/tmp", "/root", "/Users") if place in text]
