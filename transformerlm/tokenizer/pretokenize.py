r"""Cutting text before BPE: special tokens out first, then GPT-2's pre-tokens, and where a stream may be cut.

BPE never merges across a pre-token, and pre-tokens never cross a special token. GPT-2's pattern (Radford et al., 2019)
takes, in this order: an English contraction ('s, 'll, ...); letters, digits or other marks, each with at most one
space in front; white space. Its `\s+(?!\S)` leaves the last character of a run of white space to what follows. So "a"
and "b" with three blanks between them make three pre-tokens:

    >>> pre_tokenize("a   b")
    ['a', '  ', ' b']

GPT-4's pattern ("cl100k") does the same with other rules for marks, digits and line ends. Those of Llama 3 and Qwen2
are GPT-4's with a small difference each.

**Where a stream may be cut.** Between two characters a|b such that, whatever comes before and after, the pre-tokens of
the whole are those of the two sides put together. That holds when a is not white space (no look-ahead and no leading
space reaches over the cut), a is not an apostrophe (a contraction might), a and b are of different kinds (letter,
number, white space, other), and no special token, finished or still arriving, has the cut inside it. GPT-4's pattern
and its two relatives join a mark with letters or line ends after it, so with them a cut may follow a mark only before
blanks and numbers.
SmolLM's cuts at both sides of each number, whatever is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import regex  # type: ignore[import-untyped]

from transformerlm.utils.strings import check_is_no_string
from transformerlm.utils.text_files import TextBlock

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# GPT-4's (tiktoken's cl100k_base): contractions in any case, at most three digits, a mark with the word after it.
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
# Llama 3's is GPT-4's without a rule for the white space that ends a text: after a line end, it is a piece of its own.
# Qwen2's takes each digit alone besides.
LLAMA3_PATTERN = CL100K_PATTERN.replace(r"|\s++$", "")
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}+", r"\p{N}")
# SmolLM's (Hugging Face's Digits, then ByteLevel): each number is cut out, then GPT-2's pattern goes over what is
# between. So a number takes no blank, and white space before one is whole, as it is at the end of a text.
SMOLLM_PATTERN = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
PATTERNS = {
    "gpt2": GPT2_PATTERN,
    "cl100k": CL100K_PATTERN,
    "llama3": LLAMA3_PATTERN,
    "qwen2": QWEN2_PATTERN,
    "smollm": SMOLLM_PATTERN,
}
DEFAULT_PATTERN = "gpt2"

# A run without a cut is held in memory, and a few kB of .gz can hold gigabytes of one letter.
MAX_UNCUT_CHARS = 1 << 24

# (?r) searches from the end: the last cut is wanted, and it is nearly always close by.
_GPT4_CUT = r"(?r)\p{L}(?=\P{L})|\p{N}(?=\P{N})|[^\s\p{L}\p{N}'](?=[^\S\r\n]|\p{N})"
_CUT_PATTERNS = {
    "gpt2": r"(?r)\p{L}(?=\P{L})|\p{N}(?=\P{N})|[^\s\p{L}\p{N}'](?=[\s\p{L}\p{N}])",
    "cl100k": _GPT4_CUT,
    "llama3": _GPT4_CUT,
    "qwen2": _GPT4_CUT,
    "smollm": r"(?r)\p{L}(?=\P{L})|\p{N}(?=[\s\S])|[^\p{N}](?=\p{N})|[^\s\p{L}\p{N}'](?=[\s\p{L}])",
}


@cache
def _compiled(pattern: str) -> Any:
    return regex.compile(pattern)


def pre_tokenize(text: str, *, pattern: str = DEFAULT_PATTERN) -> list[str]:
    """Split text that holds no special token into the pre-tokens of a named pattern; joined they are the text again."""
    pieces: list[str] = _compiled(PATTERNS[pattern]).findall(text)
    return pieces


@cache
def code_points(kind: str) -> tuple[tuple[int, int], ...]:
    r"""Return the code points of a kind of characters, such as `\p{L}`: the first and the last of each range."""
    characters = "".join(map(chr, range(0x110000)))
    spans = (match.span() for match in _compiled(f"(?:{kind})+").finditer(characters))
    return tuple((start, end - 1) for start, end in spans)


def check_pattern(pattern: str) -> None:
    """Refuse a name that is no pattern's."""
    if pattern not in PATTERNS:
        raise ValueError(f"pattern: expected one of {', '.join(PATTERNS)}, found {pattern!r}")


class SpecialTokenSplitter:
    """Finds special tokens in text: from the left, the longest first where several begin at one place."""

    def __init__(self, special_tokens: Iterable[str], *, pattern: str = DEFAULT_PATTERN) -> None:
        """Prepare for these tokens; `pattern` is the pre-tokens' and decides where a stream may be cut.

        Raises:
            TypeError: one string instead of a list.
            ValueError: an empty token, or one that UTF-8 cannot spell.
        """
        check_is_no_string(special_tokens, "special_tokens")
        check_pattern(pattern)
        self.pattern = pattern
        self.special_tokens = list(dict.fromkeys(special_tokens))
        for token in self.special_tokens:
            _check_special_token(token)
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._longest = len(longest_first[0]) if longest_first else 0
        self._pattern = regex.compile("|".join(map(regex.escape, longest_first))) if longest_first else None

    def __reduce__(self) -> tuple[Callable[..., SpecialTokenSplitter], tuple[list[str]]]:
        """Pickle as the tokens and a name: compiled patterns need not travel to worker processes."""
        return partial(SpecialTokenSplitter, pattern=self.pattern), (self.special_tokens,)

    @property
    def needs_text(self) -> bool:
        """Whether bytes do not show where special tokens are: U+FFFD, which one holds, is read for invalid bytes."""
        return any("\ufffd" in token for token in self.special_tokens)

    def without_tokens(self) -> SpecialTokenSplitter:
        """Return a splitter of the same pattern that knows no special tokens, for plain text."""
        return SpecialTokenSplitter((), pattern=self.pattern)

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yield the non-empty segments of `text` in order, each with whether it is a special token."""
        end = 0
        for start, stop in self.find(text):
            if start > end:
                yield text[end:start], False
            yield text[start:stop], True
            end = stop
        if end < len(text):
            yield text[end:], False

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield start and end of each special token in `text`."""
        if self._pattern is not None:
            for match in self._pattern.finditer(text):
                yield match.span()

    def safe_cut(self, text: str, *, looked_through: int = 0) -> int:
        """Return the last place where `text`, the beginning of a stream, may be cut; 0 when there is none.

        The first `looked_through` characters were the whole text once, and had no cut.
        """
        limit = self._start_of_unfinished(text)
        first = max(0, looked_through - self._longest - 1)  # only a special token that was unfinished can have changed
        for match in _compiled(_CUT_PATTERNS[self.pattern]).finditer(text, first, min(limit + 1, len(text))):
            if not self._is_inside(text, match.end()):
                return int(match.end())
        # Nothing but special tokens, or one long pre-token and special tokens: a special token's start is a cut as
        # well.
        for start, _ in reversed(list(self.find(text))):
            if start <= limit and not self._is_inside(text, start):
                return start
        return 0

    def _start_of_unfinished(self, text: str) -> int:
        """Return where a special token may have begun whose end is still to come; the text's length if none has."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            tail = text[start:]
            if any(len(token) > len(tail) and token.startswith(tail) for token in self.special_tokens):
                return start
        return len(text)

    def _is_inside(self, text: str, cut: int) -> bool:
        """Return whether an occurrence of a special token, overlapping ones too, begins before `cut` and ends after."""
        return any(
            text.find(token, max(0, cut - len(token) + 1), cut + len(token) - 1) >= 0 for token in self.special_tokens
        )


class StreamCutter:
    """Takes text in any parts and gives it back in stretches that may be split and encoded one by one.

    Holds back only what the next part could still change. The first stretches are short, so that nobody waits
    for a slow stream; later ones have about `size` characters. Memory: `size`, or the longest run without a cut (one
    pre-token), whichever is more. `where` begins the error of a run that is longer than `MAX_UNCUT_CHARS`.
    """

    def __init__(
        self, splitter: SpecialTokenSplitter, *, size: int = 1 << 15, first_size: int = 64, where: str = "text"
    ) -> None:
        self._splitter = splitter
        self._where = where
        self._size = size
        self._parts: list[str] = []
        self._length = self._looked_through = 0
        self._wanted = min(first_size, size)

    def feed(self, part: str) -> str:
        """Take the next part; return the text that is now settled, often none.

        Raises:
            ValueError: a run without a cut that is too long to be text.
        """
        self._parts.append(part)
        self._length += len(part)
        if self._length < self._wanted:
            return ""
        buffer = "".join(self._parts)
        cut = self._splitter.safe_cut(buffer, looked_through=self._looked_through)
        check_runs(buffer, cut, self._splitter, where=self._where)
        self._parts = [buffer[cut:]]
        self._length = self._looked_through = len(buffer) - cut
        # Twice as much as is held back: a run without a cut is then looked through O(log n) times, not once a part.
        wanted = max(min(2 * self._wanted, self._size), 2 * self._length)
        self._wanted = min(wanted, MAX_UNCUT_CHARS + 1)
        return buffer[:cut]

    def flush(self) -> str:
        """Return what was held back; the stream, or the document, has ended."""
        rest = "".join(self._parts)
        self._parts, self._length, self._looked_through = [], 0, 0
        self._wanted = min(self._wanted, self._size)
        return rest


def check_runs(text: str, cut: int, splitter: SpecialTokenSplitter, *, where: str) -> None:
    """Refuse a run without a cut that is too long to be text, at the beginning of `text` or after its last cut.

    A run is refused however much of what comes after it was read with it.

    Raises:
        ValueError: a run is longer than `MAX_UNCUT_CHARS`; `where` begins the error.
    """
    if len(text) <= MAX_UNCUT_CHARS:
        return
    start = cut if splitter.safe_cut(text[: MAX_UNCUT_CHARS + 1]) else 0
    if start and len(text) - start <= MAX_UNCUT_CHARS:
        return
    run = text[start : start + MAX_UNCUT_CHARS + 1]
    if run.isspace():
        raise ValueError(
            f"{where}: expected at most {MAX_UNCUT_CHARS:,} characters of white space in a row, found more (omit some)"
        )
    raise ValueError(
        f"{where}: expected words of at most {MAX_UNCUT_CHARS:,} characters, found a longer run without "
        f"a blank that begins with {run[:20]!r} (split it into lines)"
    )


def safe_pieces(
    blocks: Iterable[TextBlock], splitter: SpecialTokenSplitter, *, size: int, where: str = "text"
) -> Iterator[TextBlock]:
    """Cut blocks of text again, at safe places only: into pieces of about `size` characters, or to a document's end.

    Raises:
        ValueError: a run without a cut that is too long to be text (see `MAX_UNCUT_CHARS`); `where` begins the error.
    """
    cutter = StreamCutter(splitter, size=size, first_size=size, where=where)
    for block in blocks:
        text = cutter.feed(block.text)
        if block.ends_document:
            text += cutter.flush()
        if text or block.ends_document:
            yield TextBlock(text, block.ends_document)


def _check_special_token(token: str) -> None:
    if not token:
        raise ValueError("special_tokens: expected non-empty strings, found an empty one")
    try:
        token.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"special_tokens: expected text that UTF-8 can spell, found {token!r}") from error
