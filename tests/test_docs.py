"""The blocks of the pages run as somebody pastes them, from top to bottom; a block that cannot run here says why.

`<!-- not run: WHY -->` in the line above a block, which a reader does not see, is how it says so. The options of such a
block's commands are checked all the same, unless WHY names a test that runs the block. docs/recipes.md, whose commands
need days, is run in small by test_recipes.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest

from config.io import dump_toml
from tests.cli.commands import call
from tests.pages import blocks
from tests.test_architecture import PACKAGES
from tests.test_readme import PAGES, ROOT
from tests.training.tiny_run import tiny_config, write_tiny_files

OURS = re.compile(r"^ *(?:[A-Z_]+=\S+ )*(?:uv |pip |python3? -m |transformerlm-)", flags=re.M)
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
SHELL_PAGES = [page for page in (*PAGES, ROOT / "CONTRIBUTING.md") if page.name != "recipes.md"]
NOT_OURS = (
    "cd",
    "export",
    "git",
    "jq",
    "nsys",
    "pip",
    "python3",
    "ray",
    "source",
    "tensorboard",
    "torchrun",
    "uv",
    "wandb",
)
SMALL = """--model.d_model=32 --model.num_layers=1 --model.num_heads=2 --model.d_ff=64 --model.context_length=128
    --training.max_steps=3 --training.batch_size=8 --training.log_interval=1 --training.eval_tokens=256
    --samples.sampling.max_new_tokens=4 --training.device=cpu"""
SHORT = {
    "transformerlm-train-tokenizer": "--overwrite",  # usage.md begins where README's commands by hand do
    "transformerlm-make-data": "--overwrite",
    "transformerlm-train": SMALL,
    "transformerlm-plan": f"{SMALL} --calibration_steps=1",
    "transformerlm-infer": "--sampling.max_new_tokens=4",
    "transformerlm-quickstart": "--time=5s",
}


def name_of(page: Path) -> str:
    """Return a page's name in messages of pytest."""
    return str(page.relative_to(ROOT))


def pages_with(language: str) -> list[Path]:
    """Return the pages that have a block of a language."""
    return [page for page in SHELL_PAGES if any(block.language == language for block in blocks(page))]


@pytest.mark.parametrize("page", SHELL_PAGES, ids=name_of)
def test_a_block_of_commands_says_its_language(page):
    """Commands are in blocks of bash, where the tests look for them; a transcript is text."""
    for block in blocks(page):
        if OURS.search(block.text):
            assert block.language in ("bash", "text"), block.text


def python_of(page: Path) -> str:
    """Return the page's Python that runs here, as one program."""
    return "\n".join(block.text for block in blocks(page) if block.language == "python" and not block.why)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a folder with the files that README's commands by hand make, in small, and the texts that pages name."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").mkdir()
    files = write_tiny_files(folder / "data")
    shutil.copy(files.text, folder / "corpus.txt")
    shutil.copy(ROOT / "README.md", folder)
    changes = {"logging.run_name": "first", "training.max_steps": 3, "model.context_length": 128}
    config = tiny_config(files, folder / "runs", changes)
    (folder / "train.toml").write_text(dump_toml(config))
    assert call("train", "--config", folder / "train.toml").code == 0
    return folder


@pytest.mark.parametrize("page", [page for page in pages_with("python") if page.name != "interop.md"], ids=name_of)
def test_the_python_of_a_page_runs(page, trained, tmp_path, monkeypatch):
    """From top to bottom, beside the files that README's commands make; interop's needs its export, made below."""
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "here", symlinks=True))
    Path("page.py").write_text(python_of(page), encoding="utf-8")
    runpy.run_path("page.py")


def test_the_file_with_mistakes_is_answered_as_the_page_says(tmp_path, monkeypatch):
    """docs/configuration.md shows a file, the command's answer to it, and its answer to a number of heads."""
    from cli.train import main

    shutil.copy(ROOT / "config/resources/train.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    shown = blocks(ROOT / "docs/configuration.md")
    (place,) = [index for index, block in enumerate(shown) if block.language == "toml"]
    (tmp_path / "typo.toml").write_text(shown[place].text)
    for arguments, block in zip(("typo.toml", "train.toml --model.num_heads=3"), shown[place + 1 :], strict=False):
        with redirect_stderr(StringIO()) as stderr, pytest.raises(SystemExit):
            main(["--config", *arguments.split()])
        assert stderr.getvalue() == block.text


BY_HAND = next(
    block
    for block in blocks(ROOT / "README.md")
    if block.language == "bash" and "transformerlm-make-data" in block.text
)

# --- the shell ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Return a fresh clone in which README's commands by hand have been run, in small."""
    folder = tmp_path_factory.mktemp("clone")
    for name in (*PACKAGES, "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", folder)
    run(BY_HAND.text, folder)
    shutil.copy(folder / "data/corpus.txt", folder)  # as pages call their text
    return folder


def run(script: str, folder: Path, *, dry: bool = False) -> None:
    """Run lines of a page in bash; our commands in small, or, dry, ours alone and only up to their configuration."""
    ends = {name: "--print-config >> /dev/null" if dry else SHORT.get(name, "") for name in SCRIPTS}
    lines = [f'{name}() {{ command {name} "$@" {" ".join(end.split())}; }}' for name, end in ends.items()]
    if dry:
        bench = 'command python "$@" --print-config >> /dev/null'
        lines.append(f'python() {{ case "$2" in benchmarking.bench_*) {bench};; esac; }}')
        lines += [f"{name}() {{ :; }}" for name in NOT_OURS]
        lines.append("command_not_found_handle() { :; }")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", "\n".join([*lines, script])],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{script}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("bash"), ids=name_of)
def test_the_commands_of_a_page_run(page, clone, tmp_path):
    """Each page's blocks run from top to bottom after README's commands by hand, then its Python."""
    folder = shutil.copytree(clone, tmp_path / "clone", symlinks=True)
    for block in blocks(page):
        if block.has_own_test:
            continue
        if block.language == "bash" and block.text != BY_HAND.text and re.search("transformerlm-|python", block.text):
            run(re.sub(r"<[a-z ]+>", "PLACE", block.text) if block.why else block.text, folder, dry=bool(block.why))
    if program := python_of(page):
        run(f"python - <<'END'\n{program}\nEND", folder)
