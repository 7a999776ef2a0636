"""What was written by a released format keeps loading: one tiny run of each stays here (made by `make.py`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.commands import call
from tests.training.tiny_run import step_lines
from transformerlm.checkpoints.load import load_model, load_tokenizer
from transformerlm.checkpoints.validation import FORMAT, FORMAT_OF_SEVERAL_FILES, verify
from transformerlm.inference.generate import generate
from transformerlm.token_files.dataset import TokenDataset

HERE = Path(__file__).parent
CHECKPOINT = Path("runs/run/checkpoints/step-00000200")
FOLDERS = sorted(HERE.glob("format-*"))
each_format = pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])


def expected(folder):
    """Return what was found when the files were made."""
    return json.loads((folder / "expected.json").read_text(encoding="utf-8"))


def test_the_formats_of_today_are_kept_here():
    """Whoever changes a format adds a folder of it (`python -m tests.released.make`) and keeps the older ones."""
    for number in (FORMAT, FORMAT_OF_SEVERAL_FILES):
        assert HERE / f"format-{number}" in FOLDERS
        assert json.loads((HERE / f"format-{number}" / CHECKPOINT / "state.json").read_text())["format"] == number


@each_format
def test_model_and_tokenizer_load(folder):
    """The checkpoint verifies, and model and tokenizer give the ids that they gave when it was written."""
    wanted = expected(folder)
    assert verify(folder / CHECKPOINT)["step"] == 200
    ids = load_tokenizer(folder / CHECKPOINT).encode(wanted["prompt"])
    assert ids == wanted["prompt_ids"]
    new = generate(load_model(folder / CHECKPOINT), ids, max_new_tokens=len(wanted["ids"]), temperature=0.0)
    assert new == wanted["ids"]


@each_format
def test_the_token_file_loads(folder):
    """The token file is whole, and was made by the tokenizer in the checkpoint."""
    dataset = TokenDataset(folder / "data/train.npy")
    dataset.check()
    tokenizer = load_tokenizer(folder / CHECKPOINT)
    assert dataset.tokenizer_sha256 == tokenizer.fingerprint()
    assert tokenizer.decode(dataset.tokens[:16].tolist()).startswith("Ada sees")


@each_format
def test_infer_reads_the_run(folder):
    """The command gives the text that was expected of the run directory."""
    wanted = expected(folder)
    options = ("--sampling.temperature=0", f"--sampling.max_new_tokens={len(wanted['ids'])}", "--output.format=json")
    done = call("infer", "--checkpoint", folder / "runs/run", "--prompt", wanted["prompt"], *options)
    assert done.code == 0, done.stderr
    assert wanted["text"].endswith(done.records[-1]["text.output"])


@each_format
def test_the_run_resumes(folder, tmp_path, monkeypatch):
    """The run goes on from its checkpoint, with the losses of the run that was not interrupted, up to rounding."""
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    done = call("train", "--config", "train.toml", "--checkpoint.resume=required")
    assert done.code == 0, done.stderr
    found = {str(line["step"]): line["metrics.loss"] for line in step_lines(Path("runs/run"))}
    assert found == pytest.approx(expected(folder)["losses"], rel=1e-3)
