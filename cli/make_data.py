"""`transformerlm-make-data`: text files and a tokenizer in, token files out."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.make_data")

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cli.progress import StageProgress
from cli.terminal import compiling_shown, note, note_invalid_utf8, working
from cli.utils import Command
from cli.utils import main as run_command
from config.make_data import MakeDataConfig

if TYPE_CHECKING:
    from databuilder.dataset_builder import BuildReport
    from databuilder.sources import Source, SourceReport
    from logger.base import Logger
    from transformerlm.tokenizer.chat import ChatFormat

    Build = tuple[Sequence[Path] | Sequence[str] | Sequence[Source], Path, Path | None]

# What --help shows.
SHORT = (
    "input",
    "tokenizer",
    "train",
    "valid",
    "valid_fraction",
    "separator",
    "text_field",
    "max_tokens",
    "workers",
    "overwrite",
)
EXAMPLES = (
    ("by the shipped settings, from data/corpus.txt", "--config make-data"),
    ("one of 100 jobs that share the work", "--config make-data --cluster.on=share --cluster.share=3/100"),
    ("a sample of a large text", "--config make-data --max_tokens=50000000"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-make-data", MakeDataConfig, make_data, short=SHORT, examples=EXAMPLES), argv)


def make_data(config: MakeDataConfig) -> None:
    """Encode the text as the configuration says, and log what came out."""
    with working("starting"):
        from databuilder import Source, build_dataset
        from logger import create_logger
        from transformerlm.tokenizer.tokenizer import Tokenizer

    sources = [Source(**vars(source)) for source in config.sources]
    one: Build = (config.input or sources, config.train, config.valid)
    builds = _one_for_each_input(config) if config.outputs == "per-input" else [one]
    tokenizer = Tokenizer.from_directory(config.tokenizer, engine=config.engine)
    with create_logger(
        config.logging.backend,
        run_name=config.logging.run_name or config.train.stem,
        wandb_entity=config.wandb.entity,
        wandb_project=config.wandb.project,
        config=config.model_dump(mode="json"),
    ) as logger:
        for inputs, train, valid in builds:
            with working("reading the text"), compiling_shown():
                report = build_dataset(
                    inputs,
                    tokenizer=tokenizer,
                    train_path=train,
                    valid_path=valid,
                    valid_fraction=config.valid_fraction,
                    separator=config.separator,
                    text_field=config.chat.messages_field if config.chat else config.text_field,
                    allow_special=config.allow_special,
                    invalid_utf8=config.invalid_utf8,
                    chat=_format_of(config),
                    max_tokens=config.max_tokens,
                    overwrite=config.overwrite,
                    num_workers=config.workers or None,
                    cluster=config.cluster,
                    progress=StageProgress({"encode": "B"}),
                )
            if report is None:
                note(f"{train}: nothing is left to do for this share; the last one to finish writes the token files")
                logger.log_event("share_done", path=str(train))
            else:
                _tell(report, logger, with_sources=bool(config.sources))


def _format_of(config: MakeDataConfig) -> ChatFormat | None:
    from transformerlm.tokenizer.chat import ChatFormat

    return ChatFormat.of(config.chat.model_dump(exclude={"messages_field"})) if config.chat else None


def _one_for_each_input(config: MakeDataConfig) -> list[Build]:
    """Return each input with token files of its name, all of them checked before any is written.

    Raises:
        ValueError: two inputs would have the same token file, or `build_dataset` would refuse an output.
        FileExistsError: an output exists already.
    """
    from databuilder.checks import check_outputs
    from transformerlm.utils.text_files import expand_inputs

    builds: list[Build] = []
    owners: dict[str, Path] = {}
    paths = expand_inputs(config.input)
    for path in paths:
        name = path.name.lstrip(".").split(".")[0] + ".npy"
        if (other := owners.setdefault(name, path)) != path:
            raise ValueError(f"input: expected names that differ, found {other} and {path}, which would both be {name}")
        builds.append(([path], config.train / name, config.valid / name if config.valid is not None else None))
    outputs = [file for _, *files in builds for file in files if file is not None]
    check_outputs(outputs, paths, overwrite=config.overwrite)
    return builds


def _tell(report: BuildReport, logger: Logger, *, with_sources: bool) -> None:
    """Report the results to the person at the terminal and to the log."""
    note_invalid_utf8(report.invalid_utf8)
    if report.empty_documents > report.num_files:  # the line end after a file's last separator is not one
        note(f"documents of white space alone, left out: {report.empty_documents:,}")
    for split in filter(None, (report.train, report.valid)):
        size = f"{split.bytes / 1e6:,.1f} MB of text"
        note(f"{split.path}: {split.tokens:,} tokens, {split.documents:,} documents, {size}")
        _note_shares(split.sources if with_sources else [], split.tokens)
        logger.log_event(
            "data_made",
            path=str(split.path),
            tokens=split.tokens,
            bytes=split.bytes,
            documents=split.documents,
            invalid_utf8=report.invalid_utf8,
            empty_documents=report.empty_documents,
            seconds=report.seconds,
        )


def _note_shares(sources: Sequence[SourceReport], num_tokens: int) -> None:
    for source in sources:
        names = ", ".join(source.input[:3]) + (", ..." if len(source.input) > 3 else "")
        note(f"  {names}: {source.tokens / num_tokens:.1%} of the tokens, {source.documents:,} documents")
