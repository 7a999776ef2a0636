"""docs/recipes.md from top to bottom, with the files of its recipes served by this machine."""

from __future__ import annotations

import gzip
import random

import pytest

from databuilder.download import RECIPES
from tests.cli.commands import call
from tests.databuilder.hub_server import as_the_hub
from tests.test_readme import ROOT, commands_of, our_part
from tests.training.tiny_run import END

LINES = [part for part in map(our_part, commands_of(ROOT / "docs/recipes.md")) if part]
# What makes the model and its training so small that they take a second.
SMALL = """--model.d_model=32 --model.num_layers=1 --model.num_heads=2 --model.d_ff=64 --model.context_length=16
    --training.max_steps=3 --training.batch_size=4 --training.log_interval=1 --training.eval_tokens=64
    --samples.sampling.max_new_tokens=4 --training.device=cpu""".split()  # noqa: SIM905 (it reads as one types it)


def stories(number: int, seed: int) -> bytes:
    """Return a text of as many documents."""
    rng = random.Random(seed)
    sentences = ["Once upon a time there was a dog.", "The president said no.", "It rained.", "They lived happily."]
    return f"\n{END}\n".join(" ".join(rng.choices(sentences, k=12)) for _ in range(number)).encode()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_whole_recipe_runs(recipe, tmp_path, monkeypatch):
    """Download, tokenizer, token files, training and a sample: each line works on what the ones before it left."""
    folder = recipe.partition("_")[0]
    lines = [(module.partition(".")[2], arguments) for module, arguments in LINES if folder in " ".join(arguments)][:6]
    assert [verb for verb, _ in lines] == ["download", "train_tokenizer", "make_data", "make_data", "train", "infer"]
    for name in ("config", "docs"):
        (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    files = {}
    for seed, file in enumerate(RECIPES[recipe]):
        text = stories(60, seed)
        files[file.path] = gzip.compress(text) if file.path.endswith(".gz") else text
    with as_the_hub(files):
        for verb, arguments in lines:
            extra = {"train": SMALL, "infer": ["--sampling.max_new_tokens=4", "--device=cpu"]}.get(verb, [])
            done = call(verb, *arguments, *extra)
            assert done.code == 0, done.stderr
    assert done.stdout.strip()
    assert (tmp_path / "data" / folder / "valid.npy").is_file()
