"""`transformerlm-make-data`: text files and a tokenizer in, token files out."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.make_data")

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cli.utils import Command, StageProgress, note
from cli.utils import main as run_command
from config.make_data import MakeDataConfig

if TYPE_CHECKING:
    from databuilder.sources import SourceReport


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-make-data", MakeDataConfig, make_data), argv)


def make_data(config: MakeDataConfig) -> None:
    """Encode the text as the configuration says, and log what came out."""
    from databuilder import Source, build_dataset
    from logger import create_logger
    from transformerlm.tokenizer.tokenizer import Tokenizer

    report = build_dataset(
        config.input or [Source(**vars(source)) for source in config.sources],
        tokenizer=Tokenizer.from_directory(config.tokenizer, engine=config.engine),
        train_path=config.train,
        valid_path=config.valid,
        valid_fraction=config.valid_fraction,
        separator=config.separator,
        text_field=config.text_field,
        invalid_utf8=config.invalid_utf8,
        overwrite=config.overwrite,
        num_workers=config.workers or None,
        progress=StageProgress({"encode": "B"}),
    )
    if report.invalid_utf8:
        note(f"the text is not all UTF-8: U+FFFD was read {report.invalid_utf8:,} times in place of other bytes")
    with create_logger(
        config.logging.backend,
        run_name=config.logging.run_name or config.train.stem,
        wandb_entity=config.wandb.entity,
        wandb_project=config.wandb.project,
        config=config.model_dump(mode="json"),
    ) as logger:
        for split in filter(None, (report.train, report.valid)):
            size = f"{split.bytes / 1e6:,.1f} MB of text"
            note(f"{split.path}: {split.tokens:,} tokens, {split.documents:,} documents, {size}")
            _note_shares(split.sources if config.sources else [], split.tokens)
            logger.log_event(
                "data_made",
                path=str(split.path),
                tokens=split.tokens,
                bytes=split.bytes,
                documents=split.documents,
                invalid_utf8=report.invalid_utf8,
                seconds=report.seconds,
            )


def _note_shares(sources: Sequence[SourceReport], num_tokens: int) -> None:
    for source in sources:
        names = ", ".join(source.input[:3]) + (", ..." if len(source.input) > 3 else "")
        note(f"  {names}: {source.tokens / num_tokens:.1%} of the tokens, {source.documents:,} documents")
