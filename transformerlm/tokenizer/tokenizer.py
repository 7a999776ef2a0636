"""The tokenizer: text to ids and back.

`encode` cuts the text at special tokens, cuts what lies between into pre-tokens (`pretokenize.py`), and merges each
pre-token's bytes (`bpe_merge.py`). Texts repeat their words, so the ids of pre-tokens are kept in a cache of bounded
size. Any `str` can be encoded: nothing is normalised and no token is unknown, as all 256 bytes are tokens. Knows no
files (`io.py` does), no torch, no config; numpy only where an array is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import warnings
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from transformerlm.tokenizer import io
from transformerlm.tokenizer.bpe_merge import merge_by_windows
from transformerlm.tokenizer.engines import COMPILED_PATTERNS, Engine, check_engine, use_compiled
from transformerlm.tokenizer.parallel import map_in_order, resolve_num_workers
from transformerlm.tokenizer.pretokenize import (
    DEFAULT_PATTERN,
    SpecialTokenSplitter,
    StreamCutter,
    pre_tokenize,
    safe_pieces,
)
from transformerlm.utils.files import write_whole
from transformerlm.utils.strings import check_are_strings, check_is_string, ends_in_half, whole_characters
from transformerlm.utils.text_files import expand_inputs, holds_rows, is_plain_text, read_text, total_bytes

if TYPE_CHECKING:
    import numpy as np

    from transformerlm.tokenizer.fast.byte_chunks import Chunk
    from transformerlm.tokenizer.fast.encoder import CompiledDecoder, CompiledEncoder

_CACHE_PIECES = 1 << 15
_CACHED_PIECE_CHARS = 32
_FILE_PIECE_CHARS = 1 << 22
_WHOLE_FILE_BYTES = 1 << 28
# What the reference encodes, or decodes to ids, in the time that entering a kernel takes.
_CALL_CHARS, _CALL_IDS = 1000, 100
_NO_IDS = (bool, float)  # a dict finds them equal to ids; a mask is one from its first value on, so one look will do


class Tokenizer:
    """A byte-level BPE tokenizer: a vocabulary, merges in order, and special tokens."""

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        merges: Sequence[tuple[bytes, bytes]],
        special_tokens: Sequence[str] | None = None,
        *,
        pattern: str = DEFAULT_PATTERN,
        engine: Engine = "auto",
    ) -> None:
        """Build from parts as `train_bpe` returns them; a special token that is not in `vocab` gets the next id.

        Args:
            vocab: id -> bytes.
            merges: pairs of byte strings in the order they were learned.
            special_tokens: kept whole by `encode`.
            pattern: how text is cut into pre-tokens, a name in `pretokenize.PATTERNS`.
            engine: "reference", "compiled" (same ids, needs numba), or "auto": the compiled one for large inputs,
                where it knows the pattern.

        Raises:
            TypeError: `special_tokens` is one string.
            ValueError: ids that are not 0..n-1, a missing byte, merges of unknown tokens (see `io.check_vocab`,
                `io.check_merges`), or a special token of one byte.
        """
        io.check_special_tokens(special_tokens or ())
        io.check_vocab(vocab)
        io.check_merges(merges, vocab)
        self.vocab = dict(vocab)
        self.merges = list(merges)
        check_engine(engine, pattern=pattern)
        self.pattern = pattern
        self.engine = engine
        self._splitter = SpecialTokenSplitter(special_tokens or (), pattern=pattern)
        ids = {token: token_id for token_id, token in self.vocab.items()}
        self.special_token_ids: dict[str, int] = {}
        for special in self._splitter.special_tokens:
            token_id = ids.setdefault(special.encode(), len(ids))
            self.vocab[token_id] = special.encode()
            self.special_token_ids[special] = token_id
        self._byte_ids = [ids[bytes([value])] for value in range(256)]
        self._ranks = {(ids[left], ids[right]): rank for rank, (left, right) in enumerate(self.merges)}
        self._merged = [ids[left + right] for left, right in self.merges]
        self._sizes = [len(self.vocab[token_id]) for token_id in range(len(self.vocab))]
        self._cache = _PieceCache(self)
        self._lock = threading.Lock()
        self._encoder: CompiledEncoder | None = None
        self._decoder: CompiledDecoder | None = None
        self._numbers: np.ndarray | None = None
        self._fingerprint: str | None = None

    @classmethod
    def from_files(
        cls,
        vocab_filepath: str | os.PathLike[str],
        merges_filepath: str | os.PathLike[str],
        special_tokens: Sequence[str] | None = None,
        *,
        pattern: str = DEFAULT_PATTERN,
        engine: Engine = "auto",
    ) -> Tokenizer:
        """Load a `vocab.json` and a `merges.txt`, such as GPT-2's own.

        Raises:
            FileNotFoundError: a file that is not there.
            ValueError: a file that is not in order; the message says where and what.
        """
        vocab = io.load_vocab(Path(vocab_filepath), special_tokens or ())
        merges = io.load_merges(Path(merges_filepath), vocab)
        return cls(vocab, merges, special_tokens, pattern=pattern, engine=engine)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str], *, engine: Engine = "auto") -> Tokenizer:
        """Load what `save` has written, or GPT-2's files whose names begin with `directory` and a dash.

        Those are such as `gpt2-vocab.json` and `gpt2-merges.txt`, for "gpt2". Where no `gpt2-special_tokens.json` is
        beside them, tokens like `<|endoftext|>` are taken for special, and the pattern for GPT-2's, with a warning.

        Raises:
            FileNotFoundError: a file that is not there.
            ValueError: a file that is not in order; the message says where and what.
        """
        vocab, merges, specials = io.tokenizer_files(Path(directory))
        if specials.exists() or specials.name == io.SPECIALS_FILE:
            special_tokens, pattern, sha256 = io.load_special_tokens(specials)
        else:
            special_tokens, pattern, sha256 = io.special_names(vocab), DEFAULT_PATTERN, None
            names = ", ".join(special_tokens) or "none"
            warnings.warn(
                f"{specials}: no such file, so the special tokens are taken to be {names}, and the pattern "
                f"{DEFAULT_PATTERN} (transformerlm-import --format gpt2 writes a tokenizer that says it)",
                stacklevel=2,
            )
        tokenizer = cls.from_files(vocab, merges, special_tokens, pattern=pattern, engine=engine)
        expected = tokenizer.vocab_size - 256 - len(special_tokens)  # the bytes are 256 tokens
        if len(tokenizer.merges) < expected:
            raise ValueError(
                f"{merges}: expected a merge for each of the {expected} merged tokens of {io.VOCAB_FILE}, "
                f"found {len(tokenizer.merges)}; the file was cut, train or copy the tokenizer again"
            )
        if sha256 is not None and (found := tokenizer.fingerprint()) != sha256:
            raise ValueError(
                f"{directory}: expected the tokenizer {sha256[:12]}... that {io.SPECIALS_FILE} names, found "
                f"{found[:12]}...: a file has changed, train or copy the tokenizer again"
            )
        return tokenizer

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write vocab.json, merges.txt and special_tokens.json, each whole; the same tokenizer gives the same bytes."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        io.save_vocab(self.vocab, directory / io.VOCAB_FILE, self.special_tokens)
        io.save_merges(self.merges, directory / io.MERGES_FILE)
        record = {
            "format": 1,
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "sha256": self.fingerprint(),
        }
        write_whole(directory / io.SPECIALS_FILE, json.dumps(record, ensure_ascii=False, indent=2) + "\n")

    def __repr__(self) -> str:
        """Return the tokenizer's sizes."""
        return (
            f"Tokenizer(vocab_size={self.vocab_size}, merges={len(self.merges)}, "
            f"special_tokens={len(self.special_token_ids)}, pattern={self.pattern!r}, engine={self.engine!r})"
        )

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[object, ...]]:
        """Pickle as the parts; caches stay here."""
        build = partial(Tokenizer, pattern=self.pattern, engine=self.engine)
        return build, (self.vocab, self.merges, self.special_tokens)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self.vocab)

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens in the order they were given."""
        return list(self.special_token_ids)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, special tokens recognised; half a character (a lone surrogate) counts as U+FFFD."""
        text = whole_characters(text)
        if (encoder := self._encoder_for(len(text), least=_CALL_CHARS)) is not None:
            return list(encoder.encode_texts([text.encode()])[0].tolist())
        ids: list[int] = []
        for segment, is_special in self._splitter.split(text):
            if is_special:
                ids.append(self.special_token_ids[segment])
            else:
                ids += self._encode_segment(segment)
        return ids

    def encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of `text` taken as plain text, special tokens spelled out: for text of unknown origin."""
        text = whole_characters(text)
        if (encoder := self._encoder_for(len(text), least=_CALL_CHARS)) is not None:
            return list(encoder.encode_texts([text.encode()], ordinary=True)[0].tolist())
        return self._encode_segment(text)

    def encode_iterable(self, parts: Iterable[str]) -> Iterator[int]:
        """Yield the ids of the parts' joined text, however it is cut, while holding only a little of it.

        Memory: some tens of thousands of characters, or the longest pre-token where that is longer.
        """
        cutter = StreamCutter(self._splitter)
        half = ""
        for part in parts:
            check_is_string(part, "parts")
            text, half = half + part, ""
            if ends_in_half(text):
                text, half = text[:-1], text[-1]
            if settled := cutter.feed(whole_characters(text)):
                yield from self.encode(settled)
        yield from self.encode(cutter.flush() + whole_characters(half))

    def encode_batch(
        self, texts: Sequence[str], num_workers: int = 1, *, allow_special: bool = True
    ) -> list[list[int]]:
        """Return the ids of each text, encoded by `num_workers` processes or threads, as the engine has them.

        Without `allow_special`, special tokens are spelled out, as by `encode_ordinary`.
        """
        check_are_strings(texts, "texts")
        size = sum(map(len, texts))
        num_workers = resolve_num_workers(num_workers, size)
        if self._encoder_for(size) is not None:
            ids, ends = self.encode_batch_to_array(texts, num_workers=num_workers, allow_special=allow_special)
            # Numbers that are made once and then shared: a list of new ones takes far longer to build.
            numbers = self._shared_numbers()[ids]
            starts = [0, *ends[:-1].tolist()]
            return [numbers[start:stop].tolist() for start, stop in zip(starts, ends.tolist(), strict=False)]
        size = max(1, min(256, len(texts) // (4 * num_workers) or 1))
        groups = [texts[start : start + size] for start in range(0, len(texts), size)]
        encode = partial(self._encode_all, allow_special=allow_special)
        with closing(map_in_order(encode, groups, num_workers=num_workers)) as results:
            return list(chain.from_iterable(results))

    def encode_batch_to_array(
        self, texts: Sequence[str], *, num_workers: int = 1, allow_special: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts in one array, and where those of each text end.

        Ids are uint16 where all fit and uint32 otherwise, shape (tokens,); ends are int64, shape (texts,).
        """
        import numpy as np

        check_are_strings(texts, "texts")
        num_workers = resolve_num_workers(num_workers, 0)
        if (encoder := self._encoder_for(sum(map(len, texts)))) is not None:
            spelled = [whole_characters(text).encode() for text in texts]
            return encoder.encode_texts(spelled, num_threads=num_workers, ordinary=not allow_special)
        lists = self.encode_batch(texts, num_workers, allow_special=allow_special)
        ends = np.cumsum([len(ids) for ids in lists], dtype=np.int64)
        return np.array(list(chain.from_iterable(lists)), dtype=self._id_type()), ends

    def encode_chunk(self, chunk: Chunk) -> tuple[np.ndarray, int]:
        """Return the ids of UTF-8 text that is no Python string, and how many U+FFFD stand for bytes that are none.

        For the compiled engine (see `runs_in_threads`), which loads `byte_chunks.Chunk`.
        """
        from transformerlm.tokenizer.fast.byte_chunks import made_valid

        encoder = self._encoder_for(sys.maxsize)
        assert encoder is not None, "chunks are for the compiled engine"
        chunk, replaced = made_valid(chunk)
        return encoder.encode_array(chunk.data, chunk.ends, ordinary=chunk.ordinary), replaced

    def encode_to_array(self, text: str, *, num_workers: int = 1) -> np.ndarray:
        """Return the ids of `text` as a numpy array, uint16 where all ids fit and uint32 otherwise; shape (tokens,)."""
        return self.encode_batch_to_array([text], num_workers=num_workers)[0]

    def encode_file(
        self, path: str | os.PathLike[str], *, num_workers: int | None = None, allow_special: bool = False
    ) -> np.ndarray:
        """Return the ids of a file's text as an array, as `encode` gives them.

        A row of JSON lines or Parquet counts by itself, and is plain text unless `allow_special` is given. Memory: the
        ids, and the text of files up to 256 MB, beyond some 8 MB of it a worker (or the longest pre-token).

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is no text (see `transformerlm.utils.text_files`), or a name that means several.
        """
        import numpy as np

        paths = expand_inputs(path)
        if len(paths) > 1:
            raise ValueError(f"expected one file, found {len(paths):,} at {os.fspath(path)}")
        size = total_bytes(paths)
        workers = resolve_num_workers(num_workers, size)
        if size <= _WHOLE_FILE_BYTES and is_plain_text(paths[0]) and (encoder := self._encoder_for(size)) is not None:
            ids = encoder.encode_file(paths[0], num_threads=workers)
            if ids is not None:
                return ids
        allow_special = allow_special or not holds_rows(paths[0])
        splitter = self._splitter if allow_special else self._splitter.without_tokens()
        pieces = safe_pieces(read_text(paths[0]), splitter, size=_FILE_PIECE_CHARS, where=str(paths[0]))
        texts = ([piece.text] for piece in pieces)
        threads = self.runs_in_threads(size)
        encode = partial(self.encode_batch_to_array, allow_special=allow_special)
        with closing(map_in_order(encode, texts, num_workers=workers, threads=threads)) as results:
            parts = [ids for ids, _ in results]
        return np.concatenate([np.empty(0, dtype=self._id_type()), *parts])

    def runs_in_threads(self, num_bytes: int) -> bool:
        """Tell whether a work of so many bytes is done by the compiled engine, which threads may share, and load it.

        The reference engine holds the GIL: to share its work takes processes.
        """
        return self._encoder_for(num_bytes) is not None

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: an id that is not in the vocabulary.
        """
        return str(self._decoded(ids), "utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of the ids as they are, for streams that may end within a character.

        Raises:
            ValueError: an id that is not in the vocabulary.
        """
        return bytes(self._decoded(ids))

    def _decoded(self, ids: Iterable[int]) -> bytes | memoryview:
        if len(shape := getattr(ids, "shape", (0,))) != 1:
            raise ValueError(
                f"ids: expected one row of ids, found an array of shape {tuple(shape)} (decode row by row)"
            )
        try:
            if isinstance(ids, Collection) and (decoder := self._decoder_for(len(ids))) is not None:
                numbers = _as_array(ids)
                if numbers is not None and numbers.ndim == 1 and numbers.dtype.kind in "iu":
                    return decoder.decode(numbers)
            plain = ids.tolist() if hasattr(ids, "tolist") else ids
            if type(plain) is list and plain and type(plain[0]) in _NO_IDS:
                raise TypeError(f"{type(plain[0]).__name__} {plain[0]}")
            return b"".join(map(self.vocab.__getitem__, plain))
        except KeyError as error:
            raise ValueError(
                f"ids: expected 0 to {self.vocab_size - 1} (vocab_size {self.vocab_size}), found {error.args[0]}"
            ) from None
        except TypeError as error:  # a list of lists
            raise TypeError(f"ids: expected whole numbers in one row, found other things ({error})") from None

    def token_byte_lengths(self) -> list[int]:
        """Return how many bytes of text each id stands for, by id; special tokens stand for none."""
        specials = set(self.special_token_ids.values())
        return [0 if token_id in specials else len(self.vocab[token_id]) for token_id in range(self.vocab_size)]

    def bytes_per_token(self, text: str) -> float:
        """Return how many UTF-8 bytes of `text` one token holds on average.

        Raises:
            ValueError: an empty text.
        """
        if not text:
            raise ValueError("bytes_per_token: expected some text, found an empty one")
        return len(whole_characters(text).encode()) / len(self.encode(text))

    def fingerprint(self) -> str:
        """Return a sha256 in hex over vocabulary, merges, special tokens and pattern, not over the files' layout."""
        if self._fingerprint is None:
            tokens = [self.vocab[token_id].hex() for token_id in range(self.vocab_size)]
            merges = [[left.hex(), right.hex()] for left, right in self.merges]
            specials = sorted(self.special_token_ids.items(), key=lambda item: item[1])
            record = {"pattern": self.pattern, "vocab": tokens, "merges": merges, "special_tokens": specials}
            self._fingerprint = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        return self._fingerprint

    def encode_piece(self, piece: str) -> list[int]:
        """Return the ids of one pre-token, without the cache."""
        ids = [self._byte_ids[value] for value in whole_characters(piece).encode()]
        return merge_by_windows(ids, self._ranks, self._merged, self._sizes)

    def _encode_segment(self, text: str) -> list[int]:
        return list(chain.from_iterable(map(self._cache.__getitem__, pre_tokenize(text, pattern=self.pattern))))

    def _shared_numbers(self) -> np.ndarray:
        import numpy as np

        if self._numbers is None:
            self._numbers = np.array(range(self.vocab_size), dtype=object)
        return self._numbers

    def _id_type(self) -> type[np.uint16] | type[np.uint32]:
        import numpy as np

        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def _encoder_for(self, num_bytes: int, *, least: int = 0) -> CompiledEncoder | None:
        """Return the compiled encoder if it should do a work of so many bytes, `least` at least."""
        known = self.pattern in COMPILED_PATTERNS
        if not known or not use_compiled(self.engine, num_bytes, "encode") or num_bytes < least:
            return None
        from transformerlm.tokenizer.fast.encoder import CompiledEncoder

        with self._lock:
            if self._encoder is None:
                self._encoder = CompiledEncoder(
                    byte_ids=self._byte_ids,
                    merges=[(*pair, new) for pair, new in zip(self._ranks, self._merged, strict=True)],
                    sizes=self._sizes,
                    special_token_ids=self.special_token_ids,
                    pattern=self.pattern,
                    dtype=self._id_type(),
                )
        return self._encoder

    def _decoder_for(self, num_ids: int) -> CompiledDecoder | None:
        """Return the compiled decoder if it should decode so many ids."""
        if not use_compiled(self.engine, 4 * num_ids, "decode") or num_ids < _CALL_IDS:
            return None
        from transformerlm.tokenizer.fast.encoder import CompiledDecoder

        with self._lock:
            if self._decoder is None:
                self._decoder = CompiledDecoder([self.vocab[token_id] for token_id in range(self.vocab_size)])
        return self._decoder

    def _encode_all(self, texts: Sequence[str], *, allow_special: bool) -> list[list[int]]:
        return [*map(self.encode if allow_special else self.encode_ordinary, texts)]


def _as_array(ids: Collection[int]) -> np.ndarray | None:
    """Return ids as an array; `None` for numbers that are not whole or too large, which numpy would cut or round."""
    import numpy as np

    if hasattr(ids, "dtype"):
        return np.asarray(ids)
    if type(next(iter(ids), 0)) in _NO_IDS:
        return None
    try:
        return np.frombuffer(array("q", ids), dtype=np.int64) if len(ids) else np.empty(0, dtype=np.int64)
    except (TypeError, OverflowError):
        return None


class _PieceCache(dict[str, tuple[int, ...]]):
    """Pre-token -> ids, computed on the first asking; emptied when full, so that it follows the text it meets."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, piece: str) -> tuple[int, ...]:
        ids = tuple(self._tokenizer.encode_piece(piece))
        if len(piece) <= _CACHED_PIECE_CHARS:
            if len(self) >= _CACHE_PIECES:
                self.clear()
            self[piece] = ids
        return ids
