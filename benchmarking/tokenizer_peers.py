"""The tokenizers that are compared: ours, Hugging Face's `tokenizers`, and `tiktoken`, behind the same three calls.

Encoding uses the merges that ours learnt, so that all of them must give the same ids. `tiktoken` trains nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformerlm.tokenizer.bpe_trainer import train_bpe
from transformerlm.tokenizer.io import token_to_text
from transformerlm.tokenizer.pretokenize import GPT2_PATTERN
from transformerlm.tokenizer.tokenizer import Tokenizer


class Encoder(ABC):
    """A tokenizer that starts cold: nothing encoded, nothing cached."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of one document."""

    @abstractmethod
    def encode_batch(self, texts: list[str], workers: int) -> list[list[int]]:
        """Return the ids of many documents, with as many processes or threads."""


class OurEncoder(Encoder):
    """Our tokenizer, made anew."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = Tokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def encode_batch(self, texts: list[str], workers: int) -> list[list[int]]:
        return self._tokenizer.encode_batch(texts, num_workers=workers)


class HuggingFaceEncoder(Encoder):
    """`tokenizers.Tokenizer` with byte-level BPE."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from tokenizers import models

        self._tokenizer = _byte_level(models.BPE(vocab=_to_names(tokenizer), merges=_merge_names(tokenizer)))
        self._tokenizer.add_special_tokens(tokenizer.special_tokens)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str], workers: int) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch(texts, add_special_tokens=False)]


class TiktokenEncoder(Encoder):
    """`tiktoken.Encoding` with our ranks."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        import tiktoken

        specials = tokenizer.special_token_ids
        self._encoding = tiktoken.Encoding(
            name="benchmark",
            pat_str=GPT2_PATTERN,
            mergeable_ranks={token: i for i, token in tokenizer.vocab.items() if i not in specials.values()},
            special_tokens=specials,
        )

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special="all")

    def encode_batch(self, texts: list[str], workers: int) -> list[list[int]]:
        return self._encoding.encode_batch(texts, num_threads=workers, allowed_special="all")


ENCODERS: dict[str, Callable[[Tokenizer], Encoder]] = {
    "transformerlm": OurEncoder,
    "tokenizers": HuggingFaceEncoder,
    "tiktoken": TiktokenEncoder,
}


def train_ours(path: Path, vocab_size: int, separator: str, workers: int) -> Tokenizer:
    """Train our tokenizer on a text file."""
    vocab, merges = train_bpe(path, vocab_size, [separator], num_workers=workers)
    return Tokenizer(vocab, merges, [separator])


def train_tokenizers(path: Path, vocab_size: int, separator: str, workers: int) -> Any:
    """Train Hugging Face's tokenizer on a text file; its threads are set by `RAYON_NUM_THREADS`.

    Documents are handed over whole: its own reading of files cuts them at line ends, which gives other pre-tokens.
    """
    from tokenizers import models, pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[separator],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = _byte_level(models.BPE())
    tokenizer.train_from_iterator(path.read_text(encoding="utf-8").split(separator), trainer)
    return tokenizer


TRAINERS: dict[str, Callable[[Path, int, str, int], Any]] = {
    "transformerlm": train_ours,
    "tokenizers": train_tokenizers,
}


def num_tokens(trained: Any, documents: list[str]) -> int:
    """Return how many tokens a trained tokenizer of either kind makes of the documents."""
    if isinstance(trained, Tokenizer):
        return sum(len(trained.encode(document)) for document in documents)
    return sum(len(found.ids) for found in trained.encode_batch(documents, add_special_tokens=False))


def _byte_level(model: Any) -> Any:
    import tokenizers
    from tokenizers import pre_tokenizers

    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return tokenizer


def _to_names(tokenizer: Tokenizer) -> dict[str, int]:
    specials = tokenizer.special_token_ids
    names = {token_to_text(token): i for i, token in tokenizer.vocab.items() if i not in specials.values()}
    return names | specials


def _merge_names(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [(token_to_text(left), token_to_text(right)) for left, right in tokenizer.merges]
