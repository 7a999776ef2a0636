"""Training a tokenizer: from text files to a vocabulary and its merges. The front door of two steps.

*Counting* (`counting.py`): the text is cut into pre-tokens, and equal ones are counted once. *Learning*
(`pair_table.py`): over and over, the pair of neighbouring tokens that occurs most often becomes one token. `bpe.py` has
the second step in its plain form. Each step also exists as compiled kernels (`fast/counter.py`, `fast/learner.py`) with
the same result; `engines.py` chooses.
"""

from __future__ import annotations

import os
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, TypeVar

from transformerlm.tokenizer import io
from transformerlm.tokenizer.counting import count_pre_tokens
from transformerlm.tokenizer.engines import COMPILED_PATTERNS, Engine, check_engine, use_compiled
from transformerlm.tokenizer.pair_table import learn_merges
from transformerlm.tokenizer.parallel import ProgressCallback
from transformerlm.tokenizer.pretokenize import DEFAULT_PATTERN
from transformerlm.utils.strings import check_is_no_string
from transformerlm.utils.text_files import ReadStats, expand_inputs, total_bytes

Counts = TypeVar("Counts", bound=Sized)


def train_bpe(
    input_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    vocab_size: int,
    special_tokens: Sequence[str],
    *,
    num_workers: int | None = None,
    text_field: str = "text",
    allow_special: bool = False,
    pattern: str = DEFAULT_PATTERN,
    engine: Engine = "auto",
    memory_limit_mb: float | None = None,
    progress: ProgressCallback | None = None,
    stats: ReadStats | None = None,
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Train a byte-level BPE tokenizer on text files and return its vocabulary and its merges in order.

    It has more than ten parameters because it is all of `transformerlm-train-tokenizer` in one call, a key each.

    Args:
        input_path: file, glob, or several of them (see `transformerlm.utils.text_files`).
        vocab_size: tokens in all: the 256 bytes, the merges, the special tokens. A small text may run out of pairs
            first; the vocabulary is then smaller.
        special_tokens: kept whole, never merged with their neighbours and not counted.
        num_workers: processes (threads of the compiled engine) that count; by default one for each CPU, and below
            8 MB only this one. The result does not depend on it.
        text_field: the key of JSON lines, or the column of Parquet, that holds a document's text.
        allow_special: recognise special tokens in the rows of JSON lines and Parquet, too, which are plain text
            otherwise. In plain text files they always are.
        pattern: how text is cut into pre-tokens, a name in `pretokenize.PATTERNS`.
        engine: "reference", "compiled" (same result, needs numba), or "auto": the compiled one for large inputs.
        memory_limit_mb: what counting and merging may hold in memory, in megabytes, not counting the libraries and the
            text in hand. Beyond it the compiled engine goes on in temporary files (see `memory_limit.Memory`), with a
            warning, and the reference refuses.
        progress: called with ("count", bytes read, bytes in all), then with ("merge", merges done, merges wanted).
        stats: filled with what the reading met, such as bytes that are not UTF-8.

    Returns:
        `vocab`: id -> bytes, ids 0..255 the bytes by value, then the merges in order, then the special tokens.
        `merges`: pairs of byte strings.

    Raises:
        TypeError: `special_tokens` is one string.
        ValueError: `vocab_size` below 256 + the special tokens, special tokens that cannot be or be saved, inputs
            without any text, or with distinct words that need more memory than the limit (the reference only).
        OSError: a file that cannot be read, or no room for the temporary files.
    """
    check_is_no_string(special_tokens, "special_tokens")
    specials = list(special_tokens)
    _check_request(vocab_size, specials)
    paths = expand_inputs(input_path)
    check_engine(engine, pattern=pattern)
    num_merges = vocab_size - 256 - len(specials)
    options: dict[str, Any] = {
        "num_workers": num_workers, "text_field": text_field, "allow_special": allow_special, "pattern": pattern,
        "progress": progress, "stats": stats, "memory_limit_mb": memory_limit_mb,
    }  # fmt: skip
    # The counts have no name here, so that learning may free them once it has laid them out in its own way.
    if pattern in COMPILED_PATTERNS and use_compiled(engine, total_bytes(paths), "train"):
        from transformerlm.tokenizer.fast import counter, learner  # hand-over

        merges = learner.learn_merges(
            _not_empty(counter.count_pre_tokens(paths, specials, **options), paths), num_merges, progress=progress
        )
    else:
        merges = learn_merges(
            _not_empty(count_pre_tokens(paths, specials, **options), paths), num_merges, progress=progress
        )
    tokens = [bytes([value]) for value in range(256)] + [left + right for left, right in merges]
    tokens += [special.encode() for special in specials]
    return dict(enumerate(tokens)), merges


def _not_empty(word_counts: Counts, paths: Sequence[Path]) -> Counts:
    """Return the counts, which are of at least one word."""
    if not len(word_counts):
        raise ValueError(f"input: expected text to train on, found none in {', '.join(map(str, paths))}")
    return word_counts


def _check_request(vocab_size: int, special_tokens: Sequence[str]) -> None:
    if len(set(special_tokens)) < len(special_tokens):
        raise ValueError(f"special_tokens: expected each once, found {list(special_tokens)}")
    io.check_special_tokens(special_tokens)
    io.check_special_tokens_to_save(special_tokens)
    if vocab_size < 256 + len(special_tokens):
        raise ValueError(
            f"vocab_size: expected at least {256 + len(special_tokens)} (256 bytes and {len(special_tokens)} "
            f"special tokens), found {vocab_size}"
        )
