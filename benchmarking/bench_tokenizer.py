"""Training and encoding speed of the tokenizer, and bytes per token, against `tokenizers` and `tiktoken`.

    python -m benchmarking.bench_tokenizer --config config/resources/bench_tokenizer.toml

One document is one call. The first pass of an encoder starts cold; the second encodes the same text again, so that what
it remembers of pre-tokens counts.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarking.harness import OURS, Clock, Quantity, Report, Sample, Series, clock_of, run_rounds, timed
from benchmarking.machine import describe, is_installed
from cli.utils import Command, note
from cli.utils import main as run_command
from config.bench_tokenizer import BenchTokenizerConfig

if TYPE_CHECKING:
    from benchmarking.tokenizer_peers import Encoder

TRAIN = Quantity("train_mb_per_second")
TRAIN_MEMORY = Quantity("train_peak_memory_mb", higher_is_better=False)
BYTES_PER_TOKEN = Quantity("bytes_per_token", higher_is_better=None)
FIRST_PASS = Quantity("encode_first_pass_mb_per_second")
SECOND_PASS = Quantity("encode_second_pass_mb_per_second")
BATCH = Quantity("encode_batch_mb_per_second")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    name = "python -m benchmarking.bench_tokenizer"
    run_command(Command(name, BenchTokenizerConfig, bench_tokenizer, default_config="bench_tokenizer.toml"), argv)


def bench_tokenizer(config: BenchTokenizerConfig) -> None:
    """Measure as the configuration says; JSON lines on stdout, a table on stderr."""
    clock = clock_of(config.measure.clock, threads=config.workers)
    peers: list[str] = [peer for peer in config.peers if _is_there(peer)]
    with tempfile.TemporaryDirectory() as folder, _peer_threads(config.workers):
        path = Path(folder) / "text.txt"
        documents = write_text(config, path)
        environment = describe(threads=config.workers, packages=config.peers) | {"clock": config.measure.clock}
        report = Report("tokenizer", environment)
        tokenizer = _bench_training(config, peers, path, documents, report, clock)
        _bench_encoding(config, peers, tokenizer, documents, report, clock)
    note(report.table())


def write_text(config: BenchTokenizerConfig, path: Path) -> list[str]:
    """Write the text to measure on to one file, at most `max_bytes` of it, and return its documents.

    Raises:
        ValueError: there is no text, or the docstrings cannot be found.
        FileNotFoundError: a text file that is not there.
    """
    if config.text:
        from transformerlm.utils.text_files import expand_inputs, read_text

        blocks = (block.text for file in expand_inputs(config.text) for block in read_text(file))
        text = _first_bytes(blocks, config.max_bytes)
    else:
        from databuilder.docstring_corpus import collect_docstrings

        text = f"\n{config.separator}\n".join(collect_docstrings(max_bytes=config.max_bytes))
    path.write_bytes(text.encode("utf-8", "replace"))
    documents = [document for document in text.split(config.separator) if document]
    if not documents:
        raise ValueError(f"text: expected some text to measure on, found none in {', '.join(config.text)}")
    return documents


def _bench_training(
    config: BenchTokenizerConfig, peers: list[str], path: Path, documents: list[str], report: Report, clock: Clock
) -> Any:
    """Measure training, and return our tokenizer."""
    from benchmarking.fresh_process import in_fresh_process
    from benchmarking.tokenizer_peers import TRAINERS, num_tokens

    names = [OURS, *(peer for peer in peers if peer in TRAINERS)]
    params = _params(config, documents)
    note(f"training on {path.stat().st_size / 1e6:.1f} MB: {', '.join(names)}")
    arguments = (path, config.vocab_size, config.separator, config.workers)
    trained: dict[str, Any] = {}
    candidates = {
        name: partial(_train, partial(TRAINERS[name], *arguments), path, trained, name, clock) for name in names
    }
    series = run_rounds(candidates, warmup=config.measure.warmup, repeats=config.measure.repeats)
    report.add(TRAIN, series, params=params, warmup=config.measure.warmup)

    memory: Series = {}
    for name in names:
        _, peak = in_fresh_process(_train_only, name, arguments)
        memory[name] = {TRAIN_MEMORY.name: [peak / 1e6]} if peak else {}
    report.add(TRAIN_MEMORY, memory, params=params, warmup=0)

    size = sum(len(document.encode()) for document in documents)
    ratios: Series = {
        name: {BYTES_PER_TOKEN.name: [size / num_tokens(found, documents)]} for name, found in trained.items()
    }
    report.add(BYTES_PER_TOKEN, ratios, params=params, warmup=0)
    return trained[OURS]


def _train(trainer: Callable[[], Any], path: Path, trained: dict[str, Any], name: str, clock: Clock) -> Sample:
    """Train once; `trained[name]` keeps what came out."""

    def train() -> None:
        trained[name] = trainer()

    return {TRAIN.name: path.stat().st_size / 1e6 / timed(train, clock=clock)}


def _train_only(name: str, arguments: tuple[Any, ...]) -> None:
    from benchmarking.tokenizer_peers import TRAINERS

    TRAINERS[name](*arguments)


def _bench_encoding(
    config: BenchTokenizerConfig, peers: list[str], tokenizer: Any, documents: list[str], report: Report, clock: Clock
) -> None:
    from benchmarking.tokenizer_peers import ENCODERS

    names = [OURS, *peers]
    note(f"encoding {len(documents):,} documents: {', '.join(names)}")
    ids: dict[str, list[int]] = {}
    candidates = {
        name: partial(
            _encode,
            partial(ENCODERS[name], tokenizer),
            documents,
            config.workers,
            partial(ids.__setitem__, name),
            clock,
        )
        for name in names
    }
    series = run_rounds(candidates, warmup=config.measure.warmup, repeats=config.measure.repeats)
    facts = {name: {"ids_equal": ids[name] == ids[OURS]} for name in peers}
    for name in peers:
        if not facts[name]["ids_equal"]:
            note(f"{name} gives other ids than ours: its speed is that of another result")
    for quantity in (FIRST_PASS, SECOND_PASS, BATCH):
        report.add(quantity, series, params=_params(config, documents), warmup=config.measure.warmup, facts=facts)


def _encode(
    make: Callable[[], Encoder],
    documents: list[str],
    workers: int,
    keep: Callable[[list[int]], None],
    clock: Clock,
) -> Sample:
    """Encode all documents one by one, twice, and with several workers in batches; `keep` is given the ids."""
    encoder = make()
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    encoded: list[list[int]] = []

    def encode_all() -> None:
        encoded[:] = [encoder.encode(document) for document in documents]

    passes = [megabytes / timed(encode_all, clock=clock) for _ in range(2)]
    keep(list(chain.from_iterable(encoded)))
    sample = dict(zip((FIRST_PASS.name, SECOND_PASS.name), passes, strict=True))
    if workers > 1:
        sample[BATCH.name] = megabytes / timed(partial(make().encode_batch, documents, workers), clock=clock)
    return sample


def _params(config: BenchTokenizerConfig, documents: list[str]) -> dict[str, Any]:
    size = sum(len(document.encode()) for document in documents)
    return {"bytes": size, "documents": len(documents), "vocab_size": config.vocab_size, "workers": config.workers}


def _is_there(peer: str) -> bool:
    if not is_installed(peer):
        note(f"{peer} is not installed: skipped (pip install {peer})")
        return False
    return True


def _first_bytes(blocks: Iterator[str], max_bytes: int) -> str:
    parts, size = [], 0
    for block in blocks:
        data = block.encode("utf-8", "replace")[: max_bytes - size]
        parts.append(data.decode("utf-8", "ignore"))  # a character cut in two is left out
        size += len(data)
        if size >= max_bytes:
            break
    return "".join(parts)


@contextmanager
def _peer_threads(workers: int) -> Iterator[None]:
    """Give the peers as many threads as we have processes; they read this before their first batch."""
    wanted = {"RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true" if workers > 1 else "false"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


if __name__ == "__main__":
    main(sys.argv[1:])
