"""The two trainers under torture, the toy and the real one, each with a run that nobody disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.torture import toy_trainer
from tests.torture.harness import Run, Trainer
from tests.torture.process import Exec, Surroundings, Zygote

TOY = str(Path(toy_trainer.__file__))
TOY_TOML = """
runs_dir = "runs"
[training]
max_steps = 40
[checkpoint]
keep = 2
[logging]
"""
REAL_TOML = """
runs_dir = "runs"
[model]
vocab_size = 290
context_length = 16
d_model = 32
num_layers = 2
num_heads = 2
d_ff = 64
[data]
train = "data/train.npy"
valid = "data/valid.npy"
tokenizer = "data/tokenizer"
[training]
max_steps = 60
batch_size = 8
micro_batch_size = 4
seed = 1
device = "cpu"
precision = "fp32"
eval_interval = 4
eval_tokens = 128
[optimizer]
learning_rate = 3e-3
[schedule]
warmup_steps = 10
[checkpoint]
keep = 2
"""


def finished(trainer: Trainer, home: Path) -> Run:
    """Return a run that came to its end undisturbed."""
    run = Run(trainer, home)
    assert run.finish() == []
    return run


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The toy without a bug."""
    data = tmp_path_factory.mktemp("toy") / "data"
    toy_trainer.write_data(data)
    return Trainer(Exec([TOY]), TOY_TOML, data, seconds=0.1)


@pytest.fixture(scope="session")
def toy_reference(toy: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The toy's undisturbed run."""
    return finished(toy, tmp_path_factory.mktemp("toy-reference"))


LIBRARIES = ("torch", "safetensors.torch", "numpy", "pydantic", "regex", "tomli_w")
OURS = (
    "cli.prepare_run",
    "cli.progress",
    "cli.same_run",
    "cli.summary",
    "logger",
    "transformerlm.experiments.loss_curve",
    "transformerlm.training.planning.calibration",
    "transformerlm.training.planning.micro_batch",
    "transformerlm.training.planning.preflight",
    "transformerlm.training.planning.token_check",
    "transformerlm.training.prepared_run",
    "transformerlm.training.trainer",
)


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """What starts the real trainer, and other commands, without importing torch and our modules each time."""
    zygote = Zygote("cli.train", [*LIBRARIES, *OURS])
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def bare_zygote() -> Iterator[Zygote]:
    """What starts the real trainer without importing torch, but imports our modules as a person's start does."""
    zygote = Zygote("cli.train", LIBRARIES)
    yield zygote
    zygote.close()


def call(zygote: Zygote, module: str, *arguments: str, home: Path, around: Surroundings | None = None):
    """Run another of the commands in `home` and return the ended process."""
    files = (home / f"{module}.out", home / f"{module}.err")
    child = zygote.start(list(arguments), home, around or Surroundings(), files, module=module)
    child.wait()
    return child


@pytest.fixture(scope="session")
def real(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The real trainer, on data that the other commands have made."""
    home = tmp_path_factory.mktemp("real")
    sentences = [f"{name} {verb} {thing}.\n" for name in NAMES for verb in VERBS for thing in THINGS]
    documents = ["".join(sentences[start::7]) for start in range(7)]
    (home / "text.txt").write_text("<|endoftext|>".join(documents * 4), encoding="utf-8")
    tokenizer = ("--input=text.txt", "--output_dir=data/tokenizer", "--tokenizer.vocab_size=290")
    data = ("--input=text.txt", "--tokenizer=data/tokenizer", "--train=data/train.npy", "--valid=data/valid.npy")
    for module, options in (("cli.train_tokenizer", tokenizer), ("cli.make_data", (*data, "--valid_fraction=0.2"))):
        child = call(zygote, module, *options, home=home)
        assert child.poll() == 0, child.stderr
    return Trainer(zygote, REAL_TOML, home / "data", seconds=1.0)


NAMES, VERBS, THINGS = ["Ada", "Bob", "Émile", "Zoë"], ["sees", "likes", "finds"], ["a tree", "the sea", "two 🍎"]


@pytest.fixture(scope="session")
def real_reference(real: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The real trainer's undisturbed run, started as a person starts it."""
    run = Run(real, tmp_path_factory.mktemp("real-reference"))
    child = run.start(starter=Exec(["-m", "cli.train"]))
    assert child.wait() == 0, child.stderr
    return run
