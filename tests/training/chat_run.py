"""A run that was trained on conversations, in a second or two: whatever it is asked, it has learnt one answer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from databuilder.dataset_builder import build_dataset
from tests.training.tiny_run import END, TinyFiles, tiny_config
from transformerlm.tokenizer import Tokenizer, train_bpe
from transformerlm.tokenizer.chat import ChatFormat

SPECIALS = [END, "<|im_start|>", "<|im_end|>"]
PLAIN = ChatFormat(system="System:\n", user="User:\n", assistant="Bot:\n", end="\n", after="", special_tokens=())
"""A format that any tokenizer has."""
ANSWER = "Yes, it is."


def write_conversations(path: Path, number: int = 120) -> Path:
    """Write conversations of one, two or three questions, some with a system message, as JSON lines."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(number):
            messages = [{"role": "system", "content": "Be brief."}] if rng.random() < 0.3 else []
            for _ in range(rng.choice([1, 1, 2, 3])):
                question = f"Is {rng.choice(['Ada', 'Bob', 'Zoë'])} {rng.choice(['here', 'there', 'at sea'])}?"
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWER}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path


def chat_tokenizer(text: Path) -> Tokenizer:
    """Return a tokenizer with ChatML's special tokens, of what conversations say."""
    rows = [json.loads(line)["messages"] for line in text.read_text(encoding="utf-8").splitlines()]
    lines = text.with_suffix(".txt")
    lines.write_text("".join(f"{one['role']}\n{one['content']}\n" for row in rows for one in row), encoding="utf-8")
    return Tokenizer(*train_bpe(lines, 320, SPECIALS), SPECIALS)


def write_chat_files(folder: Path, *, chat: ChatFormat | None = None) -> TinyFiles:
    """Write conversations, a tokenizer with ChatML's special tokens, and token files."""
    files = TinyFiles(folder / "chat.jsonl", folder / "tokenizer", folder / "train.npy", folder / "valid.npy")
    write_conversations(files.text)
    tokenizer = chat_tokenizer(files.text)
    tokenizer.save(files.tokenizer)
    build_dataset(
        files.text,
        tokenizer=tokenizer,
        train_path=files.train,
        valid_path=files.valid,
        valid_fraction=0.2,
        text_field="messages",
        chat=chat or ChatFormat(),
        num_workers=1,
    )
    return files


def train_chat_run(folder: Path, *, chat: ChatFormat | None = None, changes: dict[str, Any] | None = None) -> Path:
    """Train on conversations until the answer is learnt, and return the run."""
    import torch

    from cli.train import train

    torch.set_num_threads(1)  # a session's fixture runs before the one that does this for each test
    files = write_chat_files(folder, chat=chat)
    settings = {
        "model.vocab_size": Tokenizer.from_directory(files.tokenizer).vocab_size,
        "model.context_length": 96,
        "model.document_mask": True,
        "data.order": "epoch",
        "data.packing": "documents",
        "training.max_steps": 40,
        "training.eval_interval": 40,
        "checkpoint.interval": 0,
        "optimizer.learning_rate": 1e-2,
    }
    train(tiny_config(files, folder, {**settings, **(changes or {})}))
    return folder / "run"
