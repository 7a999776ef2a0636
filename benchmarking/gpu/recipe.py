"""The recipe of TinyStories in the remaining time, on the available text: what training looks like for a user.

Its lines go to the suite's `metrics.jsonl` as they come.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from benchmarking.gpu.shapes import TINY
from benchmarking.gpu.task import Task
from benchmarking.machine import is_installed

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "docs" / "recipes" / "tinystories"
NAME = "metrics.jsonl"
_CORPUS_BYTES, _TINY_BYTES = 30_000_000, 60_000
_VOCAB_SIZE, _TINY_VOCAB_SIZE = 10_000, 300
# Seconds that `training.max_time` does not count: guesses, for nobody has timed them on a GPU.
_START, _COMPILE = 30.0, 60.0
_AT_THE_END = 15.0  # the last validation, checkpoint and sample
_WORTH_COMPILING = 300.0  # with less time, compiling would take most of it
_SUMMARY = 5.0  # for the report, whatever has become of the training


def run(task: Task) -> None:
    """Make a tokenizer and data, then train for as long as time allows."""
    folder = task.scratch / "recipe"
    folder.mkdir(parents=True)
    files = [*task.text] or [_corpus(task, folder)]
    inputs = ["--input", *map(str, files)]
    vocab_size = _TINY_VOCAB_SIZE if task.tiny else _VOCAB_SIZE
    engine = "compiled" if is_installed("numba") and not task.tiny else "reference"
    tokenizer = [*inputs, f"--output_dir={folder / 'tokenizer'}", f"--tokenizer.vocab_size={vocab_size}"]
    _run("train_tokenizer", RECIPE / "train_tokenizer.toml", *tokenizer, f"--tokenizer.engine={engine}")
    data = [*inputs, f"--tokenizer={folder / 'tokenizer'}", f"--train={folder / 'train.npy'}"]
    data += [f"--valid={folder / 'valid.npy'}", "--valid_fraction=0.02", f"--engine={engine}"]
    _run("make_data", RECIPE / "make_data.toml", *data)
    _train(task, folder, vocab_size)


def _corpus(task: Task, folder: Path) -> Path:
    path = folder / "corpus.txt"
    size = _TINY_BYTES if task.tiny else _CORPUS_BYTES
    command = [sys.executable, "-m", "databuilder.docstring_corpus", str(path), f"--max-bytes={size}"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


def _run(command: str, config: Path, *arguments: str, timeout: float | None = None) -> None:
    whole = [sys.executable, "-m", f"cli.{command}", "--config", str(config), *arguments]
    subprocess.run(whole, check=True, stdin=subprocess.DEVNULL, timeout=timeout)


def _train(task: Task, folder: Path, vocab_size: int) -> None:
    left = task.seconds_left - _START - _AT_THE_END
    compiled = left > _WORTH_COMPILING and not task.tiny
    seconds = max(5.0, left - (_COMPILE if compiled else 0.0))
    settings: dict[str, Any] = {"runs_dir": folder, "logging.run_name": "run", "logging.dataset": "the suite's text"}
    settings |= {"data.train": folder / "train.npy", "data.valid": folder / "valid.npy"}
    settings |= {"data.tokenizer": folder / "tokenizer", "model.vocab_size": vocab_size}
    settings |= {"training.device": task.device, "training.max_time": f"{seconds:.0f}s"}
    settings |= {"training.compile": str(compiled).lower()}
    if task.tiny:
        settings |= {f"model.{key}": value for key, value in TINY.model().items() if key != "vocab_size"}
        settings |= {"training.max_steps": 4, "training.batch_size": 4, "training.eval_interval": 2}
        settings |= {"schedule.warmup_steps": 1, "samples.interval": 4, "training.log_interval": 1}
        settings |= {"samples.sampling.max_new_tokens": 4}
    source, done = folder / "run" / NAME, threading.Event()
    follower = threading.Thread(target=_follow, args=(source, task.out / NAME, done), daemon=True)
    follower.start()
    try:
        arguments = (f"--{key}={value}" for key, value in settings.items())
        _run("train", RECIPE / "train.toml", *arguments, timeout=max(1.0, task.seconds_left - _SUMMARY))
    finally:
        done.set()
        follower.join()
        _summarise(task, task.out / NAME, compiled=compiled)


def _follow(source: Path, target: Path, done: threading.Event) -> None:
    """Copy the lines of a growing file as they come."""
    position, last = 0, False
    while not last:
        last = done.wait(0.5)
        if not source.exists():
            continue
        with source.open("rb") as file:
            file.seek(position)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        with target.open("ab") as copy:
            copy.write(whole)
            copy.flush()
            os.fsync(copy.fileno())
        position += len(whole)


def _summarise(task: Task, metrics: Path, *, compiled: bool) -> None:
    """Write the rows of what was trained, which may be nothing."""
    lines = metrics.read_bytes().split(b"\n") if metrics.exists() else []
    records = [json.loads(line) for line in lines if line]
    steps = [record for record in records if "metrics.loss" in record]
    validations = [record for record in steps if "metrics.val_loss" in record]
    rates = sorted(record["metrics.tokens_per_second"] for record in steps if "metrics.tokens_per_second" in record)
    for record in (*validations[:-1][:: max(1, len(validations) // 5)], *validations[-1:]):
        cells = {"step": record["step"], "loss": record["metrics.loss"], "val_loss": record["metrics.val_loss"]}
        task.row("TinyStories' recipe in the time left", **cells, bits_per_byte=record["metrics.val_bits_per_byte"])
    if rates:
        speed = {"compiled": str(compiled), "median_tokens_per_second": rates[len(rates) // 2]}
        task.row("TinyStories' recipe: speed", steps=steps[-1]["step"], **speed)
    samples = [record for record in records if record.get("event") == "sample"]
    for record in samples[-2:]:
        text = record["text.prompt"] + record["text.output"]
        task.row("TinyStories' recipe: the last samples", step=record["step"], text=text[:400])
