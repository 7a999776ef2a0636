"""Makes the files of each released format, once: a tiny run, its data, and what is expected of it.

    python -m tests.released.make

They are written to `tests/released/format-N`, N being the number in a checkpoint's `state.json`, and committed. An
existing folder is never written again: what it holds stands for what people have on their disks.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from tests.cli.commands import call
from transformerlm.checkpoints.load import load_config_of, load_model, load_optimizer, load_tokenizer
from transformerlm.checkpoints.save import Snapshot, save_checkpoint
from transformerlm.checkpoints.validation import FORMAT, FORMAT_OF_SEVERAL_FILES, verify
from transformerlm.inference.generate import generate
from transformerlm.training.build import build_optimizer

HERE = Path(__file__).parent
CHECKPOINT = Path("runs/run/checkpoints/step-00000200")
PROMPT, NEW_TOKENS = "Ada sees", 12
TOML = """\
runs_dir = "runs"
[model]
vocab_size = 272
context_length = 16
d_model = 8
num_layers = 1
num_heads = 2
d_ff = 16
tie_embeddings = true
[data]
train = "data/train.npy"
valid = "data/valid.npy"
tokenizer = "data/tokenizer"
[training]
max_steps = 204
batch_size = 4
device = "cpu"
precision = "fp32"
eval_batches = 2
[optimizer]
learning_rate = 3e-2
[schedule]
warmup_steps = 10
[checkpoint]
interval = 200
[logging]
run_name = "run"
"""


def run(name: str, *options: str) -> None:
    """Run a command, which must succeed."""
    done = call(name, *options)
    assert done.code == 0, done.stderr


def make_run() -> None:
    """Make tokenizer, data and a run of 204 steps in the current directory."""
    Path("text.txt").write_text(
        "<|endoftext|>".join(f"Ada sees {n} trees and Zoë finds the sea. 🍎" for n in range(40))
    )
    Path("train.toml").write_text(TOML)
    run("train_tokenizer", "--input=text.txt", "--output_dir=data/tokenizer", "--tokenizer.vocab_size=272")
    run(
        "make_data",
        "--input=text.txt",
        "--tokenizer=data/tokenizer",
        "--train=data/train.npy",
        "--valid=data/valid.npy",
        "--valid_fraction=0.2",
    )
    run("train", "--config=train.toml")


def expected() -> dict[str, object]:
    """Return what a reader of the checkpoint must find: greedy ids, their text, and the losses after a resume."""
    ids = load_tokenizer(CHECKPOINT).encode(PROMPT)
    new = generate(load_model(CHECKPOINT), ids, max_new_tokens=NEW_TOKENS, temperature=0.0)
    lines = [json.loads(line) for line in (CHECKPOINT.parents[1] / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["metrics.loss"] for line in lines if "metrics.loss" in line and line["step"] > 200}
    text = load_tokenizer(CHECKPOINT).decode([*ids, *new])
    return {"prompt": PROMPT, "prompt_ids": ids, "ids": new, "text": text, "losses": losses}


def write_first(target: Path) -> None:
    """Make a run whose checkpoint holds weights and optimizer in one file each."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_run()
        target.mkdir()
        (target / "expected.json").write_text(
            json.dumps(expected(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
        for name in ("train.toml", "data", str(CHECKPOINT)):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if Path(name).is_dir() else shutil.copy)(name, target / name)
        os.chdir(HERE)


def write_second(target: Path) -> None:
    """Make the same run with the same checkpoint in several files."""
    shutil.copytree(HERE / f"format-{FORMAT}", target)
    source, root = HERE / f"format-{FORMAT}" / CHECKPOINT, (target / CHECKPOINT).parent
    config, state, model = load_config_of(source), verify(source), load_model(source)
    optimizer = build_optimizer(model, config)
    load_optimizer(optimizer, source, state)
    own = {"format", "step", "optimizer", "sha256", "state_sha256"}  # what saving adds
    snapshot = Snapshot.of(
        model,
        optimizer,
        load_tokenizer(source),
        config_toml=(source / "config.toml").read_text(encoding="utf-8"),
        state={key: value for key, value in state.items() if key not in own},
    )
    shutil.rmtree(root)
    save_checkpoint(root, state["step"], snapshot, max_file_bytes=5_000)
    (root / "latest").unlink()


def main() -> None:
    """Write the folders of today's formats that are not there yet."""
    for number, write in ((FORMAT, write_first), (FORMAT_OF_SEVERAL_FILES, write_second)):
        target = HERE / f"format-{number}"
        if not target.exists():
            write(target)


if __name__ == "__main__":
    main()
