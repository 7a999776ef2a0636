"""docs/speedrun.md: its commands give the files that it names, and the shipped recipes keep its rules."""

from __future__ import annotations

import json
import re

import pytest

from config.io import load_config
from config.shipped import shipped_files
from config.train import TrainConfig
from tests.cli.commands import call
from tests.test_readme import ROOT

PAGE = ROOT / "docs/speedrun.md"
RECIPES = {name: path for name, path in shipped_files().items() if name.startswith("recipes/speedrun/")}
ENTRIES = [name for name, path in RECIPES.items() if "[training]" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", ENTRIES)
def test_a_shipped_entry_keeps_the_rules(name):
    """The data is the speedrun's, all of it is validated, every checkpoint is kept, and no clock matters."""
    config = load_config(TrainConfig, RECIPES[name])
    assert [path.parent.as_posix() for path in (config.data.train, config.data.valid)] == ["data/speedrun"] * 2
    assert config.data.tokenizer.as_posix() == "data/speedrun/tokenizer"
    assert config.training.eval_tokens == 65536
    assert (config.training.max_time, config.checkpoint.init_from) == (None, None)
    assert config.checkpoint.interval > 0
    assert config.checkpoint.keep >= config.training.max_steps / config.checkpoint.interval
    assert name in PAGE.read_text(encoding="utf-8")
    assert config.model.vocab_size >= 1343


def test_the_page_names_one_goal():
    """The number in the rules is that of the command that finds the time."""
    page = PAGE.read_text(encoding="utf-8")
    (goal,) = re.findall(r"\*\*X is (0\.\d+) bits per byte\*\*", page)
    assert re.findall(r"--argjson x (\S+)", page) == [goal]


@pytest.mark.slow
def test_the_commands_give_the_files_that_the_page_names(tmp_path, monkeypatch):
    """Text, tokenizer and token files are the same on each machine, by their sha256 and their numbers of tokens."""
    from databuilder.stories import write_corpus

    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    path, size, seed = re.search(r"databuilder\.stories (\S+) --max-bytes (\d+) --seed (\d+)", page).groups()
    write_corpus(path, max_bytes=int(size), seed=int(seed))
    assert call("train_tokenizer", "--config", "recipes/speedrun/train-tokenizer").code == 0
    assert call("make_data", "--config", "recipes/speedrun/make-data").code == 0
    named = dict(re.findall(r"^\| `(\S+)` \| [\d,]+ \| `(\w+)` \|$", page, flags=re.MULTILINE))
    found = [json.loads((tmp_path / f"data/speedrun/{split}.json").read_text()) for split in ("train", "valid")]
    assert [one["sha256"][:12] for one in found] == [named["train.npy"], named["valid.npy"]]
    assert [f"{one['tokens']:,}" for one in found] == re.findall(r"\.npy` \| ([\d,]+) \|", page)
    assert found[0]["tokenizer_sha256"][:12] == named["tokenizer"]
