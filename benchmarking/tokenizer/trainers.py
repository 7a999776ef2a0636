"""The libraries that train a byte-level BPE vocabulary, behind one interface: from a text file to merges in order.

All split text by GPT-2's pattern, learn the same number of merges, and exclude the separator. Only `gigabpe` reads the
file in its own way: by lines, with the separator as text. Ties differ: ours go to the greater pair of byte strings.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarking.harness import OURS
from transformerlm.tokenizer.bpe_trainer import train_bpe
from transformerlm.tokenizer.engines import Engine
from transformerlm.tokenizer.io import text_to_token
from transformerlm.tokenizer.pretokenize import GPT2_PATTERN

NUM_BYTES = 256

Merges = list[tuple[bytes, ...]]
"""Each merge's parts, left and right, or the token made of them if the library does not report the parts."""


@dataclass(frozen=True)
class Training:
    """What to train; `vocab_size` includes the bytes, the merges and the separator."""

    path: Path
    vocab_size: int
    separator: str
    threads: int
    engine: Engine


class Trainer(ABC):
    """Trains once. `RAYON_NUM_THREADS` sets the threads of those that use Rayon, before they first compute."""

    def __init__(self, training: Training) -> None:
        """Prepare what is not part of the task."""
        self.training = training
        self.trained: Any = None

    @abstractmethod
    def train(self) -> None:
        """Read the file and learn the merges."""

    @abstractmethod
    def merges(self) -> Merges:
        """Return the merges in the order in which they were learned."""

    def documents(self) -> list[str]:
        """Return the file's documents, for libraries that take no file; line ends are unchanged."""
        return self.training.path.read_bytes().decode().split(self.training.separator)


class OurTrainer(Trainer):
    """`transformerlm.tokenizer.train_bpe`."""

    def train(self) -> None:
        given = self.training
        self.trained = train_bpe(
            given.path, given.vocab_size, [given.separator], num_workers=given.threads, engine=self.engine()
        )

    def engine(self) -> Engine:
        """Return which of our engines does the training."""
        return self.training.engine

    def merges(self) -> Merges:
        return list(self.trained[1])


class ReferenceTrainer(OurTrainer):
    """The same with the reference engine, whose workers are processes."""

    def engine(self) -> Engine:
        return "reference"


class HuggingFaceTrainer(Trainer):
    """`tokenizers.trainers.BpeTrainer`, which gets whole documents: it would read a file by lines."""

    def train(self) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        trainer = trainers.BpeTrainer(
            vocab_size=self.training.vocab_size,
            special_tokens=[self.training.separator],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.train_from_iterator(self.documents(), trainer)
        self.trained = tokenizer

    def merges(self) -> Merges:
        return _from_names(json.loads(self.trained.to_str())["model"]["merges"])


class RustBPETrainer(Trainer):
    """`rustbpe`, which knows no special tokens and reports the tokens it made, not their parts."""

    def train(self) -> None:
        self.trained = import_module("rustbpe").Tokenizer()
        self.trained.train_from_iterator(
            iter(self.documents()), vocab_size=self.training.vocab_size - 1, pattern=GPT2_PATTERN
        )

    def merges(self) -> Merges:
        ranks = sorted(self.trained.get_mergeable_ranks(), key=lambda item: item[1])
        return [(bytes(token),) for token, _ in ranks[NUM_BYTES:]]


class GigaBPETrainer(Trainer):
    """`gigabpe`, whose vocabulary begins only with the bytes that occur; it is asked for the same number of merges."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        found: set[int] = set()
        with training.path.open("rb") as file:
            while block := file.read(1 << 20):
                found |= set(block)
        self._vocab_size = training.vocab_size - NUM_BYTES + len(found)

    def train(self) -> None:
        given = self.training
        self.trained = import_module("gigabpe").train_bpe(
            [str(given.path)],
            self._vocab_size,
            special_tokens=[given.separator],
            pretokenizer="bytelevel",
            threads=given.threads,
        )

    def merges(self) -> Merges:
        return _from_names(self.trained[1])


class GigatokenTrainer(Trainer):
    """`gigatoken.train_bpe`, with Hugging Face's rule for ties; none of the three that it offers is ours."""

    def train(self) -> None:
        given = self.training
        self.trained = import_module("gigatoken").train_bpe(
            given.path, given.vocab_size, [given.separator], separator=given.separator.encode()
        )

    def merges(self) -> Merges:
        return list(self.trained[1])


TRAINERS: dict[str, type[Trainer]] = {
    OURS: OurTrainer,
    "reference": ReferenceTrainer,
    "tokenizers": HuggingFaceTrainer,
    "rustbpe": RustBPETrainer,
    "gigabpe": GigaBPETrainer,
    "gigatoken": GigatokenTrainer,
}


def same_merges(a: Merges, b: Merges) -> bool:
    """Return whether two learned the same; if one reports only tokens, the tokens are compared."""
    if all(len(parts) == 2 for parts in (*a[:1], *b[:1])):
        return a == b
    return [b"".join(parts) for parts in a] == [b"".join(parts) for parts in b]


def _from_names(merges: Sequence[Sequence[str]]) -> Merges:
    """Return merges written in GPT-2's byte alphabet as bytes."""
    return [(text_to_token(left), text_to_token(right)) for left, right in merges]
