"""The compiled engine: what a tokenizer does with text and ids, by kernels.

It has two parts, which are loaded when they are first needed, as numba may have to compile them: `encoder.py`'s
encoder and decoder. Besides strings it takes the bytes of files as they are (`byte_chunks.py`).

Twin of `CompiledEngine`: `transformerlm.tokenizer.reference.ReferenceEngine`
Test: tests/tokenizer/fast/test_encoder.py
Pays: 37x the MB/s of the reference from a file to an array of ids, one thread, first pass (docs/benchmarks.md)
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from transformerlm.tokenizer.fast import byte_chunks
from transformerlm.tokenizer.fast.arrays import Array
from transformerlm.tokenizer.fast.encoder import CompiledDecoder, CompiledEncoder
from transformerlm.tokenizer.parallel import map_in_order
from transformerlm.tokenizer.pretokenize import SpecialTokenSplitter
from transformerlm.tokenizer.reading import Chunk
from transformerlm.tokenizer.reference import Vocabulary, join_tokens
from transformerlm.utils.strings import to_utf8
from transformerlm.utils.text_files import ReadStats

BATCH_CHARS = 1 << 20  # a thread's work, which stays in the processor's cache

Part = Literal["encode", "decode"]


class CompiledEngine:
    """Encodes and decodes by kernels; see `engines.EncodingEngine` for what each method promises.

    Each part must be loaded before it is used. Threads may share an engine, as the kernels give up the GIL.
    """

    takes_bytes = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._encoder: CompiledEncoder | None = None
        self._decoder: CompiledDecoder | None = None
        self._numbers: Array | None = None

    def is_loaded(self, part: Part) -> bool:
        """Return whether a part has its tables and its kernels."""
        return (self._encoder if part == "encode" else self._decoder) is not None

    def load(self, part: Part) -> None:
        """Build the tables of one part, and compile its kernels or read them from the disk."""
        known = self._vocabulary
        if part == "decode":
            self._decoder = CompiledDecoder([known.tokens[token_id] for token_id in range(len(known.tokens))])
            return
        self._encoder = CompiledEncoder(
            byte_ids=known.byte_ids,
            merges=[(*pair, new) for pair, new in zip(known.ranks, known.merged, strict=True)],
            tokens=[known.tokens[token_id] for token_id in range(len(known.tokens))],
            special_token_ids=known.special_token_ids,
            pattern=known.pattern,
            dtype=known.id_type,
            whole_tokens=known.whole_tokens,
        )

    def encode(self, text: str, *, allow_special: bool) -> list[int]:
        """Return the ids of one text."""
        return list(self.encode_batch_to_array([text], num_workers=1, allow_special=allow_special)[0].tolist())

    def encode_batch(self, texts: Sequence[str], *, num_workers: int, allow_special: bool) -> list[list[int]]:
        """Return the ids of each text, encoded by `num_workers` threads.

        Texts go to the threads in batches. While they work, the ids of earlier batches become lists here.
        """
        # One Python number for each id, made once and then shared: a list of new ones takes far longer to build.
        if self._numbers is None:
            self._numbers = np.array(range(len(self._vocabulary.tokens)), dtype=object)
        batches = list(_batches(texts))
        several = min(num_workers, len(batches)) > 1
        encode = partial(
            self.encode_batch_to_array, num_workers=1 if several else num_workers, allow_special=allow_special
        )
        lists: list[list[int]] = []
        with closing(
            map_in_order(encode, batches, num_workers=num_workers if several else 1, threads=several, caller_works=True)
        ) as results:
            for ids, ends in results:
                numbers = self._numbers[ids]
                bounds = [0, *ends.tolist()]
                lists += [numbers[start:stop].tolist() for start, stop in pairwise(bounds)]
        return lists

    def encode_batch_to_array(
        self, texts: Sequence[str], *, num_workers: int, allow_special: bool
    ) -> tuple[Array, Array]:
        """Return the ids of all texts in one array, and where those of each text end."""
        assert self._encoder is not None, "encoding is not loaded"
        spelled = [*map(to_utf8, texts)]
        return self._encoder.encode_texts(spelled, num_threads=num_workers, ordinary=not allow_special)

    def read_chunks(
        self,
        path: Path,
        splitter: SpecialTokenSplitter,
        *,
        stats: ReadStats,
        size: int,
        start: int = 0,
        end: int | None = None,
    ) -> Iterator[Chunk]:
        """Yield a plain text file, or a part of it, in chunks of about `size` bytes; see `byte_chunks.read_chunks`."""
        return byte_chunks.read_chunks(path, splitter, stats=stats, size=size, start=start, end=end)

    def encode_chunk(self, chunk: Chunk) -> tuple[Array, int]:
        """Return the ids of a chunk, as `CompiledEncoder.encode_array`, and how many U+FFFD replaced invalid bytes."""
        assert self._encoder is not None, "encoding is not loaded"
        chunk, replaced = byte_chunks.made_valid(chunk)
        return self._encoder.encode_array(chunk.data, chunk.ends, ordinary=chunk.ordinary), replaced

    def decode(self, ids: Iterable[int]) -> bytes | memoryview:
        """Return the bytes of the ids."""
        numbers = _as_array(ids) if isinstance(ids, Collection) else None
        if numbers is None or numbers.ndim != 1 or numbers.dtype.kind not in "iu":
            return join_tokens(ids, self._vocabulary.tokens)
        assert self._decoder is not None, "decoding is not loaded"
        return self._decoder.decode(numbers)


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield texts in batches of some `BATCH_CHARS` characters."""
    start = size = 0
    for stop, text in enumerate(texts, start=1):
        size += len(text)
        if size >= BATCH_CHARS or stop == len(texts):
            yield texts[start:stop]
            start, size = stop, 0


def _as_array(ids: Collection[int]) -> Array | None:
    """Return ids as an array; `None` for numbers that are not whole or too large, which numpy would cut or round."""
    if hasattr(ids, "dtype"):
        return np.asarray(ids.cpu() if hasattr(ids, "cpu") else ids)  # a tensor may be on a GPU
    if isinstance(ids, bytes | bytearray):
        ids = list(ids)  # an `array` would take eight bytes for one number
    if type(next(iter(ids), 0)) in (bool, float):
        return None
    try:
        return np.frombuffer(array("q", ids), dtype=np.int64) if len(ids) else np.empty(0, dtype=np.int64)
    except (TypeError, OverflowError):
        return None
