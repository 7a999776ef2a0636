"""What the tokenizer benchmark measures: each task in a process of its own, all candidates in turn.

Each task needs its own process because libraries set their number of threads once. There, each candidate first runs on
a sample, which imports libraries and compiles kernels before the rounds. Each round then builds its objects again.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarking.harness import CLOCKS, OURS, Quantity, Sample, Series, run_rounds, timed
from benchmarking.tokenizer.encoders import ENCODERS, Encoder
from benchmarking.tokenizer.trainers import TRAINERS, Trainer, Training, same_merges
from config.measure import MeasureConfig
from profiling.memory import peak_rss_bytes, reset_peak_rss
from transformerlm.tokenizer.engines import Engine
from transformerlm.tokenizer.tokenizer import Tokenizer

TRAIN = Quantity("train_mb_per_second")
TRAIN_MEMORY = Quantity("train_extra_memory_mb", higher_is_better=False)
TRAIN_TOKENIZER_MEMORY = Quantity("train_tokenizer_peak_memory_mb", higher_is_better=None)
FILE_FIRST = Quantity("encode_file_first_pass_mb_per_second")
FILE_SECOND = Quantity("encode_file_second_pass_mb_per_second")
LISTS_FIRST = Quantity("encode_documents_first_pass_mb_per_second")
LISTS_SECOND = Quantity("encode_documents_second_pass_mb_per_second")
DECODE_ARRAY = Quantity("decode_array_mb_per_second")
DECODE_LIST = Quantity("decode_list_mb_per_second")
MAKE_DATA = Quantity("make_data_mb_per_second")
MAKE_DATA_TIME = Quantity("make_data_over_encode_file_time", higher_is_better=None)

SAMPLE_VOCAB_SIZE = 300
PAGE_BYTES = 4096

Facts = dict[str, dict[str, Any]]
"""candidate -> more entries for its line."""

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One measurement: a task takes this and returns the values of its rounds and facts about the candidates."""

    path: Path
    sample: Path
    tokenizer: Path
    candidates: tuple[str, ...]
    vocab_size: int
    threads: int
    separator: str
    engine: Engine
    measure: MeasureConfig

    def trainer(self, name: str, *, of_sample: bool = False) -> Trainer:
        """Return a candidate that is ready to train on the text, or to learn a few merges from the sample."""
        path, vocab_size = (self.sample, SAMPLE_VOCAB_SIZE) if of_sample else (self.path, self.vocab_size)
        return TRAINERS[name](Training(path, vocab_size, self.separator, self.threads, self.engine))

    def encoder(self, name: str) -> Encoder:
        """Return a candidate that has encoded only an empty text, for which it has built its tables."""
        encoder = ENCODERS[name](Tokenizer.from_directory(self.tokenizer), self.threads, self.engine)
        encoder.encode_documents([""])
        return encoder

    def timed(self, function: Callable[[], T]) -> tuple[float, T]:
        """Return the seconds of a call, and its result."""
        results: list[T] = []
        seconds = timed(lambda: results.append(function()), clock=CLOCKS[self.measure.clock])
        return seconds, results[0]

    def rounds(self, run: Callable[[Case, str], Sample]) -> Series:
        """Run all candidates on the sample, then in rounds on the text."""
        for name in self.candidates:
            run(replace(self, path=self.sample, vocab_size=SAMPLE_VOCAB_SIZE), name)
        runs = {name: partial(run, self, name) for name in self.candidates}
        return run_rounds(runs, warmup=self.measure.warmup, repeats=self.measure.repeats)


def train(case: Case) -> tuple[Series, Facts]:
    """Train on the file, including reading it; compare what was learned."""
    trained: dict[str, Trainer] = {}

    def run(case: Case, name: str) -> Sample:
        trained[name] = case.trainer(name)
        seconds, _ = case.timed(trained[name].train)
        return {TRAIN.name: _megabytes(case.path) / seconds}

    series = case.rounds(run)
    merges = {name: trainer.merges() for name, trainer in trained.items()}
    facts: Facts = {}
    for name, learnt in merges.items():
        equal = [other for other in merges if other != name and same_merges(learnt, merges[other])]
        facts[name] = {"merges": len(learnt), "merges_equal_to": equal}
        facts[name] |= {} if name == OURS else {"merges_equal": OURS in equal}
    return series, facts


def train_memory(case: Case) -> tuple[Series, Facts]:
    """Train once, and take the peak above what the process held after training on the sample."""
    (name,) = case.candidates
    case.trainer(name, of_sample=True).train()
    trainer = case.trainer(name)
    reset_peak_rss()
    before = peak_rss_bytes()
    trainer.train()
    after = peak_rss_bytes()
    if before is None or after is None:
        return {}, {}
    extra = max(after - before, PAGE_BYTES)  # never zero, or there would be no ratio
    return {name: {TRAIN_MEMORY.name: [extra / 1e6]}}, {name: {"peak_memory_mb": after / 1e6}}


def train_tokenizer(case: Case) -> tuple[Series, Facts]:
    """Run the command `train-tokenizer`, and take the peak of its process."""
    from cli.train_tokenizer import train_tokenizer as run
    from config.schemas import LoggingConfig
    from config.train_tokenizer import TokenizerConfig, TrainTokenizerConfig

    with tempfile.TemporaryDirectory() as folder:
        config = TrainTokenizerConfig(
            input=[str(case.path)],
            output_dir=Path(folder) / "tokenizer",
            workers=case.threads,
            tokenizer=TokenizerConfig(vocab_size=case.vocab_size, special_tokens=[case.separator], engine=case.engine),
            logging=LoggingConfig(backend=["noop"]),
        )
        run(config)
    peak = peak_rss_bytes()
    return ({OURS: {TRAIN_TOKENIZER_MEMORY.name: [peak / 1e6]}} if peak else {}), {}


def encode_file(case: Case) -> tuple[Series, Facts]:
    """Encode the file to an array, twice."""
    ids: dict[str, Any] = {}
    equal = dict.fromkeys(case.candidates, True)

    def run(case: Case, name: str) -> Sample:
        encoder = case.encoder(name)
        first, ids[name] = case.timed(partial(encoder.encode_file, case.path))
        second, again = case.timed(partial(encoder.encode_file, case.path))
        equal[name] &= np.array_equal(ids[name], ids[OURS]) and np.array_equal(again, ids[OURS])
        size = _megabytes(case.path)
        return {FILE_FIRST.name: size / first, FILE_SECOND.name: size / second}

    return case.rounds(run), _equality("ids_equal", equal)


def encode_documents(case: Case) -> tuple[Series, Facts]:
    """Encode the documents, which are strings, to Python lists, twice."""
    ids: dict[str, Any] = {}
    equal = dict.fromkeys(case.candidates, True)

    def run(case: Case, name: str) -> Sample:
        documents = _documents(case)
        encoder = case.encoder(name)
        first, lists = case.timed(partial(encoder.encode_documents, documents))
        ids[name] = np.fromiter(chain.from_iterable(lists), dtype=np.uint32)
        del lists  # before the second pass, which creates as many objects
        second, _ = case.timed(partial(encoder.encode_documents, documents))
        equal[name] &= np.array_equal(ids[name], ids[OURS])
        size = _megabytes(case.path)
        return {LISTS_FIRST.name: size / first, LISTS_SECOND.name: size / second}

    series = case.rounds(run)
    facts, number = _equality("ids_equal", equal), len(_documents(case))
    return series, {name: {"documents": number} | facts.get(name, {}) for name in case.candidates}


def decode(case: Case) -> tuple[Series, Facts]:
    """Decode the file's ids: from an array to bytes, from a list to text."""
    equal = dict.fromkeys(case.candidates, True)
    ids_of = {path: case.encoder(OURS).encode_file(path) for path in (case.path, case.sample)}

    def run(case: Case, name: str) -> Sample:
        encoder = case.encoder(name)
        ids, numbers = encoder.own_array(ids_of[case.path]), ids_of[case.path].tolist()
        from_array, data = case.timed(partial(encoder.decode_array, ids))
        from_list, text = case.timed(partial(encoder.decode_list, numbers))
        equal[name] &= data == case.path.read_bytes() and text == data.decode()
        size = _megabytes(case.path)
        return {DECODE_ARRAY.name: size / from_array, DECODE_LIST.name: size / from_list}

    return case.rounds(run), _equality("text_equal", equal)


def make_data(case: Case) -> tuple[Series, Facts]:
    """Make a token file from the text as `make-data` does, and compare with only encoding the file."""
    from databuilder.dataset_builder import build_dataset

    def run(case: Case, name: str) -> Sample:
        encoding, _ = case.timed(partial(case.encoder(name).encode_file, case.path))
        tokenizer = Tokenizer.from_directory(case.tokenizer, engine=case.engine)
        tokenizer.encode_batch([""])
        with tempfile.TemporaryDirectory(dir=case.path.parent) as folder:
            build = partial(
                build_dataset, case.path, tokenizer=tokenizer, train_path=Path(folder) / "train.npy",
                separator=case.separator, num_workers=case.threads,
            )  # fmt: skip
            making, _ = case.timed(build)
        return {MAKE_DATA.name: _megabytes(case.path) / making, MAKE_DATA_TIME.name: making / encoding}

    return case.rounds(run), {}


@dataclass(frozen=True)
class TaskSpec:
    """How a task runs.

    Args:
        run: the measurement.
        candidates: the libraries that can do it.
        quantities: what it measures.
        trains: run for each vocabulary size; otherwise with the largest, which ours has learned before.
        alone: each candidate has a process of its own.
        one_thread: run with one thread only.
    """

    run: Callable[[Case], tuple[Series, Facts]]
    candidates: Collection[str]
    quantities: tuple[Quantity, ...]
    trains: bool = False
    alone: bool = False
    one_thread: bool = False


TASKS: dict[str, TaskSpec] = {
    "train": TaskSpec(train, TRAINERS, (TRAIN,), trains=True),
    "train_memory": TaskSpec(train_memory, TRAINERS, (TRAIN_MEMORY,), trains=True, alone=True),
    "train_tokenizer": TaskSpec(train_tokenizer, (OURS,), (TRAIN_TOKENIZER_MEMORY,), trains=True),
    "encode_file": TaskSpec(encode_file, ENCODERS, (FILE_FIRST, FILE_SECOND)),
    "encode_documents": TaskSpec(encode_documents, ENCODERS, (LISTS_FIRST, LISTS_SECOND)),
    "decode": TaskSpec(decode, ENCODERS, (DECODE_ARRAY, DECODE_LIST), one_thread=True),
    "make_data": TaskSpec(make_data, (OURS,), (MAKE_DATA, MAKE_DATA_TIME)),
}


def run_task(task: str, case: Case) -> tuple[Series, Facts]:
    """Run a task, and keep what libraries print off stdout and stderr."""
    with _quiet():
        return TASKS[task].run(case)


def train_for_encoding(case: Case) -> None:
    """Train our tokenizer, and save it where the other tasks look for it."""
    with _quiet():
        trainer = case.trainer(OURS)
        trainer.train()
    vocab, merges = trainer.trained
    Tokenizer(vocab, merges, [case.separator]).save(case.tokenizer)


def _equality(fact: str, equal: dict[str, bool]) -> Facts:
    """Say for each peer whether its results always equalled ours."""
    return {name: {fact: same} for name, same in equal.items() if name != OURS}


def _documents(case: Case) -> list[str]:
    return [text for text in case.path.read_bytes().decode().split(case.separator) if text]


def _megabytes(path: Path) -> float:
    return path.stat().st_size / 1e6


@contextmanager
def _quiet() -> Iterator[None]:
    """Point the file descriptors of stdout and stderr to the null device; some libraries write there without Python."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
        for copy in (*saved, nowhere):
            os.close(copy)
