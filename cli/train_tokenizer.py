"""`transformerlm-train-tokenizer`: text files in, vocab.json and merges.txt out."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.train_tokenizer")

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cli.progress import StageProgress
from cli.terminal import note, working
from cli.utils import Command
from cli.utils import main as run_command
from config.train_tokenizer import TrainTokenizerConfig

if TYPE_CHECKING:
    from transformerlm.tokenizer.tokenizer import Tokenizer
    from transformerlm.utils.text_files import ReadStats

SAMPLE_CHARACTERS = 1_000_000
# What --help shows.
SHORT = (
    "input",
    "output_dir",
    "tokenizer.vocab_size",
    "tokenizer.special_tokens",
    "tokenizer.pattern",
    "text_field",
    "workers",
    "memory_limit_mb",
    "overwrite",
)
EXAMPLES = (
    ("by the shipped settings, from data/corpus.txt", "--config train-tokenizer"),
    ("from other files, with more tokens", '--config train-tokenizer --input "data/*.txt" --tokenizer.vocab_size=8192'),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(
        Command("transformerlm-train-tokenizer", TrainTokenizerConfig, train_tokenizer, short=SHORT, examples=EXAMPLES),
        argv,
    )


def train_tokenizer(config: TrainTokenizerConfig) -> None:
    """Train a tokenizer as the configuration says, save it and log what came out."""
    with working("starting"):
        from transformerlm.tokenizer.bpe_trainer import train_bpe
        from transformerlm.tokenizer.tokenizer import Tokenizer
        from transformerlm.utils.files import check_writable
        from transformerlm.utils.text_files import ReadStats

    if (config.output_dir / "vocab.json").exists() and not config.overwrite:
        raise FileExistsError(
            f"{config.output_dir}: holds a tokenizer already; choose another output_dir or pass --overwrite"
        )
    check_writable(config.output_dir)
    _note_odd_tokens(config.tokenizer.special_tokens)
    stats, start = ReadStats(config.invalid_utf8 == "refuse", sample_chars=SAMPLE_CHARACTERS), time.perf_counter()
    with working("reading the text"):
        vocab, merges = train_bpe(
            config.input,
            config.tokenizer.vocab_size,
            config.tokenizer.special_tokens,
            num_workers=config.workers or None,
            text_field=config.text_field,
            allow_special=config.allow_special,
            pattern=config.tokenizer.pattern,
            engine=config.tokenizer.engine,
            memory_limit_mb=config.memory_limit_mb,
            progress=StageProgress({"count": "B", "merge": "merge"}),
            stats=stats,
        )
    seconds = time.perf_counter() - start
    tokenizer = Tokenizer(vocab, merges, config.tokenizer.special_tokens, pattern=config.tokenizer.pattern)
    try:
        tokenizer.save(config.output_dir)
    except OSError as error:  # a write that fails does not say to which file
        raise OSError(error.errno, error.strerror, str(config.output_dir)) from None
    if tokenizer.vocab_size < config.tokenizer.vocab_size:
        wanted = config.tokenizer.vocab_size
        note(f"no more pairs to merge: this text needs {tokenizer.vocab_size:,} of the {wanted:,} tokens")
    if stats.invalid_utf8:
        note(f"the text is not all UTF-8: U+FFFD was read {stats.invalid_utf8:,} times in place of other bytes")
    bytes_per_token = tokenizer.bytes_per_token("".join(stats.sample))
    _log(config, tokenizer, stats, bytes_per_token=bytes_per_token, seconds=seconds)


def _note_odd_tokens(special_tokens: Sequence[str]) -> None:
    """Warn in one line, before the work, of special tokens that a `tokenizer.json` cannot express.

    Raises:
        ValueError: one of them cannot even be saved.
    """
    from transformerlm.tokenizer.io import check_special_tokens_to_save, reads_as

    check_special_tokens_to_save(special_tokens)
    if odd := [token for token in special_tokens if reads_as(token) is not None]:
        names = ", ".join(map(repr, odd))
        note(f"special_tokens: tokenizer.json cannot express {names}, so no export to it (take ASCII characters)")


def _log(
    config: TrainTokenizerConfig, tokenizer: Tokenizer, stats: ReadStats, *, bytes_per_token: float, seconds: float
) -> None:
    """Report the results to the person at the terminal and to the log."""
    from logger import create_logger

    note(
        f"{config.output_dir}: {tokenizer.vocab_size:,} tokens, {bytes_per_token:.2f} bytes per token, {seconds:.1f} s"
    )
    run_name = config.logging.run_name or config.output_dir.name
    with create_logger(
        config.logging.backend,
        run_name=run_name,
        wandb_entity=config.wandb.entity,
        wandb_project=config.wandb.project,
        config=config.model_dump(mode="json"),
    ) as logger:
        logger.log_event(
            "tokenizer_trained",
            output_dir=str(config.output_dir),
            vocab_size=tokenizer.vocab_size,
            merges=len(tokenizer.merges),
            bytes_per_token=bytes_per_token,
            sha256=tokenizer.fingerprint(),
            invalid_utf8=stats.invalid_utf8,
            seconds=seconds,
        )
        if config.wandb.log_artifacts:
            logger.log_artifact(config.output_dir, name=f"{run_name}-tokenizer", type="tokenizer")
