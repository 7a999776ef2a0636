"""The reference engine: text to ids and back in Python, word by word.

`encode` cuts the text at special tokens, cuts what is between them into pre-tokens (`pretokenize.py`), and merges each
pre-token's bytes (`bpe_merge.py`). Texts repeat their words, so the ids of pre-tokens are kept in a cache of bounded
size. `fast/engine.py` does the same with compiled kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING

from transformerlm.tokenizer.bpe_merge import Pair, merge_by_rank, merge_by_windows
from transformerlm.tokenizer.parallel import map_in_order
from transformerlm.tokenizer.pretokenize import SpecialTokenSplitter, pre_tokenize
from transformerlm.utils.strings import whole_characters

if TYPE_CHECKING:
    import numpy as np

CACHE_PIECES = 1 << 15
_CACHED_PIECE_CHARS = 32
_SHORT_PIECE_BYTES = 32
_NO_IDS = (bool, float)  # a dict finds them equal to ids; a mask is one from its first value on, so one look will do


@dataclass(frozen=True)
class Vocabulary:
    """What an engine needs to know of a tokenizer: its tokens, merges and special tokens by their ids.

    `ranks` is pair of ids -> place in the list of merges, `merged[rank]` the id which that merge makes. A pre-token
    that is one of `whole_tokens` is that token, whatever merges would make of it (tiktoken's rule, and Llama 3's).
    """

    tokens: Mapping[int, bytes]
    ranks: Mapping[Pair, int]
    merged: Sequence[int]
    special_token_ids: Mapping[str, int]
    pattern: str
    whole_tokens: Mapping[bytes, int] = field(default_factory=dict)

    @cached_property
    def byte_ids(self) -> list[int]:
        """The id of each single byte."""
        ids = {token: token_id for token_id, token in self.tokens.items() if len(token) == 1}
        return [ids[bytes([value])] for value in range(256)]

    @cached_property
    def sizes(self) -> list[int]:
        """The number of bytes of each id."""
        return [len(self.tokens[token_id]) for token_id in range(len(self.tokens))]

    @property
    def id_type(self) -> type[np.uint16] | type[np.uint32]:
        """uint16 where all ids fit, uint32 otherwise."""
        import numpy as np

        return np.uint16 if len(self.tokens) <= 1 << 16 else np.uint32


class ReferenceEngine:
    """Encodes and decodes in Python; see `engines.EncodingEngine` for what each method promises."""

    takes_bytes = False

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._splitter = SpecialTokenSplitter(vocabulary.special_token_ids, pattern=vocabulary.pattern)
        self.cache = _PieceCache(self)

    def __reduce__(self) -> tuple[type[ReferenceEngine], tuple[Vocabulary]]:
        """Pickle as the vocabulary; the cache stays here."""
        return ReferenceEngine, (self._vocabulary,)

    def encode(self, text: str, *, allow_special: bool) -> list[int]:
        """Return the ids of one text."""
        text = whole_characters(text)
        if not allow_special:
            return self._encode_segment(text)
        ids: list[int] = []
        for segment, is_special in self._splitter.split(text):
            if is_special:
                ids.append(self._vocabulary.special_token_ids[segment])
            else:
                ids += self._encode_segment(segment)
        return ids

    def encode_batch(self, texts: Sequence[str], *, num_workers: int, allow_special: bool) -> list[list[int]]:
        """Return the ids of each text, encoded by `num_workers` processes."""
        size = max(1, min(256, len(texts) // (4 * num_workers) or 1))
        groups = [texts[start : start + size] for start in range(0, len(texts), size)]
        encode = partial(self._encode_all, allow_special=allow_special)
        with closing(map_in_order(encode, groups, num_workers=num_workers)) as results:
            return list(chain.from_iterable(results))

    def encode_batch_to_array(
        self, texts: Sequence[str], *, num_workers: int, allow_special: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts in one array, and where those of each text end."""
        import numpy as np

        lists = self.encode_batch(texts, num_workers=num_workers, allow_special=allow_special)
        ends = np.cumsum([len(ids) for ids in lists], dtype=np.int64)
        return np.array(list(chain.from_iterable(lists)), dtype=self._vocabulary.id_type), ends

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of the ids."""
        return join_tokens(ids, self._vocabulary.tokens)

    def encode_piece(self, piece: str) -> list[int]:
        """Return the ids of one pre-token, without the cache."""
        known, data = self._vocabulary, piece.encode()
        if (whole := known.whole_tokens.get(data)) is not None:
            return [whole]
        ids = [known.byte_ids[value] for value in data]
        if len(ids) <= _SHORT_PIECE_BYTES:
            return merge_by_rank(ids, known.ranks, known.merged)
        return merge_by_windows(ids, known.ranks, known.merged, known.sizes)

    def _encode_segment(self, text: str) -> list[int]:
        pieces = pre_tokenize(text, pattern=self._vocabulary.pattern)
        return list(chain.from_iterable(map(self.cache.__getitem__, pieces)))

    def _encode_all(self, texts: Sequence[str], *, allow_special: bool) -> list[list[int]]:
        return [self.encode(text, allow_special=allow_special) for text in texts]


class _PieceCache(dict[str, tuple[int, ...]]):
    """Pre-token -> ids, computed when first asked for; emptied when full, so that it follows the text it meets."""

    def __init__(self, engine: ReferenceEngine) -> None:
        self._engine = engine

    def __missing__(self, piece: str) -> tuple[int, ...]:
        ids = tuple(self._engine.encode_piece(piece))
        if len(piece) <= _CACHED_PIECE_CHARS:
            if len(self) >= CACHE_PIECES:
                self.clear()
            self[piece] = ids
        return ids


def join_tokens(ids: Iterable[int], tokens: Mapping[int, bytes]) -> bytes:
    """Return the bytes of the ids.

    Raises:
        KeyError: an id that is not in the vocabulary.
        TypeError: truth values or fractions, which Python's dictionaries would take for ids, or what is no number.
    """
    plain = ids.tolist() if hasattr(ids, "tolist") else ids
    if type(plain) is list and plain and type(plain[0]) in _NO_IDS:
        raise TypeError(f"{type(plain[0]).__name__} {plain[0]}")
    return b"".join(map(tokens.__getitem__, plain))
