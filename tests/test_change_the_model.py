"""docs/change-the-model.md is followed word by word, in a copy: its changes apply, its tests pass, its model trains."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from config.io import dump_toml
from tests.training.tiny_run import read_records, tiny_config, write_tiny_files

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/change-the-model.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"^```diff\n--- (\S+)\n\+\+\+ (\S+)\n@@\n(.*?)^```", PAGE, flags=re.M | re.S)


def apply(diff: str, file: Path) -> None:
    """Make one change of the page, whose old lines the file must hold once."""
    lines = diff.splitlines(keepends=True)
    old, new = ("".join(line[1:] or "\n" for line in lines if line[:1] in (" ", "\n", sign)) for sign in "-+")
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file.name}: expected once, as the page says:\n{old}"
    file.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> Path:
    """Return a copy of this project with the page's changes, and what the page says to write anew."""
    copy = tmp_path_factory.mktemp("changed")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("config", "transformerlm", "databuilder", "cli", "logger", "profiling", "benchmarking", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    (copy / "docs").mkdir()
    for name in ("pyproject.toml", "docs/configuration.md"):
        shutil.copy(ROOT / name, copy / name)
    for file, same_file, diff in DIFFS:
        assert file == same_file
        apply(diff, copy / file)
    return copy


def run(folder: Path, *arguments: str) -> str:
    """Run a Python program in the copy, whose packages it finds first."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_three_files_are_changed():
    """The layer, the schema and a test of the layer."""
    assert [file for file, _, _ in DIFFS] == [
        "transformerlm/models/layers.py",
        "config/schemas.py",
        "tests/models/test_layers.py",
    ]


@pytest.mark.slow
def test_the_tests_that_the_page_names_pass(changed):
    """The layer is its formula, the decoder gives what the model gives, exports refuse it; no schema is old."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S)
    script = next(block for block in blocks if "--print-schema" in block)
    script = script.replace("transformerlm-$name", "python -m cli.$name").replace("python", sys.executable)
    environment = os.environ | {"PYTHONPATH": str(changed)}
    subprocess.run(["bash", "-euc", script], cwd=changed, env=environment, check=True)
    named = re.search(r"^pytest (.*)$", PAGE, flags=re.M)[1].split()
    chosen = "relu2 or formula or has_every_setting or reference"
    out = run(changed, "-m", "pytest", "-q", "-p", "no:cacheprovider", *named, "-k", chosen)
    assert "relu2" not in out.partition("passed")[0]  # nothing but dots
    assert int(re.search(r"(\d+) passed", out)[1]) > 6


def test_the_model_of_the_page_trains_and_generates(changed, tmp_path):
    """Its loss falls, and infer continues a text with it as the model itself does."""
    files = write_tiny_files(tmp_path)
    config = dump_toml(tiny_config(files, tmp_path, {"checkpoint.interval": 0}))
    (tmp_path / "train.toml").write_text(config)
    program = (
        "from contextlib import suppress; from cli.train import main; from transformerlm import Predictor\n"
        "from transformerlm.models.layers import ReLU2FFN\n"
        f"with suppress(SystemExit): main(['--config', {str(tmp_path / 'train.toml')!r}, '--model.ffn=relu2'])\n"
        f"loaded = Predictor.from_checkpoint({str(tmp_path / 'run')!r}, device='cpu')\n"
        "assert isinstance(loaded.model.layers[0].ffn, ReLU2FFN)\n"
        "same = Predictor(loaded.model, loaded.tokenizer)\n"
        "how = {'max_new_tokens': 30, 'temperature': 0.0, 'stop_at_eos': False}\n"
        "texts = [one.generate('Ada', **how) for one in (loaded, same)]\n"
        "assert texts[0] == texts[1], texts"
    )
    run(changed, "-c", program)
    losses = [line["metrics.loss"] for line in read_records(tmp_path / "run") if "metrics.loss" in line]
    assert losses[-1] < losses[0] - 0.5
