"""docs/recipes.md from top to bottom, with the files of its recipes served by this machine."""

from __future__ import annotations

import gzip
import random
import re
from functools import reduce
from pathlib import Path

import pytest

from config.io import iter_keys, load_config
from config.plan import PlanConfig
from config.train import TrainConfig
from databuilder.download import RECIPES
from tests.cli.commands import call
from tests.databuilder.hub_server import as_the_hub
from tests.test_readme import ROOT, commands_of, our_part
from tests.training.tiny_run import END, VOCAB_SIZE, write_tiny_files
from transformerlm.models.estimates import count_parameters
from transformerlm.models.settings import ModelSettings
from transformerlm.training.planning.machine import Machine
from transformerlm.training.planning.micro_batch import resolve_elsewhere
from transformerlm.training.planning.plan import arithmetic, expected

LINES = [part for part in map(our_part, commands_of(ROOT / "docs/recipes.md")) if part]
# What makes the model and its training so small that they take a second.
SMALL = """--model.d_model=32 --model.num_layers=1 --model.num_heads=2 --model.d_ff=64 --model.context_length=16
    --training.max_steps=3 --training.batch_size=4 --training.log_interval=1 --training.eval_tokens=64
    --samples.sampling.max_new_tokens=4 --training.device=cpu --checkpoint.init_from=none""".split()  # noqa: SIM905 (it reads as one types it)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return small token files and their tokenizer."""
    return write_tiny_files(tmp_path_factory.mktemp("recipes"))


def stories(number: int, seed: int) -> bytes:
    """Return a text of as many documents."""
    rng = random.Random(seed)
    sentences = ["Once upon a time there was a dog.", "The president said no.", "It rained.", "They lived happily."]
    return f"\n{END}\n".join(" ".join(rng.choices(sentences, k=12)) for _ in range(number)).encode()


RUNS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("docs/recipes", "config/resources/recipes")
    for path in (ROOT / folder).rglob("*.toml")
    if "[training]" in path.read_text()
)


@pytest.mark.parametrize("path", RUNS)
def test_every_run_of_the_recipes_trains(path, files, tmp_path):
    """One command trains it, here in small; the file itself says that command."""
    assert f"transformerlm-train --config {path}" in (ROOT / path).read_text(encoding="utf-8")
    places = [f"--data.{name}={getattr(files, name)}" for name in ("train", "valid", "tokenizer")]
    short = [
        f"--model.vocab_size={VOCAB_SIZE}",
        *SMALL,
        *(["--schedule.warmup_steps=1"] if "reference" in path else []),
    ]
    done = call("train", "--config", ROOT / path, f"--runs_dir={tmp_path}", *places, *short)
    assert done.code == 0, done.stderr
    assert done.records[-1] == {"event": "finished", "step": 3, "reason": "max_steps"}


def test_the_reference_has_the_published_settings():
    """Those of the run that has published 1.5783 after 10,000 and 1.2806 after 50,000 steps."""
    config = load_config(TrainConfig, ROOT / "docs/recipes/tinystories-reference.toml")
    model, training, optimizer = config.model, config.training, config.optimizer
    assert (model.vocab_size, model.context_length, model.d_model, model.num_layers) == (50257, 256, 512, 4)
    assert (model.num_heads, model.d_ff, model.rope_theta, training.batch_size) == (16, 1344, 10000.0, 128)
    assert (training.max_steps, config.schedule.warmup_steps, config.schedule.min_learning_rate) == (50000, 10000, 1e-5)
    assert (optimizer.name, optimizer.weight_decay, optimizer.beta1, optimizer.beta2) == ("adamw", 0.01, 0.9, 0.95)


@pytest.mark.parametrize(
    ("path", "least", "most"),
    [("tinystories/train-15m.toml", 14e6, 16e6), ("openwebtext/train-125m.toml", 120e6, 130e6)],
)
def test_a_recipe_has_the_size_of_its_name(path, least, most):
    """Its parameters are about as many as its name says."""
    config = load_config(TrainConfig, ROOT / "docs/recipes" / path)
    assert least < count_parameters(ModelSettings(**config.model.model_dump())) < most


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("no-norm", {"model.norm_position": "none", "optimizer.learning_rate": 1e-3}),
        ("post-norm", {"model.norm_position": "post"}),
        ("nope", {"model.position": "none"}),
    ],
)
def test_an_ablation_differs_in_what_it_is_about(name, differs):
    """From the shipped run, and in nothing else but its name, so that the two compare."""
    shipped = load_config(TrainConfig, ROOT / "config/resources/train.toml", {"logging.run_name": name})
    ablation = load_config(TrainConfig, ROOT / f"docs/recipes/ablations/{name}.toml")
    keys = [key.name for key in iter_keys(TrainConfig)]
    ours, theirs = ({name: value_of(config, name) for name in keys} for config in (ablation, shipped))
    assert {name: value for name, value in ours.items() if value != theirs[name]} == differs


def value_of(config: TrainConfig, dotted: str) -> object:
    """Return a key's value; None in a table that may be missing."""
    return reduce(lambda table, part: getattr(table, part, None), dotted.split("."), config)


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


ROWS = re.findall(
    r"^\| (\d+) x ([\w-]+) \| (\d+) x \d+ GPUs? x (\d+) pass(?:es)? \| ([\d.]+) million \|",
    (ROOT / "docs/recipes.md").read_text(encoding="utf-8"),
    flags=re.M,
)


@pytest.mark.parametrize(("num_gpus", "gpu", "size", "passes", "millions"), ROWS)
def test_the_table_of_gpus_is_what_plan_says(num_gpus, gpu, size, passes, millions):
    """How the batch of the 124 M recipe is dealt out, and the speed that is assumed."""
    recipe = ROOT / "docs/recipes/openwebtext/train-125m.toml"
    config = load_config(PlanConfig, recipe, {"machine.gpu": gpu, "machine.num_gpus": num_gpus})
    machine = Machine.of(config.machine)
    resolved = resolve_elsewhere(config, machine, precision="bf16")
    facts = arithmetic(resolved, run_dir=Path(), machine=machine, precision="bf16")
    assert (facts["micro_batch_size"], facts["accumulation_steps"]) == (int(size), int(passes))
    rate = expected(config, machine, plan=facts)["assumed.tokens_per_second"]
    assert f"{rate / 1e6:.2f}".startswith(millions) or f"{rate / 1e6:.1f}" == millions
    assert len(ROWS) == 5
