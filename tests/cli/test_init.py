"""`transformerlm-init`: what it writes runs unchanged."""

from __future__ import annotations

import os
import re

import pytest

from cli.init import STEPS
from config.commands import COMMANDS
from config.io import SHIPPED, load_config
from tests.cli.commands import ROOT, call
from tests.test_readme import commands_of, our_part

SHORT = {
    # what makes a line of the project's README take a second
    "plan": ["--calibration_steps=0"],
    "train": [
        "--training.max_steps=2",
        "--training.eval_tokens=256",
        "--training.device=cpu",
        "--model.d_model=32",
        "--model.num_layers=1",
        "--model.num_heads=1",
        "--samples.sampling.max_new_tokens=4",
    ],
    "infer": ["--sampling.max_new_tokens=4", "--device=cpu"],
    "eval": ["--resamples=10", "--device=cpu"],
    "export": ["--verify=false"],
}


def test_the_commands_of_the_projects_readme_run_in_their_order(tmp_path, monkeypatch):
    """They run word by word in the project's folder, from text to a model for other tools; only training is cut."""
    monkeypatch.chdir(tmp_path)
    done = call("init", "my model", "--text", ROOT / "docs/*.md")
    assert (done.code, done.stdout) == (0, ""), done.stderr
    assert re.search(
        r"\n\ncd 'my model'\n(.*/|uv run )?transformerlm-train-tokenizer --config train_tokenizer.toml\n$", done.stderr
    )
    monkeypatch.chdir(tmp_path / "my model")
    lines = [part for part in map(our_part, commands_of(tmp_path / "my model/README.md")) if part]
    verbs = [module.partition(".")[2] for module, _ in lines]
    assert verbs == ["train_tokenizer", "make_data", "plan", "train", "infer", "eval", "export"]
    for verb, (_, arguments) in zip(verbs, lines, strict=True):
        done = call(verb, *arguments, *SHORT.get(verb, []))
        assert done.code == 0, (verb, done.stderr)
    assert (tmp_path / "my model/exports/first/model.safetensors").is_file()
    assert (tmp_path / "my model/README.md").read_text().startswith("# my model\n")
    assert (tmp_path / "my model/.gitignore").read_text() == "/data/\n/runs/\n/exports/\n"


def test_the_files_are_the_shipped_ones_with_their_paths_right(tmp_path):
    """The settings are the same, comments name the files of the project, and the schema for editors is there."""
    assert call("init", tmp_path / "a").code == 0
    schemas = {schema.__module__.rpartition(".")[2]: schema for schema in COMMANDS.values()}
    for step in STEPS:
        path = tmp_path / "a" / f"{step}.toml"
        first, *lines = path.read_text().splitlines()
        assert first == f"#:schema .schemas/{step}.schema.json"
        schema = tmp_path / "a" / first.removeprefix("#:schema ")
        assert schema.read_text() == (SHIPPED / f"{step}.schema.json").read_text()
        assert load_config(schemas[step], path) == load_config(schemas[step], SHIPPED / f"{step}.toml")
        assert "config/resources" not in "\n".join(lines)
        assert f"--config {step}.toml" in "\n".join(lines)
    assert (tmp_path / "a/data").is_dir()


def test_without_a_text_the_project_says_where_it_goes(tmp_path, monkeypatch):
    """The next lines can be pasted, and the one that is not a command is a comment."""
    monkeypatch.chdir(tmp_path)
    *lines, last = call("init", "--dir=a").stderr.splitlines()
    assert lines == [
        "a: a project; its README.md has the commands in order. Next:",
        "",
        "cd a",
        "# first put your text into data/corpus.txt; README.md says how to get some",
    ]
    assert last.endswith("transformerlm-train-tokenizer --config train_tokenizer.toml")


@pytest.mark.parametrize("taken", ["README.md", "train.toml", "data/corpus.txt"])
def test_nothing_is_overwritten(taken, tmp_path):
    """An existing file of the project is named, and nothing is written."""
    home = tmp_path / "a"
    (home / "data").mkdir(parents=True)
    (home / taken).write_text("mine")
    done = call("init", home, "--text", ROOT / "README.md")
    assert (done.code, done.stderr) == (2, f"error: {home}: holds {taken} already; choose another directory\n")
    assert [path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()] == [taken]
    assert (home / taken).read_text() == "mine"


def test_a_text_that_is_none_leaves_nothing_behind(tmp_path):
    """A missing or empty file is refused before the folder is made; so is a file in the project's place."""
    (tmp_path / "blank.txt").write_text("\n\n")
    for text in ("nowhere.txt", "blank.txt"):
        done = call("init", tmp_path / "a", "--text", tmp_path / text)
        assert (done.code, len(done.stderr.splitlines())) == (2, 1)
        assert text in done.stderr
        assert not (tmp_path / "a").exists()
    os.mkfifo(tmp_path / "pipe")
    done = call("init", tmp_path / "a", "--text", tmp_path / "pipe")
    assert (done.code, f"found the pipe {tmp_path / 'pipe'} (save it first)" in done.stderr) == (2, True)
    (tmp_path / "cut.jsonl").write_text('{"text": "one"}\n{"tex')
    done = call("init", tmp_path / "a", "--text", tmp_path / "cut.jsonl")
    assert (done.code, "cut.jsonl:2" in done.stderr) == (2, True)
    assert [path for path in (tmp_path / "a").rglob("*") if path.is_file()] == []  # the same command may come again
    done = call("init", tmp_path / "blank.txt")
    assert done.code == 2
    assert "expected a directory for the project, found a file" in done.stderr
