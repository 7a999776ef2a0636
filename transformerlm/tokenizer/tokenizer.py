"""The tokenizer: text to ids and back.

A `Tokenizer` holds a vocabulary, merges and special tokens. It checks what it is given and asks one of two engines with
the same results (`engines.py`): `reference.py` cuts text and merges bytes in Python, `fast/engine.py` by kernels. Any
`str` can be encoded: nothing is normalised and no token is unknown, as all 256 bytes are tokens. Knows no torch, no
config and no file formats (`io.py` does); numpy only where an array is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformerlm.tokenizer import engines, io
from transformerlm.tokenizer.engines import Engine, Engines
from transformerlm.tokenizer.parallel import map_in_order, resolve_num_workers
from transformerlm.tokenizer.pretokenize import DEFAULT_PATTERN, SpecialTokenSplitter, StreamCutter, safe_pieces
from transformerlm.tokenizer.reading import Chunk
from transformerlm.tokenizer.reference import Vocabulary
from transformerlm.utils.files import whole_files
from transformerlm.utils.strings import check_are_strings, check_is_string, ends_in_half, to_utf8, whole_characters
from transformerlm.utils.text_files import (
    ReadStats,
    expand_inputs,
    is_plain_text,
    read_ahead,
    read_text,
    total_bytes,
)
from transformerlm.utils.text_formats import format_of

if TYPE_CHECKING:
    import numpy as np

_FILE_PIECE_CHARS = 1 << 22
_EXPECTED_IDS = 1 << 26  # no more are expected of a file at first
_FILE_CHUNK_BYTES = 1 << 20  # a thread's work: cut, checked and encoded while it is in the processor's cache


class Tokenizer:
    """A byte-level BPE tokenizer: a vocabulary, merges in order, and special tokens."""

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        merges: Sequence[tuple[bytes, bytes]],
        special_tokens: Sequence[str] | None = None,
        *,
        pattern: str = DEFAULT_PATTERN,
        ignore_merges: bool = False,
        engine: Engine = "auto",
    ) -> None:
        """Build from parts as `train_bpe` returns them; a special token that is not in `vocab` gets the next id.

        Args:
            vocab: id -> bytes.
            merges: pairs of byte strings in the order they were learned.
            special_tokens: kept whole by `encode`.
            pattern: how text is cut into pre-tokens, a name in `pretokenize.PATTERNS`.
            ignore_merges: a pre-token that is a token is that token, whatever merges would make of it, and merges may
                use parts that later ones make: so Llama 3's tokenizer, which was made from ranks.
            engine: "reference", "compiled" (same ids, needs numba), or "auto": the compiled one for large inputs,
                where it knows the pattern.

        Raises:
            TypeError: `special_tokens` is one string.
            ValueError: ids that are not 0..n-1, a missing byte, merges of unknown tokens (see `io.check_vocab`,
                `io.check_merges`), or a special token of one byte.
        """
        io.check_special_tokens(special_tokens or ())
        io.check_vocab(vocab)
        io.check_merges(merges, vocab, in_order=not ignore_merges)
        self.vocab = dict(vocab)
        self.merges = list(merges)
        self.pattern = pattern
        self.ignore_merges = ignore_merges
        self.engine = engine
        engines.check_engine(engine, pattern=pattern)
        self._splitter = SpecialTokenSplitter(special_tokens or (), pattern=pattern)
        ids = {token: token_id for token_id, token in self.vocab.items()}
        self.special_token_ids: dict[str, int] = {}
        for special in self._splitter.special_tokens:
            token_id = ids.setdefault(special.encode(), len(ids))
            self.vocab[token_id] = special.encode()
            self.special_token_ids[special] = token_id
        self._vocabulary = Vocabulary(
            tokens=self.vocab,
            ranks={(ids[left], ids[right]): rank for rank, (left, right) in enumerate(self.merges)},
            merged=[ids[left + right] for left, right in self.merges],
            special_token_ids=self.special_token_ids,
            pattern=pattern,
            whole_tokens=self._ordinary_tokens() if ignore_merges else {},
        )
        self._engines = Engines(self._vocabulary, engine)
        self._fingerprint: str | None = None

    @classmethod
    def from_files(
        cls,
        vocab_filepath: str | os.PathLike[str],
        merges_filepath: str | os.PathLike[str],
        special_tokens: Sequence[str] | None = None,
        *,
        pattern: str = DEFAULT_PATTERN,
        ignore_merges: bool = False,
        engine: Engine = "auto",
    ) -> Tokenizer:
        """Load a `vocab.json` and a `merges.txt`, such as GPT-2's own.

        Raises:
            FileNotFoundError: a file that is not there.
            ValueError: a file that is not valid, or (without `ignore_merges`) merges that were cut; the message says
                where and what.
        """
        vocab = io.load_vocab(Path(vocab_filepath), special_tokens or ())
        merges = io.load_merges(Path(merges_filepath), vocab, special_tokens or (), in_order=not ignore_merges)
        return cls(vocab, merges, special_tokens, pattern=pattern, ignore_merges=ignore_merges, engine=engine)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str], *, engine: Engine = "auto") -> Tokenizer:
        """Load what `save` wrote, or GPT-2's files whose names begin with `directory` and a dash.

        Those are such as `gpt2-vocab.json` and `gpt2-merges.txt`, for "gpt2". Where no `gpt2-special_tokens.json` is
        beside them, tokens like `<|endoftext|>` are taken to be special, and the pattern to be GPT-2's, with a warning.

        Raises:
            FileNotFoundError: a file that is not there.
            ValueError: a file that is not valid; the message says where and what.
        """
        vocab, merges, specials = io.tokenizer_files(Path(directory))
        if specials.exists() or specials.name == io.SPECIALS_FILE:
            known = io.load_special_tokens(specials)
        else:
            known = io.SpecialsFile(io.special_names(vocab), DEFAULT_PATTERN)
            names = ", ".join(known.special_tokens) or "none"
            warnings.warn(
                f"{specials}: no such file, so the special tokens are taken to be {names}, and the pattern "
                f"{DEFAULT_PATTERN} (transformerlm-import --format gpt2 writes a tokenizer that says it)",
                stacklevel=2,
            )
        tokenizer = cls.from_files(
            vocab,
            merges,
            known.special_tokens,
            pattern=known.pattern,
            ignore_merges=known.ignore_merges,
            engine=engine,
        )
        if known.sha256 is not None and (found := tokenizer.fingerprint()) != known.sha256:
            raise ValueError(
                f"{directory}: expected the tokenizer {known.sha256[:12]}... that {io.SPECIALS_FILE} names, found "
                f"{found[:12]}...: a file has changed, train or copy the tokenizer again"
            )
        return tokenizer

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write merges.txt, special_tokens.json and vocab.json; equal tokenizers give equal bytes.

        All are on the disk before the first takes its place. vocab.json is the last, so where it is, all are.

        Raises:
            OSError: the disk is full, or another failure to write; a tokenizer that was there is as it was, or, if only
                the last flush failed, the new one is there.
            ValueError: files that loading would refuse: too large, or with too many special tokens; none is written.
        """
        directory = Path(directory)
        vocab = directory / io.VOCAB_FILE
        record = {
            "format": 1,
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "sha256": self.fingerprint(),
            **self._rule(),
        }
        contents = {
            directory / io.MERGES_FILE: io.merges_as_text(self.merges),
            directory / io.SPECIALS_FILE: json.dumps(record, ensure_ascii=False, indent=2) + "\n",
            vocab: io.vocab_as_text(self.vocab, vocab, self.special_tokens),
        }
        encoded = {path: text.encode() for path, text in contents.items()}
        io.check_can_be_loaded(encoded, self.special_tokens)
        directory.mkdir(parents=True, exist_ok=True)
        with whole_files(encoded):
            pass

    def __repr__(self) -> str:
        """Return the tokenizer's sizes."""
        return (
            f"Tokenizer(vocab_size={self.vocab_size}, merges={len(self.merges)}, "
            f"special_tokens={len(self.special_token_ids)}, pattern={self.pattern!r}, engine={self.engine!r})"
        )

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[object, ...]]:
        """Pickle as the parts; caches stay here."""
        return partial(Tokenizer, **self._choices()), (self.vocab, self.merges, self.special_tokens)

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
        check_is_string(text, "text")
        return self._engines.for_text(len(text), least=engines.CALL_CHARS).encode(text, allow_special=True)

    def encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of `text` taken as plain text, special tokens spelled out: for text of unknown origin."""
        check_is_string(text, "text")
        return self._engines.for_text(len(text), least=engines.CALL_CHARS).encode(text, allow_special=False)

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
        engine = self._engines.for_text(size)
        return engine.encode_batch(texts, num_workers=num_workers, allow_special=allow_special)

    def encode_batch_to_array(
        self, texts: Sequence[str], *, num_workers: int = 1, allow_special: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts in one array, and where those of each text end.

        Ids are uint16 where all fit and uint32 otherwise, shape (tokens,); ends are int64, shape (texts,).
        """
        check_are_strings(texts, "texts")
        num_workers = resolve_num_workers(num_workers, 0)
        engine = self._engines.for_text(sum(map(len, texts)))
        return engine.encode_batch_to_array(texts, num_workers=num_workers, allow_special=allow_special)

    def read_chunks(
        self, path: Path, *, stats: ReadStats, size: int, start: int = 0, end: int | None = None
    ) -> Iterator[Chunk]:
        """Yield a plain text file in chunks of about `size` bytes, for `encode_chunk`; see `runs_in_threads`.

        With `start` and `end`, only the bytes of one part of it are read (see `transformerlm.utils.text_parts`).
        Invalid UTF-8 is left in them as it is. Memory: a chunk, or the longest run without a place to cut.

        Raises:
            ValueError: a byte of invalid UTF-8, where `stats` refuses them, a run that is too long to be text, or a
                file that ends before `end`.
        """
        engine = self._engines.compiled("encode")
        return engine.read_chunks(path, self._splitter, stats=stats, size=size, start=start, end=end)

    def encode_chunk(self, chunk: Chunk) -> tuple[np.ndarray, int]:
        """Return the ids of a chunk, and how many U+FFFD replaced its invalid bytes."""
        ids, replaced = self._engines.compiled("encode").encode_chunk(chunk)
        return ids.astype(self._vocabulary.id_type), replaced

    def encode_to_array(self, text: str, *, num_workers: int = 1) -> np.ndarray:
        """Return the ids of `text` as a numpy array, uint16 where all ids fit and uint32 otherwise; shape (tokens,)."""
        return self.encode_batch_to_array([text], num_workers=num_workers)[0]

    def encode_file(
        self, path: str | os.PathLike[str], *, num_workers: int | None = None, allow_special: bool = False
    ) -> np.ndarray:
        """Return the ids of a file's text as an array, as `encode` gives them.

        A row of JSON lines or Parquet counts by itself, and is plain text unless `allow_special` is given. Memory: the
        ids (twice for a moment, where their number turns out to be larger than the first ones let expect), and for
        each worker a few MB of text and four times as much for its ids (more for a pre-token that is longer).

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is no text (see `transformerlm.utils.text_files`), or a name that means several.
        """
        paths, stats = expand_inputs(path), ReadStats()
        if len(paths) > 1:
            raise ValueError(f"expected one file, found {len(paths):,} at {os.fspath(path)}")
        read_ahead(paths)
        size = total_bytes(paths)
        workers = resolve_num_workers(num_workers, size)
        engine = self._engines.for_text(size)
        results: Generator[tuple[np.ndarray, Any], None, None]  # ids, and what is not needed here
        if engine.takes_bytes and is_plain_text(paths[0]) and not self._splitter.needs_text:
            chunks = self.read_chunks(paths[0], stats=stats, size=_FILE_CHUNK_BYTES)
            encode_chunk = self._engines.compiled("encode").encode_chunk
            results = map_in_order(encode_chunk, chunks, num_workers=workers, threads=workers > 1, caller_works=True)
        else:
            allow_special = allow_special or not format_of(paths[0]).holds_rows
            splitter = self._splitter if allow_special else self._splitter.without_tokens()
            text = read_text(paths[0], stats=stats)
            pieces = safe_pieces(text, splitter, size=_FILE_PIECE_CHARS, where=str(paths[0]))
            texts = ([piece.text] for piece in pieces)
            encode = partial(engine.encode_batch_to_array, num_workers=1, allow_special=allow_special)
            threads = engine.takes_bytes
            results = map_in_order(encode, texts, num_workers=workers, threads=threads, caller_works=threads)
        with closing(results):
            parts = (ids for ids, _ in results)
            return _joined(parts, self._vocabulary.id_type, read=lambda: stats.disk_bytes / max(1, size))

    def runs_in_threads(self, num_bytes: int) -> bool:
        """Return whether the compiled engine encodes `num_bytes`, and load it.

        Threads may share it, and it takes chunks (`read_chunks`). The reference engine holds the GIL: to share its work
        takes processes.
        """
        return self._engines.for_text(num_bytes).takes_bytes

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids; invalid UTF-8 becomes U+FFFD.

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
            engine = self._engines.for_ids(len(ids)) if isinstance(ids, Collection) else self._engines.reference
            return engine.decode(ids)
        except KeyError as error:
            raise ValueError(
                f"ids: expected 0 to {self.vocab_size - 1} (vocab_size {self.vocab_size}), found {error.args[0]}"
            ) from None
        except TypeError as error:  # a list of lists
            raise TypeError(f"ids: expected whole numbers in one row, found other things ({error})") from None

    def token_byte_lengths(self) -> list[int]:
        """Return how many bytes of text each id spells, by id; special tokens spell none."""
        specials = set(self.special_token_ids.values())
        return [0 if token_id in specials else len(self.vocab[token_id]) for token_id in range(self.vocab_size)]

    def bytes_per_token(self, text: str) -> float:
        """Return how many UTF-8 bytes of `text` one token holds on average.

        Raises:
            ValueError: an empty text.
        """
        if not text:
            raise ValueError("bytes_per_token: expected some text, found an empty one")
        return len(to_utf8(text)) / len(self.encode(text))

    def with_special_tokens(self, tokens: Sequence[str]) -> Tokenizer:
        """Return this tokenizer with more special tokens, which get the next ids; every id of this one stays.

        A token that is a special token already keeps its id, too.

        Raises:
            TypeError: `tokens` is one string.
            ValueError: a token is an ordinary one already, or its files could not tell it from one, or there are too
                many.
        """
        io.check_special_tokens(tokens)
        new = [token for token in dict.fromkeys(tokens) if token not in self.special_token_ids]
        ids = {token: token_id for token_id, token in self.vocab.items()}
        for token in new:
            if (known := ids.get(to_utf8(token))) is not None:
                raise ValueError(
                    f"special_tokens: expected tokens that are not in the vocabulary, found {token!r}, which is the "
                    f"ordinary token {known}: texts that spell it would get other ids (choose another name)"
                )
        io.check_special_tokens_to_save(new)
        all_tokens = [*self.special_tokens, *new]
        if len(all_tokens) > io.MAX_SPECIALS:
            found = f"{len(self.special_tokens):,} and {len(new):,} more"
            raise ValueError(f"special_tokens: expected {io.MAX_SPECIALS:,} in a tokenizer at most, found {found}")
        return Tokenizer(self.vocab, self.merges, all_tokens, **self._choices())

    def fingerprint(self) -> str:
        """Return a sha256 in hex over all that decides about ids, not over the files' layout."""
        if self._fingerprint is None:
            self._fingerprint = self._sha256_of(self.vocab_size)
        return self._fingerprint

    def _sha256_of(self, vocab_size: int) -> str:
        """Return the fingerprint of a tokenizer that has only the first `vocab_size` of these ids."""
        tokens = [self.vocab[token_id].hex() for token_id in range(vocab_size)]
        merges = [[left.hex(), right.hex()] for left, right in self.merges]
        known = [item for item in self.special_token_ids.items() if item[1] < vocab_size]
        specials = sorted(known, key=lambda item: item[1])
        record = {
            "pattern": self.pattern,
            "vocab": tokens,
            "merges": merges,
            "special_tokens": specials,
            **self._rule(),
        }
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

    def _choices(self) -> dict[str, Any]:
        """Return the keywords with which this one was built."""
        return {"pattern": self.pattern, "ignore_merges": self.ignore_merges, "engine": self.engine}

    def _rule(self) -> dict[str, bool]:
        """Return what a record says of `ignore_merges`: nothing where it is not set, as in older records."""
        return {"ignore_merges": True} if self.ignore_merges else {}

    def _ordinary_tokens(self) -> dict[bytes, int]:
        specials = set(self.special_token_ids.values())
        return {token: token_id for token_id, token in self.vocab.items() if token_id not in specials}

    def extends(self, sha256: str, vocab_size: int) -> bool:
        """Return whether this is that tokenizer with more special tokens, so that each of its ids means the same here.

        `sha256` is that tokenizer's fingerprint and `vocab_size` the number of its ids, which must be fewer. Nothing is
        taken on trust: the fingerprint is computed from what this tokenizer would be without its later ids.
        """
        later = range(vocab_size, self.vocab_size)
        are_special = set(later) <= set(self.special_token_ids.values())
        return len(later) > 0 and are_special and self._sha256_of(vocab_size) == sha256

    def check_fingerprint(
        self, sha256: str, *, made: str, ours: str, advice: str, vocab_size: int | None = None
    ) -> None:
        """Refuse what was made with another tokenizer, whose ids mean other tokens.

        `made` says what was made, `ours` names this tokenizer, `advice` says how to mend it. With the `vocab_size` of
        the other one, this tokenizer may have more special tokens than it.

        Raises:
            ValueError: `sha256` is not this tokenizer's fingerprint; both are named.
        """
        own = self.fingerprint()
        if sha256 != own and not (vocab_size is not None and self.extends(sha256, vocab_size)):
            raise ValueError(f"{made} the tokenizer {sha256[:12]}..., but {ours} is {own[:12]}...; {advice}")

    def encode_piece(self, piece: str) -> list[int]:
        """Return the ids of one pre-token, without the cache."""
        return self._engines.reference.encode_piece(whole_characters(piece))


def _joined(
    parts: Iterable[np.ndarray], dtype: type[np.unsignedinteger[Any]], *, read: Callable[[], float]
) -> np.ndarray:
    """Return parts one after the other, in an array as long as the share of the text that was `read` lets expect."""
    import numpy as np

    result, end = np.empty(0, dtype=dtype), 0
    for part in parts:
        start, end = end, end + len(part)
        if end > len(result):
            expected = min(round(1.02 * end / max(read(), 1e-9)), max(2 * end, _EXPECTED_IDS))
            longer = np.empty(max(expected, end + end // 4), dtype=dtype)  # a quarter more, so that little is copied
            longer[:start] = result[:start]
            result = longer
        result[start:end] = part
    result.resize(end, refcheck=False)  # memory that was not used is given back, and nothing is moved
    return result
