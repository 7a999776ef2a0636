"""Counting pre-tokens: the first of the two steps of training, a map over pieces of text.

BPE looks at a word once, however often it occurs: all that learning needs of a text is how often each pre-token occurs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from transformerlm.tokenizer import reading
from transformerlm.tokenizer.memory_limit import REFERENCE_BYTES_PER_SLOT, check_memory_limit
from transformerlm.tokenizer.parallel import ProgressCallback, map_in_order, resolve_num_workers
from transformerlm.tokenizer.pretokenize import DEFAULT_PATTERN, SpecialTokenSplitter, pre_tokenize
from transformerlm.tokenizer.reading import DocumentSample, Texts, as_parts, read_batches
from transformerlm.utils.text_files import ReadStats
from transformerlm.utils.text_parts import TextPart

if TYPE_CHECKING:
    import numpy as np


def count_pre_tokens(
    texts: Sequence[Path | TextPart],
    special_tokens: Sequence[str],
    *,
    num_workers: int | None = None,
    text_field: str = "text",
    allow_special: bool = False,
    pattern: str = DEFAULT_PATTERN,
    progress: ProgressCallback | None = None,
    stats: ReadStats | None = None,
    memory_limit_mb: float | None = None,
    sample: DocumentSample | None = None,
) -> dict[bytes, int]:
    """Return how often each pre-token occurs in the text of files, or of parts of them, special tokens omitted.

    This process reads and cuts (at safe places only), the workers split and count. Memory: about four chunks a worker,
    one run of text without a safe cut where that is longer, and the distinct pre-tokens.

    Raises:
        ValueError: learning from the distinct pre-tokens would need more memory than the limit.
    """
    splitter = SpecialTokenSplitter(special_tokens, pattern=pattern)
    stats = stats if stats is not None else ReadStats()
    parts = as_parts(texts)
    num_bytes = sum(part.num_bytes for part in parts)
    batches = read_batches(
        parts, splitter, size=reading.CHUNK_CHARS, text_field=text_field, allow_special=allow_special, stats=stats,
        sample=sample,
    )  # fmt: skip
    counts: Counter[str] = Counter()
    num_word_bytes = 0  # of the distinct words, with one more for each
    workers = resolve_num_workers(num_workers, num_bytes)
    with closing(map_in_order(BatchCounter(splitter), batches, num_workers=workers)) as results:
        for batch_counts in results:
            if memory_limit_mb is not None:
                new = [word for word in batch_counts if word not in counts]
                num_word_bytes += sum(len(word.encode()) + 1 for word in new)
                num_bytes_to_learn, num_words = REFERENCE_BYTES_PER_SLOT * num_word_bytes, len(counts) + len(new)
                check_memory_limit(memory_limit_mb, num_bytes_to_learn, num_words=num_words)
            counts.update(batch_counts)
            if progress is not None:
                progress("count", stats.disk_bytes, num_bytes)
    return {word.encode(): count for word, count in counts.items()}


class WordList(NamedTuple):
    """Distinct pre-tokens in arrays: their bytes one after the other, where each ends, and how often it occurs.

    `data` is uint8 `(bytes + 8 or more,)`, with zeros after the last word; `ends` is int64 and `counts` uint64,
    `(words,)`.
    """

    data: np.ndarray
    ends: np.ndarray
    counts: np.ndarray


def list_words(counts: Mapping[bytes, int]) -> WordList:
    """Return counts as arrays."""
    import numpy as np

    data = np.frombuffer(b"".join(counts) + bytes(8), dtype=np.uint8)
    ends = np.cumsum([len(word) for word in counts], dtype=np.int64)
    return WordList(data, ends, np.fromiter(counts.values(), dtype=np.uint64, count=len(counts)))


def sum_counts(groups: Iterable[Iterable[WordList]], *, memory_limit_mb: float | None = None) -> dict[bytes, int]:
    """Add up counts; a word may be in several lists of one group, but not in two groups.

    Raises:
        ValueError: learning from the distinct words would need more memory than the limit.
    """
    total: dict[bytes, int] = {}
    for group in groups:
        counts: Counter[bytes] = Counter()
        for words in group:
            start, data = 0, words.data.tobytes()
            for end, count in zip(words.ends.tolist(), words.counts.tolist(), strict=True):
                counts[data[start:end]] += count
                start = end
        total |= counts
        _check_memory(total, memory_limit_mb)
    return total


def _check_memory(counts: Mapping[bytes, int], memory_limit_mb: float | None) -> None:
    if memory_limit_mb is not None:
        num_bytes = REFERENCE_BYTES_PER_SLOT * sum(len(word) + 1 for word in counts)
        check_memory_limit(memory_limit_mb, num_bytes, num_words=len(counts))


class BatchCounter:
    """Counts the pre-tokens of one batch, as an object that can be sent to a worker process."""

    def __init__(self, splitter: SpecialTokenSplitter) -> None:
        self.splitter = splitter

    def __call__(self, batch: Texts) -> dict[str, int]:
        """Return how often each pre-token occurs in the batch."""
        counts: Counter[str] = Counter()
        splitter = self.splitter.without_tokens() if batch.ordinary else self.splitter
        for text in batch.texts:
            for segment, is_special in splitter.split(text):
                if not is_special:
                    counts.update(pre_tokenize(segment, pattern=splitter.pattern))
        return dict(counts)
