"""The kinds of characters that the pre-token patterns tell apart, as a table over all of Unicode.

The table is made from what the `regex` module says of every code point (about 0.1 s, at first use), so that the
compiled scanner and the reference cannot differ in a version of Unicode. It has two levels in one array: its first 8192
entries say for each 256 code points where their kinds begin, and pages that are the same share one block. The whole
takes about 85 kB.

Part of: counter, encoder, piece_kernels, text_kernels
"""

from __future__ import annotations

from functools import cache

import numpy as np
import regex  # type: ignore[import-untyped]

OTHER, LETTER, NUMBER, SPACE = 0, 1, 2, 3

# Four bytes can spell numbers up to 0x1FFFFF, beyond Unicode; in damaged text these are OTHER.
_NUM_CODE_POINTS = 1 << 21
_UNICODE_END = 0x110000
ASCII_KINDS = _NUM_CODE_POINTS // 256  # where the kinds of the first block begin


@cache
def unicode_table() -> np.ndarray:
    """Return the table, uint16 `(entries,)`: the kind of code point c is `table[table[c >> 8] + (c & 255)]`."""
    kind_of = np.zeros(_NUM_CODE_POINTS, dtype=np.uint16)
    everything = np.arange(_UNICODE_END, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    for kind, pattern in ((LETTER, r"\p{L}+"), (NUMBER, r"\p{N}+"), (SPACE, r"\s+")):
        for match in regex.finditer(pattern, everything):
            kind_of[match.start() : match.end()] = kind
    blocks: dict[bytes, int] = {}  # page 0 is met first: the kind of an ASCII byte is table[ASCII_KINDS + byte]
    pages = [ASCII_KINDS + 256 * blocks.setdefault(page.tobytes(), len(blocks)) for page in kind_of.reshape(-1, 256)]
    return np.array([*pages, *np.frombuffer(b"".join(blocks), dtype=np.uint16)], dtype=np.uint16)
