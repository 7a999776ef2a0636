"""docs/chat-recipe.md: its commands, in small, go from stories to a model that was asked questions before and after."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from config.add_tokens import AddTokensConfig
from config.eval import EvalConfig
from config.io import load_config
from config.make_data import MakeDataConfig
from config.shipped import shipped_files
from config.train import TrainConfig
from config.train_tokenizer import TrainTokenizerConfig
from tests.cli.commands import call
from tests.test_readme import ROOT

PAGE = ROOT / "docs/chat-recipe.md"
RECIPES = {name.rpartition("/")[2]: path for name, path in shipped_files().items() if name.startswith("recipes/chat/")}
COMMANDS = re.findall(r"^(?:transformerlm-|python -m databuilder\.).*$", PAGE.read_text(encoding="utf-8"), flags=re.M)
TINY = "--model.d_model=32 --model.num_layers=1 --training.max_steps=3 --training.device=cpu"
SMALL = {
    "databuilder.stories": "--max-bytes 60000",
    "databuilder.conversations": "--train 160 --test 16",
    "train-tokenizer": "--tokenizer.vocab_size=400",
    "base": f"--model.vocab_size=400 {TINY}",
    "tune": f"--model.vocab_size=402 {TINY}",
    "eval": "--resamples=0 --max_new_tokens=4 --device=cpu",
}


def path_of(commands: list[str]) -> list[list[str]]:
    """Return the recipe's own commands in words, each with the options that make it small."""
    found = []
    for line in commands:
        words = shlex.split(line)
        small = next((more for name, more in SMALL.items() if any(word.endswith(name) for word in words)), "")
        found.append([*words, *small.split()])
    return found


def test_the_files_fit_each_other():
    """What one writes the next one reads, and the tuned model is the base model with two rows more."""
    tokenizer = load_config(TrainTokenizerConfig, RECIPES["train-tokenizer"])
    made = ("make-data", "make-conversations")
    stories, conversations = (load_config(MakeDataConfig, RECIPES[name]) for name in made)
    base, tune = (load_config(TrainConfig, RECIPES[name]) for name in ("base", "tune"))
    added, asked = load_config(AddTokensConfig, RECIPES["add-tokens"]), load_config(EvalConfig, RECIPES["eval"])
    assert stories.tokenizer == base.data.tokenizer == tokenizer.output_dir
    assert (stories.train, stories.valid) == (base.data.train, base.data.valid)
    assert base.model.vocab_size == tokenizer.tokenizer.vocab_size
    assert tune.model.vocab_size == base.model.vocab_size + len(added.special_tokens)
    ours, theirs = (one.model.model_dump(exclude={"vocab_size", "document_mask"}) for one in (base, tune))
    assert ours == theirs
    assert added.source == base.runs_dir / base.logging.run_name
    assert added.output == tune.checkpoint.init_from == asked.compare[0]
    assert conversations.tokenizer == tune.data.tokenizer == added.output / "tokenizer"
    assert (conversations.train, conversations.valid) == (tune.data.train, tune.data.valid)
    assert asked.compare[1] == tune.runs_dir / tune.logging.run_name


@pytest.mark.slow
def test_the_page_runs_in_small(tmp_path, monkeypatch):
    """From an empty directory, in the order of the page, without a network."""
    from databuilder import conversations, stories

    monkeypatch.chdir(tmp_path)
    mains = {"databuilder.stories": stories.main, "databuilder.conversations": conversations.main}
    for words in path_of(COMMANDS[:9]):
        if words[0] == "python":
            mains[words[2]](words[3:])
            continue
        done = call(words[0].removeprefix("transformerlm-").replace("-", "_"), *words[1:])
        assert done.code == 0, (words, done.stderr)
    (record,) = done.records
    assert record["b.metrics.conversations"] == 16
    assert Path("runs/chat/checkpoints").is_dir()
