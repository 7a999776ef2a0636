"""From ids to text, piece by piece: whole characters only, and nothing that a stop string may still take back.

A token may end within a character, so its last bytes wait for the next token. A stop string ends the text before it, so
what may be its beginning waits too. `Pieces` does both, with the same work for each token however long the text is.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence


class Pieces:
    """The text of ids as they come.

    Args:
        to_bytes: the bytes of ids, as `Tokenizer.decode_bytes`.
        stop: strings of which the first to appear ends the text before it; the longest of several that end together.

    Raises:
        ValueError: a stop string is empty.
    """

    def __init__(self, to_bytes: Callable[[list[int]], bytes], *, stop: Sequence[str] = ()) -> None:
        self._to_bytes = to_bytes
        # A token may end within a character; its bytes wait for the rest, and become U+FFFD when none comes.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._matchers = [_Matcher(each) for each in stop]
        self._held = ""
        self.stopped_by: str | None = None
        """The stop string that ended the text."""

    def push(self, token_id: int) -> str:
        """Return the text that is certain after one more id, often ""; once a stop string came, nothing more."""
        return self._certain(self._decoder.decode(self._to_bytes([token_id])))

    def finish(self) -> str:
        """Return the rest, when no more ids come."""
        text = self._certain(self._decoder.decode(b"", final=True))
        if self.stopped_by is None:
            text, self._held = text + self._held, ""
        return text

    def _certain(self, new: str) -> str:
        if self.stopped_by is not None:
            return ""
        if not self._matchers:
            return new
        text = self._held + new
        for index, character in enumerate(new, len(self._held) + 1):
            found = [matcher.string for matcher in self._matchers if matcher.advance(character)]
            if found:
                self.stopped_by, self._held = max(found, key=len), ""
                return text[: index - len(self.stopped_by)]
        certain = len(text) - max(matcher.matched for matcher in self._matchers)
        self._held = text[certain:]
        return text[:certain]


class _Matcher:
    """How much of the beginning of `string` the text ends with, after each character (Knuth, Morris and Pratt 1977)."""

    def __init__(self, string: str) -> None:
        if not string:
            raise ValueError("texts: expected stop strings with at least one character, found an empty one")
        self.string, self.matched = string, 0
        # falls[n]: the longest beginning that the first n characters end with, other than themselves.
        self._falls = [0, 0]
        for character in string[1:]:
            self._falls.append(self._longer(self._falls[-1], character))

    def advance(self, character: str) -> bool:
        """Take the text's next character; return whether the text ends with the whole string now."""
        self.matched = self._longer(self.matched, character)
        return self.matched == len(self.string)

    def _longer(self, matched: int, character: str) -> int:
        while matched and self.string[matched] != character:
            matched = self._falls[matched]
        return matched + 1 if self.string[matched] == character else 0


def pieces_of(ids: Iterable[int], pieces: Pieces) -> Iterator[str]:
    """Yield the text of ids in pieces that are not empty; ends at a stop string, without asking for further ids."""
    for token_id in ids:
        if text := pieces.push(token_id):
            yield text
        if pieces.stopped_by is not None:
            return
    if text := pieces.finish():
        yield text
