"""Training a tokenizer: from text files to a vocabulary and its merges. The front door of two steps.

*Counting* (`counting.py`): the text is cut into pre-tokens, and equal ones are counted once. *Learning*
(`pair_table.py`): over and over, the pair of neighbouring tokens that occurs most often becomes one token. `bpe.py` has
the second step in its plain form. Each step also exists as compiled kernels (`fast/counter.py`, `fast/learner.py`) with
the same result; `engines.py` chooses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence, Sized
from pathlib import Path
from typing import Any, TypeVar

from transformerlm.tokenizer import io
from transformerlm.tokenizer.counting import WordList, count_pre_tokens, list_words, sum_counts
from transformerlm.tokenizer.engines import COLD_BYTES, COMPILED_PATTERNS, Engine, check_engine, use_compiled
from transformerlm.tokenizer.pair_table import learn_merges
from transformerlm.tokenizer.parallel import ProgressCallback
from transformerlm.tokenizer.pretokenize import DEFAULT_PATTERN
from transformerlm.tokenizer.reading import DocumentSample
from transformerlm.utils.strings import check_is_no_string
from transformerlm.utils.text_files import ReadStats, expand_inputs, read_ahead
from transformerlm.utils.text_parts import TextPart

Counts = TypeVar("Counts", bound=Sized)

_MAX_NAMED = 8


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
    sample: float | None = None,
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
        sample: train on this fraction of the documents alone, which are chosen by what they say (see
            `reading.DocumentSample`); by default on all text. The first special token ends a document in plain text.
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
    specials = check_request(vocab_size, special_tokens)
    paths = expand_inputs(input_path)
    check_engine(engine, pattern=pattern)
    num_merges = vocab_size - 256 - len(specials)
    options: dict[str, Any] = {
        "num_workers": num_workers, "text_field": text_field, "allow_special": allow_special, "pattern": pattern,
        "progress": progress, "stats": stats, "memory_limit_mb": memory_limit_mb,
        "sample": sample_of(sample, specials),
    }  # fmt: skip
    where = name_inputs(paths, sample)
    read_ahead(paths)
    count, _, learn = _steps(compiled=takes_kernels(engine, _bytes_to_expect(paths), pattern=pattern))
    # The counts have no name here, so that learning may free them once it has laid them out in its own way.
    merges = learn(_not_empty(count(paths, specials, **options), where), num_merges, progress=progress)
    return vocabulary_of(merges, specials), merges


def _steps(*, compiled: bool) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Return an engine's three functions: to count pre-tokens, to add up counts, and to learn merges."""
    if compiled:
        from transformerlm.tokenizer.fast import counter, learner  # hand-over

        return counter.count_pre_tokens, counter.sum_counts, learner.learn_merges
    return count_pre_tokens, sum_counts, learn_merges


def _bytes_to_expect(paths: Sequence[Path]) -> int:
    """Return the bytes of files; a pipe, which does not say its own, counts as large, if not worth compiling for."""
    return sum(path.stat().st_size if path.is_file() else COLD_BYTES - 1 for path in paths)


def takes_kernels(engine: Engine, num_bytes: int, *, pattern: str) -> bool:
    """Return whether the compiled engine counts and learns, for `num_bytes` bytes of text."""
    return pattern in COMPILED_PATTERNS and use_compiled(engine, num_bytes, "train")


def count_words(
    parts: Sequence[TextPart], special_tokens: Sequence[str], *, compiled: bool, **options: Any
) -> WordList:
    """Count the pre-tokens of parts of text, with the options of `count_pre_tokens`."""
    count, _, _ = _steps(compiled=compiled)
    return _as_list(count(parts, special_tokens, **options), compiled=compiled)


def add_word_lists(words: Iterable[WordList], *, compiled: bool) -> WordList:
    """Add up the counts of lists that may hold the same words."""
    _, add, _ = _steps(compiled=compiled)
    return _as_list(add([words]), compiled=compiled)


def _as_list(words: Any, *, compiled: bool) -> WordList:
    return WordList(words.data, words.ends, words.counts) if compiled else list_words(words)


def learn_from_lists(
    groups: Iterable[Iterable[WordList]],
    num_merges: int,
    *,
    compiled: bool,
    where: str,
    memory_limit_mb: float | None = None,
    progress: ProgressCallback | None = None,
) -> list[tuple[bytes, bytes]]:
    """Return the merges for the words of several lists (see `sum_counts`); `where` tells in errors what was counted."""
    _, add, learn = _steps(compiled=compiled)
    merges: list[tuple[bytes, bytes]] = learn(
        _not_empty(add(groups, memory_limit_mb=memory_limit_mb), where), num_merges, progress=progress
    )
    return merges


def vocabulary_of(merges: Sequence[tuple[bytes, bytes]], special_tokens: Sequence[str]) -> dict[int, bytes]:
    """Return the tokens by their ids: the bytes, the merges in order, the special tokens.

    Raises:
        ValueError: merges make a special token, which is plain text in JSON lines and Parquet.
    """
    tokens = [bytes([value]) for value in range(256)] + [left + right for left, right in merges]
    made = {*tokens}
    for special in special_tokens:
        if special.encode() in made:
            raise ValueError(
                f"special_tokens: expected tokens that the text does not make by itself, found {special!r}, which it "
                "has as plain text; name another, or set allow_special = true if it is meant as a special token there"
            )
    tokens += [special.encode() for special in special_tokens]
    return dict(enumerate(tokens))


def sample_of(fraction: float | None, special_tokens: Sequence[str]) -> DocumentSample | None:
    """Return the choice of a fraction of the documents, None for all; the first special token separates them."""
    return None if fraction is None else DocumentSample(fraction, next(iter(special_tokens), None))


def name_inputs(paths: Sequence[Path], sample: float | None) -> str:
    """Return in words what was trained on, for the error that it holds no text."""
    names = ", ".join(map(str, paths[:_MAX_NAMED])) + ", ..." * (len(paths) > _MAX_NAMED)
    return names if sample is None else f"a sample of {sample:g} of the documents of {names}"


def _not_empty(word_counts: Counts, where: str) -> Counts:
    """Return the counts, which are of at least one word."""
    if not len(word_counts):
        raise ValueError(f"input: expected text to train on, found none in {where}")
    return word_counts


def check_request(vocab_size: int, special_tokens: Sequence[str]) -> list[str]:
    """Return the special tokens as a list, or refuse what no tokenizer can have; see `train_bpe`."""
    check_is_no_string(special_tokens, "special_tokens")
    specials = list(special_tokens)
    if len(set(specials)) < len(specials):
        raise ValueError(f"special_tokens: expected each once, found {specials}")
    io.check_special_tokens(specials)
    io.check_special_tokens_to_save(specials)
    if vocab_size < 256 + len(specials):
        raise ValueError(
            f"vocab_size: expected at least {256 + len(specials)} (256 bytes and {len(specials)} "
            f"special tokens), found {vocab_size}"
        )
    return specials
