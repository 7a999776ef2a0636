"""Counting pre-tokens: the first of the two steps of training, a map over pieces of text.

BPE looks at a word once, however often it occurs: all that learning needs of a text is how often each pre-token occurs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from transformerlm.tokenizer import reading
from transformerlm.tokenizer.memory_limit import REFERENCE_BYTES_PER_SLOT, check_memory_limit
from transformerlm.tokenizer.parallel import ProgressCallback, map_in_order, resolve_num_workers
from transformerlm.tokenizer.pretokenize import DEFAULT_PATTERN, SpecialTokenSplitter, pre_tokenize
from transformerlm.tokenizer.reading import DocumentSample, Texts, as_parts, read_batches
from transformerlm.utils.text_files import ReadStats
from transformerlm.utils.text_parts import TextPart


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
    workers = resolve_num_workers(num_workers, num_bytes)
    with closing(map_in_order(BatchCounter(splitter), batches, num_workers=workers)) as results:
        for batch_counts in results:
            counts.update(batch_counts)
            if memory_limit_mb is not None:
                num_bytes_to_learn = REFERENCE_BYTES_PER_SLOT * sum(len(word.encode()) + 1 for word in counts)
                check_memory_limit(memory_limit_mb, num_bytes_to_learn, num_words=len(counts))
            if progress is not None:
                progress("count", stats.disk_bytes, num_bytes)
    return {word.encode(): count for word, count in counts.items()}


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
