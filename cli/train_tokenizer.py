"""`transformerlm-train-tokenizer`: text files in, vocab.json and merges.txt out."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.train_tokenizer")

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cli.progress import StageProgress
from cli.terminal import compiling_shown, note, note_invalid_utf8, working
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
    "sample",
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
        from logger import require_backends
        from transformerlm.utils.files import check_writable
        from transformerlm.utils.text_files import ReadStats

    if not _may_write(config):
        return
    check_writable(config.output_dir)
    require_backends(config.logging.backend)
    _note_odd_tokens(config.tokenizer.special_tokens)
    stats, start = ReadStats(config.invalid_utf8 == "refuse", sample_chars=SAMPLE_CHARACTERS), time.perf_counter()
    with working("reading the text"), compiling_shown():
        tokenizer = (_train_here if config.cluster.on == "local" else _train_by_parts)(config, stats)
    if tokenizer is None:
        note(f"{config.output_dir}: this share is done; the one that finds all parts done saves the tokenizer")
        return
    seconds = time.perf_counter() - start
    if tokenizer.vocab_size < config.tokenizer.vocab_size:
        wanted = config.tokenizer.vocab_size
        note(f"no more pairs to merge: this text needs {tokenizer.vocab_size:,} of the {wanted:,} tokens")
    note_invalid_utf8(stats.invalid_utf8)
    if config.sample is not None:
        note(f"sample: trained on {stats.chosen_documents:,} of {stats.documents:,} documents")
    bytes_per_token = tokenizer.bytes_per_token("".join(stats.sample))
    _log(config, tokenizer, stats, bytes_per_token=bytes_per_token, seconds=seconds)


def _may_write(config: TrainTokenizerConfig) -> bool:
    """Return whether there is work to do; a share that comes late finds the tokenizer there.

    Raises:
        FileExistsError: a tokenizer is there already.
    """
    from transformerlm.tokenizer.count_parts import is_saving, parts_path

    killed = config.cluster.on != "local" and is_saving(parts_path(config.output_dir))
    if config.overwrite or killed or not _is_saved(config):
        return True
    if config.cluster.on == "share":
        note(f"{config.output_dir}: holds a tokenizer, so this share has nothing to do (remove an old one first)")
        return False
    raise FileExistsError(
        f"{config.output_dir}: holds a tokenizer already; choose another output_dir or pass --overwrite"
    )


def _is_saved(config: TrainTokenizerConfig) -> bool:
    return (config.output_dir / "vocab.json").exists()  # the last to be written


def _train_here(config: TrainTokenizerConfig, stats: ReadStats) -> Tokenizer:
    """Train in one pass over the text, in this machine's memory, and save."""
    from transformerlm.tokenizer.bpe_trainer import train_bpe

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
        sample=config.sample,
        progress=_progress(),
        stats=stats,
    )
    _may_write(config)  # another command may have been faster
    return _save(config, vocab, merges)


def _train_by_parts(config: TrainTokenizerConfig, stats: ReadStats) -> Tokenizer | None:
    """Train on parts that several processes count, and save; None if another share does that."""
    from transformerlm.distributed.parts_folder import check_cluster
    from transformerlm.tokenizer.count_parts import Means, Request, parts_path, trained_by_parts

    check_cluster(config.cluster)
    request = Request(
        config.tokenizer.special_tokens,
        pattern=config.tokenizer.pattern,
        text_field=config.text_field,
        allow_special=config.allow_special,
        refuse_invalid=config.invalid_utf8 == "refuse",
        sample=config.sample,
    )
    means = Means(
        config.cluster,
        engine=config.tokenizer.engine,
        num_workers=config.workers or None,
        memory_limit_mb=config.memory_limit_mb,
        progress=_progress(),
        stats=stats,
    )
    with trained_by_parts(
        config.input,
        config.tokenizer.vocab_size,
        request,
        folder=parts_path(config.output_dir),
        means=means,
        is_saved=lambda: _is_saved(config),
        restart=config.overwrite,
    ) as trained:
        return None if trained is None else _save(config, *trained)


def _progress() -> StageProgress:
    return StageProgress({"count": "B", "merge": "merge"})


def _save(config: TrainTokenizerConfig, vocab: dict[int, bytes], merges: list[tuple[bytes, bytes]]) -> Tokenizer:
    from transformerlm.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer(vocab, merges, config.tokenizer.special_tokens, pattern=config.tokenizer.pattern)
    try:
        tokenizer.save(config.output_dir)
    except OSError as error:  # a write that fails does not say to which file
        raise OSError(error.errno, error.strerror, str(config.output_dir)) from None
    return tokenizer


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
    sample: dict[str, float] = {}
    if config.sample is not None:
        sample = {"sample": config.sample, "documents": stats.documents, "chosen_documents": stats.chosen_documents}
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
            **sample,
        )
        if config.wandb.log_artifacts:
            logger.log_artifact(config.output_dir, name=f"{run_name}-tokenizer", type="tokenizer")
