"""The libraries that encode and decode, behind one interface; all get our merges, so all must give the same ids.

Each is called in the way that suits the task best. `rustbpe` and `gigabpe` accept no merges from outside.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarking.harness import OURS
from transformerlm.tokenizer.engines import Engine
from transformerlm.tokenizer.io import token_to_text
from transformerlm.tokenizer.pretokenize import GPT2_PATTERN
from transformerlm.tokenizer.tokenizer import Tokenizer

Array = np.ndarray[Any, np.dtype[Any]]

_HF_PIECE_CHARS = 10_000  # it is slow on long texts


class Encoder(ABC):
    """A tokenizer with empty caches. `RAYON_NUM_THREADS` sets Rayon's threads, before they first compute."""

    @abstractmethod
    def __init__(self, tokenizer: Tokenizer, threads: int, engine: Engine) -> None:
        """Build from our tokenizer's parts."""

    @abstractmethod
    def encode_file(self, path: Path) -> Array:
        """Return the ids of a file's text, with separators recognised; shape (tokens,)."""

    @abstractmethod
    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each document; documents hold no separators."""

    @abstractmethod
    def decode_array(self, ids: Array) -> bytes:
        """Return the bytes of an array of ids."""

    @abstractmethod
    def decode_list(self, ids: list[int]) -> str:
        """Return the text of a list of ids."""

    def own_array(self, ids: Array) -> Array:
        """Return the ids in the type of this library's arrays."""
        return ids.astype(np.uint32)


class OurEncoder(Encoder):
    """`transformerlm.tokenizer.Tokenizer`."""

    def __init__(self, tokenizer: Tokenizer, threads: int, engine: Engine) -> None:
        self._tokenizer = Tokenizer(
            tokenizer.vocab,
            tokenizer.merges,
            tokenizer.special_tokens,
            pattern=tokenizer.pattern,
            ignore_merges=tokenizer.ignore_merges,
            engine=engine,
        )
        self._threads = threads

    def encode_file(self, path: Path) -> Array:
        return self._tokenizer.encode_file(path, num_workers=self._threads)

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer.encode_batch(texts, num_workers=self._threads)

    def decode_array(self, ids: Array) -> bytes:
        return self._tokenizer.decode_bytes(ids)

    def decode_list(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def own_array(self, ids: Array) -> Array:
        return ids


class ReferenceEncoder(OurEncoder):
    """The same with the reference engine, whose workers are processes."""

    def __init__(self, tokenizer: Tokenizer, threads: int, engine: Engine) -> None:
        super().__init__(tokenizer, threads, "reference")


class HuggingFaceEncoder(Encoder):
    """`tokenizers.Tokenizer`; `encode_batch_fast` omits the offsets."""

    def __init__(self, tokenizer: Tokenizer, threads: int, engine: Engine) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json(tokenizer))

    def encode_file(self, path: Path) -> Array:
        pieces = self.encode_documents(list(cut_at_blanks(_text_of(path), _HF_PIECE_CHARS)))
        return np.concatenate([np.array(ids, dtype=np.uint32) for ids in pieces])

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode_array(self, ids: Array) -> bytes:
        return self.decode_list(ids.tolist()).encode()

    def decode_list(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class TiktokenEncoder(Encoder):
    """`tiktoken.Encoding`; a call on one text uses one thread, so each thread gets a part."""

    def __init__(self, tokenizer: Tokenizer, threads: int, engine: Engine) -> None:
        import tiktoken

        specials = tokenizer.special_token_ids
        self._threads = threads
        self._encoding = tiktoken.Encoding(
            name="benchmark",
            pat_str=GPT2_PATTERN,
            mergeable_ranks={token: i for i, token in tokenizer.vocab.items() if i not in specials.values()},
            special_tokens=specials,
        )

    def encode_file(self, path: Path) -> Array:
        text = _text_of(path)
        encode = partial(self._encoding.encode_to_numpy, allowed_special="all")
        if self._threads == 1:
            return encode(text)
        with ThreadPoolExecutor(self._threads) as pool:
            parts = cut_at_blanks(text, max(1, len(text) // (4 * self._threads)))
            return np.concatenate(list(pool.map(encode, parts)))

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        if self._threads == 1:
            return [self._encoding.encode_ordinary(text) for text in texts]
        return self._encoding.encode_ordinary_batch(texts, num_threads=self._threads)

    def decode_array(self, ids: Array) -> bytes:
        return self._encoding.decode_bytes(ids.tolist())

    def decode_list(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)


class GigatokenEncoder(Encoder):
    """`gigatoken.Tokenizer`; without a separator a file is one document, and separators in it get their id."""

    def __init__(self, tokenizer: Tokenizer, threads: int, engine: Engine) -> None:
        self._tokenizer = import_module("gigatoken").Tokenizer.from_json(tokenizer_json(tokenizer))
        self._parallel = threads > 1

    def encode_file(self, path: Path) -> Array:
        return np.asarray(self._tokenizer.encode_files(path, parallel=self._parallel)[0])

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        lists: list[list[int]] = self._tokenizer.encode_batch_list(texts, parallel=self._parallel)
        return lists

    def decode_array(self, ids: Array) -> bytes:
        found: bytes = self._tokenizer.decode(ids)
        return found

    def decode_list(self, ids: list[int]) -> str:
        found: bytes = self._tokenizer.decode(ids)
        return found.decode("utf-8", "replace")


ENCODERS: dict[str, type[Encoder]] = {
    OURS: OurEncoder,
    "reference": ReferenceEncoder,
    "tokenizers": HuggingFaceEncoder,
    "tiktoken": TiktokenEncoder,
    "gigatoken": GigatokenEncoder,
}


def cut_at_blanks(text: str, size: int) -> Iterator[str]:
    """Cut text into parts of `size` characters or more, before a space after an ASCII letter: ids stay the same."""
    start = 0
    while start < len(text):
        end = text.find(" ", start + size)
        while end != -1 and not (text[end - 1].isascii() and text[end - 1].isalpha()):
            end = text.find(" ", end + 1)
        end = len(text) if end == -1 else end
        yield text[start:end]
        start = end


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """Return our tokenizer in the format of Hugging Face's tokenizer.json."""
    specials = tokenizer.special_token_ids
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    names = {token_to_text(token): i for i, token in tokenizer.vocab.items() if i not in specials.values()}
    merges = [[token_to_text(left), token_to_text(right)] for left, right in tokenizer.merges]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    record = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": special} | flags for special, i in specials.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": names | specials, "merges": merges},
    }
    return json.dumps(record)


def _text_of(path: Path) -> str:
    """Return a file's text with unchanged line ends."""
    return path.read_bytes().decode()
