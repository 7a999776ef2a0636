"""Makes the files of one released format, once: a tiny run, its data, and what is expected of it.

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
from transformerlm.checkpoints.load import load_model, load_tokenizer
from transformerlm.checkpoints.validation import FORMAT
from transformerlm.inference.generate import generate

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


def main() -> None:
    """Write the folder of today's format."""
    target = HERE / f"format-{FORMAT}"
    if target.exists():
        raise SystemExit(f"{target}: exists; what was released does not change")
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


if __name__ == "__main__":
    main()
