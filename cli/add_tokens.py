"""`transformerlm-add-tokens`: a checkpoint or a tokenizer in, the same with more special tokens out."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.add_tokens")

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli.hints import command_line, hint_lines, hints_are_wanted
from cli.terminal import note, print_record, working
from cli.utils import Command
from cli.utils import main as run_command
from config.add_tokens import AddTokensConfig

# What --help shows.
SHORT = ("source", "special_tokens", "output", "overwrite")
EXAMPLES = (
    ("ChatML's tokens for a run", "--source runs/first --output runs/first-chat"),
    ("a token of your own for a tokenizer", "--source data/tokenizer --special_tokens '<|note|>' --output data/longer"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-add-tokens", AddTokensConfig, add, short=SHORT, examples=EXAMPLES), argv)


def add(config: AddTokensConfig) -> None:
    """Write the output, and say what is new in it: as a line of JSON on stdout, unless that is a terminal."""
    with working("adding the tokens"):
        from transformerlm.checkpoints.more_tokens import add_tokens

        added = add_tokens(
            config.source, config.output, config.special_tokens, seed=config.seed, overwrite=config.overwrite
        )
    for token, token_id in added.ids.items():
        note(f"{token}: {token_id:,}")
    for token, token_id in added.known.items():
        note(f"{token}: {token_id:,}, a special token before")
    if not added.ids:
        note("nothing is new: all of these are special tokens already")
    elif added.vocab_size is not None:
        before, after = added.vocab_size
        grown = f"the model has {after:,} rows, {after - before:,} of them new"
        note(grown if after > before else f"the model had rows to spare: all of its {before:,} stay as they are")
    note(f"{added.path}: written; {config.source} is as it was")
    if added.vocab_size is not None and hints_are_wanted():
        note(_hint(config, added.path))
    record = {"event": "tokens_added", "path": str(added.path), "tokenizer": str(added.tokenizer)}
    rows = {} if added.vocab_size is None else {"model.vocab_size": added.vocab_size[1]}
    print_record({**record, "added": added.ids, "known": added.known, **rows})


def _hint(config: AddTokensConfig, checkpoint: Path) -> str:
    """Return the lines that make data of conversations and train on it; other settings are those of the old run."""
    from transformerlm.checkpoints.validation import read_state

    train, valid = "data/chat-train.npy", "data/chat-valid.npy"
    data = {
        "input": "conversations.jsonl",
        "tokenizer": config.output / "tokenizer",
        "train": train,
        "valid": valid,
        "valid_fraction": "0.02",
        "chat.messages_field": "messages",
    }
    run: dict[str, Any] = {
        "config": checkpoint / "config.toml",
        "checkpoint.init_from": config.output,
        "data.train": train,
        "data.valid": valid,
        "data.order": "epoch",
        "data.packing": "documents",
        "model.document_mask": "true",
        "logging.run_name": f"{config.output.name}-tuned",
    }
    if "imported_from" in read_state(checkpoint):  # its configuration knows the model alone
        run |= {"training.max_steps": 1000, "training.batch_size": 8, "optimizer.learning_rate": "1e-4"}
    commands = (("make data of your conversations", "make-data", data), ("train on them", "train", run))
    hints = [
        (words, command_line(program, *(f"--{key}={value}" for key, value in settings.items())))
        for words, program, settings in commands
    ]
    return "\n".join(["", *hint_lines(hints)])
