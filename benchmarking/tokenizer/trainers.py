"""Those who train a byte-level BPE vocabulary, behind one interface: from a text file to merges in order.

All cut text by GPT-2's pattern, learn the same number of merges, and leave the separator out; `gigabpe` alone reads the
file in its own way: by lines, the separator spelled out. Ties differ: ours go to the greater pair of byte strings.
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
"""Each merge's parts, left and right, or the token made of them where the parts are not told."""


@dataclass(frozen=True)
class Training:
    """What to train; `vocab_size` counts the bytes, the merges and the separator."""

    path: Path
    vocab_size: int
    separator: str
    threads: int
    engine: Engine


class Trainer(ABC):
    """Trains once. Threads of those that use rayon are set by `RAYON_NUM_THREADS`, before their first work."""

    def __init__(self, training: Training) -> None:
        """Make ready what is no part of the work."""
        self.training = training
        self.trained: Any = None

    @abstractmethod
    def train(self) -> None:
        """Read the file and learn the merges."""

    @abstractmethod
    def merges(self) -> Merges:
        """Return the merges in the order they were learnt."""

    def documents(self) -> list[str]:
        """Return the file's documents, for those that take no file; line ends stay as they are."""
        return self.training.path.read_bytes().decode().split(self.training.separator)


class OurTrainer(Trainer):
    """`transformerlm.tokenizer.train_bpe`."""

    def train(self) -> None:
        given = self.training
        self.trained = train_bpe(
            given.path, given.vocab_size, [given.separator], num_workers=given.threads, engine=self.engine()
        )

    def engine(self) -> Engine:
        """Return which of our engines trains."""
        return self.training.engine

    def merges(self) -> Merges:
        return list(self.trained[1])


class ReferenceTrainer(OurTrainer):
    """The same by the reference engine; its workers are processes."""

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
    """`rustbpe`, which knows no special tokens and tells the tokens it made, not their parts."""

    def train(self) -> None:
        self.trained = import_module("rustbpe").Tokenizer()
        self.trained.train_from_iterator(
            iter(self.documents()), vocab_size=self.training.vocab_size - 1, pattern=GPT2_PATTERN
        )

    def merges(self) -> Merges:
        ranks = sorted(self.trained.get_mergeable_ranks(), key=lambda item: item[1])
        return [(bytes(token),) for token, _ in ranks[NUM_BYTES:]]


class GigaBPETrainer(Trainer):
    """`gigabpe`, whose vocabulary begins with the bytes that occur, not with all: it is asked for as many merges."""

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
    """`gigatoken.train_bpe`, with Hugging Face's ties; none of the three it offers are ours."""

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
    """Tell whether two have learnt the same; where one tells tokens only, the tokens are compared."""
    if all(len(parts) == 2 for parts in (*a[:1], *b[:1])):
        return a == b
    return [b"".join(parts) for parts in a] == [b"".join(parts) for parts in b]


def _from_names(merges: Sequence[Sequence[str]]) -> Merges:
    """Return merges written in GPT-2's byte alphabet as bytes."""
    return [(text_to_token(left), text_to_token(right)) for left, right in merges]
