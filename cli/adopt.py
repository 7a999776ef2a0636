"""`transformerlm-adopt`: a file of ids from another program in, a token file out."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.adopt")

from collections.abc import Sequence

from cli.progress import StageProgress
from cli.terminal import note, print_record, working
from cli.utils import Command
from cli.utils import main as run_command
from config.adopt import AdoptConfig

# What --help shows.
SHORT = ("input", "tokenizer", "separator", "output", "dtype")
EXAMPLES = (
    ("a .npy, where it is", "--input ids/train.npy --tokenizer data/tokenizer"),
    ("nanoGPT's file, as a copy", "--input openwebtext/train.bin --output data/train.npy --tokenizer data/gpt2"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-adopt", AdoptConfig, adopt, short=SHORT, examples=EXAMPLES), argv)


def adopt(config: AdoptConfig) -> None:
    """Check the file, write what it lacks, and say what is in it."""
    with working("starting"):
        from databuilder.adopted import adopt_ids
        from transformerlm.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_directory(config.tokenizer)
    report = adopt_ids(
        config.input,
        tokenizer=tokenizer,
        separator=config.separator,
        output=config.output,
        raw_dtype=config.dtype,
        progress=StageProgress({"check": "B"}),
    )
    size = f"{report.bytes / 1e6:,.1f} MB of text"
    note(f"{report.path}: {report.tokens:,} tokens, {report.documents:,} documents, {size}")
    note(f"it begins: {report.beginning}")
    if not report.ends_documents:
        note(f"warning: {config.separator} is nowhere in it: one document, or another separator or tokenizer")
    print_record(
        {
            "event": "adopted",
            "path": str(report.path),
            "tokens": report.tokens,
            "bytes": report.bytes,
            "documents": report.documents,
        }
    )
