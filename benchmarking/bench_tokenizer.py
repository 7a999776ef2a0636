"""The tokenizer against other libraries: training, encoding, decoding, and the overhead of our commands.

    python -m benchmarking.bench_tokenizer --config config/resources/bench_tokenizer.toml

`tokenizer/tasks.py` says what is measured, `tokenizer/trainers.py` and `tokenizer/encoders.py` say who is compared.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("benchmarking.bench_tokenizer")

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarking.harness import OURS, Report, Series, clock_of
from benchmarking.machine import describe, is_installed
from cli.terminal import note
from cli.utils import Command
from cli.utils import main as run_command
from config.bench_tokenizer import BenchTokenizerConfig

if TYPE_CHECKING:
    from benchmarking.tokenizer.tasks import Case, Facts
    from transformerlm.tokenizer.engines import Engine

REFERENCE = "reference"
SAMPLE_BYTES = 50_000


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    name = "python -m benchmarking.bench_tokenizer"
    run_command(Command(name, BenchTokenizerConfig, bench_tokenizer, default_config="bench_tokenizer.toml"), argv)


def bench_tokenizer(config: BenchTokenizerConfig) -> None:
    """Measure as the configuration says; JSON lines on stdout, a table on stderr."""
    from benchmarking.tokenizer.tasks import Case

    for threads in config.threads:
        clock_of(config.measure.clock, threads=threads)
    engine = _engine(config)
    candidates = (OURS, *(peer for peer in config.peers if _takes_part(peer, engine)))
    environment = describe(threads=max(config.threads), packages=["numba", *config.peers])
    report = Report("tokenizer", environment | {"clock": config.measure.clock})
    kinds: Sequence[str | None] = config.kinds or [None]
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            for size, path in write_texts(config, Path(folder), kind=kind):
                case = Case(
                    path, path.with_name("sample.txt"), path.with_suffix(".tokenizer"), candidates,
                    max(config.vocab_sizes), 1, config.separator, engine, config.measure,
                )  # fmt: skip
                write_sample(path, case.sample)
                _measure_text(config, case, {"size_mb": size} | ({"kind": kind} if kind else {}), report)
    note(report.table())


def _measure_text(config: BenchTokenizerConfig, case: Case, params: dict[str, Any], report: Report) -> None:
    """Run all tasks on one text."""
    from benchmarking.tokenizer.tasks import TASKS

    facts = {"sources": _sources(config, params["kind"])} if "kind" in params else {}
    if any(not TASKS[task].trains for task in config.tasks):
        _train_for_encoding(case)
    for task in config.tasks:
        spec = TASKS[task]
        vocab_sizes = config.vocab_sizes if spec.trains else [case.vocab_size]
        for vocab_size, threads in product(vocab_sizes, [1] if spec.one_thread else config.threads):
            _measure(task, replace(case, vocab_size=vocab_size, threads=threads), params, facts, report)


def write_texts(config: BenchTokenizerConfig, folder: Path, *, kind: str | None = None) -> list[tuple[float, Path]]:
    """Write each size of the text to a file of its own; return megabytes and file, the smallest first.

    Of a kind there is what the packages ship: all of it where that is less than a size, no file where there is none.

    Raises:
        ValueError: there is no text, or less than the smallest size.
        FileNotFoundError: a text file that does not exist.
    """
    largest = int(max(config.sizes_mb, default=0) * 1e6)
    whole = folder / "text.txt"
    with whole.open("wb") as file:
        for data in _documents_of(config, kind) if kind else _blocks(config, largest or None):
            file.write(data)
            if largest and file.tell() >= largest:
                break
    found = whole.stat().st_size
    if kind and not found:
        _say_what_is_missing(config, kind)
        return []
    if not found:
        raise ValueError(f"text: expected some text to measure on, found none in {', '.join(config.text)}")
    sizes = [size for size in sorted(config.sizes_mb) if size * 1e6 <= found]
    if not config.sizes_mb or (kind and not sizes):
        return [(round(found / 1e6, 1), whole)]
    for size in sorted(set(config.sizes_mb) - set(sizes)):
        note(f"sizes_mb: {size:g} is left out, the text has {found / 1e6:.1f} MB")
    if not sizes:
        raise ValueError(
            f"sizes_mb: expected a size of at most {found / 1e6:.1f}, which is all the text there is, found "
            f"{min(config.sizes_mb):g} (name more text, or take sizes_mb = [] for all of it)"
        )
    return [(size, _first_bytes(whole, folder / f"text-{size:g}.txt", int(size * 1e6))) for size in sizes]


def _documents_of(config: BenchTokenizerConfig, kind: str) -> Iterator[bytes]:
    """Yield a kind of text, the separator after each document."""
    from benchmarking.tokenizer.corpora import CORPORA

    for document in CORPORA[kind].documents(config.debian_root):
        yield f"{document}\n{config.separator}\n".encode()


def _sources(config: BenchTokenizerConfig, kind: str) -> str:
    from benchmarking.tokenizer.corpora import CORPORA

    return ", ".join(CORPORA[kind].sources(config.debian_root))


def _say_what_is_missing(config: BenchTokenizerConfig, kind: str) -> None:
    from benchmarking.tokenizer.corpora import CORPORA

    names = " ".join(CORPORA[kind].debian)
    note(
        f"{kind}: skipped, as {config.debian_root} has no files of Debian's {names} (apt-get download {names}, unpack "
        f"each with dpkg-deb -x FILE.deb FOLDER, and name it by --debian_root=FOLDER)"
    )


def write_sample(path: Path, sample: Path) -> None:
    """Write the beginning of the text, on which everything runs once before it is measured."""
    _first_bytes(path, sample, SAMPLE_BYTES)


def _blocks(config: BenchTokenizerConfig, max_bytes: int | None) -> Iterator[bytes]:
    """Yield the text with the separator between documents; of docstrings, a little more than `max_bytes`."""
    separator = f"\n{config.separator}\n".encode()
    if config.text:
        from transformerlm.utils.text_files import expand_inputs, read_text

        ended = False
        for path in expand_inputs(config.text):
            for block in read_text(path):
                yield (separator if ended else b"") + block.text.encode("utf-8", "replace")
                ended = block.ends_document
    else:
        from databuilder.docstring_corpus import collect_docstrings

        for document in collect_docstrings(max_bytes=max_bytes and max_bytes + 10**5):
            yield document.encode() + separator


def _first_bytes(source: Path, target: Path, size: int) -> Path:
    """Copy the beginning of a text, without a character that would be cut in two."""
    with source.open("rb") as file:
        data = file.read(size + 1)
    while size < len(data) and data[size] & 0xC0 == 0x80:  # not the first byte of a character
        size -= 1
    target.write_bytes(data[:size])
    return target


def _train_for_encoding(case: Case) -> None:
    from benchmarking.fresh_process import in_fresh_process
    from benchmarking.tokenizer.tasks import train_for_encoding

    note(f"training {case.vocab_size:,} ids to encode with")
    in_fresh_process(train_for_encoding, case)


def _measure(task: str, case: Case, params: dict[str, Any], more_facts: dict[str, Any], report: Report) -> None:
    """Run a task in processes of its own and report it; the facts given are those of every candidate."""
    from benchmarking.fresh_process import in_fresh_process
    from benchmarking.tokenizer.tasks import TASKS, run_task

    spec = TASKS[task]
    case = replace(case, candidates=tuple(name for name in case.candidates if name in spec.candidates))
    what = f"{params.get('kind', 'text')}, {params['size_mb']:g} MB, {case.vocab_size:,} ids, threads {case.threads}"
    note(f"{task}: {what}: {', '.join(case.candidates)}")
    params = params | {"bytes": case.path.stat().st_size, "vocab_size": case.vocab_size}
    params |= {"threads": case.threads, "engine": case.engine}
    series: Series = {}
    facts: Facts = {}
    with _peer_threads(case.threads):
        for names in [(name,) for name in case.candidates] if spec.alone else [case.candidates]:
            (found, more), _ = in_fresh_process(run_task, task, replace(case, candidates=names))
            series |= found
            facts |= more
    facts = {name: facts.get(name, {}) | more_facts for name in series}
    for name, entries in facts.items():
        _warn_of_differences(name, entries)
    warmup = 0 if spec.alone else case.measure.warmup
    for quantity in spec.quantities:
        report.add(quantity, series, params=params, warmup=warmup, facts=facts)


def _warn_of_differences(name: str, facts: dict[str, Any]) -> None:
    """Report what must not happen: other ids or text, or merges that differ from the reference engine's."""
    for fact, same in facts.items():
        if same is False and (fact != "merges_equal" or name == REFERENCE):
            note(f"{name}: {fact} = false: its speed is that of another result")


def _engine(config: BenchTokenizerConfig) -> Engine:
    """Return the engine to measure, so that it does not change with the size of the text."""
    if config.engine == "auto":
        return "compiled" if is_installed("numba") else "reference"
    return config.engine


def _takes_part(peer: str, engine: str) -> bool:
    if peer == REFERENCE:
        return engine != REFERENCE
    if not is_installed(peer):
        note(f"{peer} is not installed: skipped (pip install {peer})")
        return False
    return True


@contextmanager
def _peer_threads(threads: int) -> Iterator[None]:
    """Tell the peers how many threads to use; they read this before they first compute in a process."""
    wanted = {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false"}
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
