"""`transformerlm-make-data`: text files and a tokenizer in, token files out."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.make_data")

from collections.abc import Sequence

from cli.utils import Command, StageProgress, note
from cli.utils import main as run_command
from config.make_data import MakeDataConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-make-data", MakeDataConfig, make_data), argv)


def make_data(config: MakeDataConfig) -> None:
    """Encode the text as the configuration says, and log what came out."""
    from databuilder.dataset_builder import build_dataset
    from logger import create_logger
    from transformerlm.tokenizer.tokenizer import Tokenizer

    report = build_dataset(
        config.input,
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
        for split in (report.train, report.valid):
            if split is None:
                continue
            size = f"{split.bytes / 1e6:,.1f} MB of text"
            note(f"{split.path}: {split.tokens:,} tokens, {split.documents:,} documents, {size}")
            logger.log_event(
                "data_made",
                path=str(split.path),
                tokens=split.tokens,
                bytes=split.bytes,
                documents=split.documents,
                invalid_utf8=report.invalid_utf8,
                seconds=report.seconds,
            )
