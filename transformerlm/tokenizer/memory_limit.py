"""The cap on the memory of training, and the refusal where a text's distinct words need more.

Learning merges looks at all distinct words together, whatever their number, so these are what training has to hold;
how much memory a byte of them takes depends on the engine. What is held for a while only (text, counts that are not
added up yet) gives way to the cap; see `PieceCounter`. Nothing would be won by keeping counts on disk: they would have
to come back to be learned from, and learning takes more memory for a word than counting it.
"""

from __future__ import annotations

import math

# For each byte of the distinct words, with one more for the end of each word.
COMPILED_BYTES_PER_SLOT = 20
REFERENCE_BYTES_PER_SLOT = 140


def check_memory_limit(memory_limit_mb: float | None, num_bytes: float, *, num_words: int) -> None:
    """Refuse words that need more memory than the limit.

    Raises:
        ValueError: they do.
    """
    if memory_limit_mb is not None and num_bytes > memory_limit_mb * 1e6:
        raise ValueError(
            f"memory_limit_mb: expected at least {math.ceil(num_bytes / 1e6)} for the {num_words:,} distinct words of "
            f"the text so far, found {memory_limit_mb:g} (raise it, leave it out, or train on less text)"
        )
