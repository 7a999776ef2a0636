"""A tokenizer, token files and a configuration so small that a training run takes a fraction of a second."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.train import TrainConfig
from databuilder.dataset_builder import build_dataset
from databuilder.docstring_corpus import write_corpus
from transformerlm.tokenizer import Tokenizer, train_bpe
from transformerlm.tokenizer.chat import ChatFormat

END = "<|endoftext|>"
VOCAB_SIZE = 290
CLOCK_KEYS = {"metrics.tokens_per_second", "time.elapsed_s", "memory.peak_bytes"}
"""The keys of a step line that were measured on the machine: two equal runs differ in them."""


@dataclass(frozen=True)
class TinyFiles:
    """The files of a run: the raw text, and those that the real tokenizer trainer and data builder make from it."""

    text: Path
    tokenizer: Path
    train: Path
    valid: Path


def write_tiny_files(folder: Path, *, seed: int = 0) -> TinyFiles:
    """Write a text of simple sentences, a tokenizer trained on it and its token files."""
    rng = random.Random(seed)
    names, verbs, things = ["Ada", "Bob", "Émile", "Zoë"], ["sees", "likes", "finds"], ["a tree", "the sea", "two 🍎"]
    sentences = [f"{rng.choice(names)} {rng.choice(verbs)} {rng.choice(things)}.\n" for _ in range(400)]
    documents = ["".join(sentences[start : start + 10]) for start in range(0, len(sentences), 10)]
    (folder / "text.txt").write_text(END.join(documents), encoding="utf-8")
    return _tokenize(folder, vocab_size=VOCAB_SIZE)


def write_docstring_files(folder: Path) -> TinyFiles:
    """Write a megabyte of real text, the docstrings of this Python, a tokenizer of 512 tokens and its token files."""
    write_corpus(folder / "text.txt", max_bytes=1_000_000)
    return _tokenize(folder, vocab_size=512)


def write_chat_files(folder: Path, *, number: int = 80) -> TinyFiles:
    """Write conversations, every fifth without an answer, a tokenizer with ChatML's tokens, and token files."""
    rng = random.Random(0)
    things = ["a tree", "the sea", "two 🍎"]
    rows = []
    for one in range(number):
        messages = [{"role": "user", "content": f"What is {rng.choice(things)}?"}]
        if one % 5:
            messages.append({"role": "assistant", "content": f"{rng.choice(things)} and {rng.choice(things)}."})
            messages.append({"role": "user", "content": "Sure?"})
            messages.append({"role": "assistant", "content": rng.choice(["Yes.", "No.", ""])})
        rows.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    files = TinyFiles(folder / "chat.jsonl", folder / "tokenizer", folder / "train.npy", folder / "valid.npy")
    files.text.write_text("".join(rows), encoding="utf-8")
    specials = [END, "<|im_start|>", "<|im_end|>"]
    said = [message["content"] for row in rows for message in json.loads(row)["messages"]]
    (folder / "said.txt").write_text("\n".join(said), encoding="utf-8")
    Tokenizer(*train_bpe(folder / "said.txt", VOCAB_SIZE, specials), specials).save(files.tokenizer)
    build_dataset(
        files.text,
        tokenizer=Tokenizer.from_directory(files.tokenizer),
        train_path=files.train,
        valid_path=files.valid,
        valid_fraction=0.3,
        text_field="messages",
        chat=ChatFormat(),
    )
    return files


def _tokenize(folder: Path, *, vocab_size: int) -> TinyFiles:
    files = TinyFiles(folder / "text.txt", folder / "tokenizer", folder / "train.npy", folder / "valid.npy")
    Tokenizer(*train_bpe(files.text, vocab_size, [END]), [END]).save(files.tokenizer)
    build_dataset(
        files.text,
        tokenizer=Tokenizer.from_directory(files.tokenizer),
        train_path=files.train,
        valid_path=files.valid,
        valid_fraction=0.2,
    )
    return files


def tiny_config(files: TinyFiles, runs_dir: Path, changes: dict[str, Any] | None = None) -> TrainConfig:
    """Return the configuration of a run of 12 steps in `runs_dir/run`, with dotted keys changed."""
    tree: dict[str, Any] = {
        "runs_dir": str(runs_dir),
        "model": {
            "vocab_size": VOCAB_SIZE,
            "context_length": 16,
            "d_model": 32,
            "num_layers": 2,
            "num_heads": 2,
            "d_ff": 64,
        },
        "data": {"train": str(files.train), "valid": str(files.valid), "tokenizer": str(files.tokenizer)},
        "training": {
            "max_steps": 12,
            "batch_size": 8,
            "seed": 1,
            "device": "cpu",
            "precision": "fp32",
            "eval_interval": 4,
            "eval_tokens": 256,
        },
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"warmup_steps": 3},
        "checkpoint": {"interval": 5, "keep": 2},
        "logging": {"backend": "noop", "run_name": "run"},
    }
    for name, value in (changes or {}).items():
        *sections, leaf = name.split(".")
        table = tree
        for section in sections:
            table = table.setdefault(section, {})
        table[leaf] = value
    return TrainConfig.model_validate(tree)


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def step_lines(run_dir: Path) -> list[dict[str, Any]]:
    """Return the step lines of a run without the values that a clock has measured."""
    lines = [record for record in read_records(run_dir) if "metrics.loss" in record]
    return [{key: value for key, value in line.items() if key not in CLOCK_KEYS} for line in lines]
