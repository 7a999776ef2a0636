"""Training a tokenizer on parts of the text that many machines count, exactly.

Each part's counts go to a folder of its own (see `transformerlm.distributed.parts_folder`), so a killed process costs
the parts in hand. Counts are whole numbers, so adding them up gives the same sums in any order, and the merges depend
on nothing else: they are those of one pass over the text, whatever the parts, the engine and the machines.

A part's words are in four arrays without pickles. `words.npy` holds their bytes one after the other, `sizes.npy` how
many bytes each has, `counts.npy` how often it occurs. They are ordered by `NUM_GROUPS` groups, which a hash of a word's
bytes assigns it to; `groups.npy` says where each group ends. Up to `MERGE_ALONE` parts are added up by one process.
With more, adding up is shared out, too: a word is in the same group in every part, so each group is added up by itself.
Memory is bounded by the distinct words, whatever the number of parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config.schemas import ClusterConfig
from transformerlm.distributed.parts_folder import PartsFolder, is_abandoned
from transformerlm.distributed.work import Facts, Part
from transformerlm.tokenizer.bpe_trainer import (
    add_word_lists,
    check_request,
    count_words,
    learn_from_lists,
    name_inputs,
    sample_of,
    takes_kernels,
    vocabulary_of,
)
from transformerlm.tokenizer.counting import WordList
from transformerlm.tokenizer.engines import Engine, check_engine
from transformerlm.tokenizer.parallel import ProgressCallback
from transformerlm.tokenizer.pretokenize import DEFAULT_PATTERN, SpecialTokenSplitter
from transformerlm.tokenizer.reading import SafeCuts
from transformerlm.utils.files import naming
from transformerlm.utils.text_files import ReadStats, expand_inputs, read_text, total_bytes
from transformerlm.utils.text_parts import DocumentEnds, FindCut, TextPart, find_parts, gather_parts

NUM_GROUPS = 64
MERGE_ALONE = 1000
"""Up to this many parts one process adds them up; it takes seconds."""

_FILES = ("words", "sizes", "counts", "groups")
_FACTS = ("disk_bytes", "invalid_utf8", "documents", "chosen_documents")  # of `ReadStats`
_SAVING = "saving"
_MIXERS = tuple(np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Request:
    """What counts depend on besides the text; a JSON object by `dataclasses.asdict`. See `train_bpe`."""

    special_tokens: list[str]
    pattern: str = DEFAULT_PATTERN
    text_field: str = "text"
    allow_special: bool = False
    refuse_invalid: bool = False
    sample: float | None = None

    def find_cut(self) -> FindCut:
        """Return where plain text may be cut: between words, but not within the documents of a sample."""
        if self.sample is None:
            return SafeCuts(SpecialTokenSplitter(self.special_tokens, pattern=self.pattern))
        if not self.special_tokens:
            return lambda file, at: file.seek(0, 2)
        return DocumentEnds(self.special_tokens[0], self.special_tokens)


@dataclass(frozen=True)
class Means:
    """How the counting is done, which the result does not depend on; `part_bytes` is by default `cluster.part_mb`."""

    cluster: ClusterConfig
    part_bytes: int | None = None
    engine: Engine = "auto"
    num_workers: int | None = None
    memory_limit_mb: float | None = None
    progress: ProgressCallback | None = None
    stats: ReadStats = field(default_factory=ReadStats)


class Trained(NamedTuple):
    """A vocabulary and its merges, as `train_bpe` returns them."""

    vocab: dict[int, bytes]
    merges: list[tuple[bytes, bytes]]


@contextmanager
def trained_by_parts(
    inputs: Sequence[str],
    vocab_size: int,
    request: Request,
    *,
    folder: Path,
    means: Means,
    is_saved: Callable[[], bool],
    restart: bool = False,
) -> Iterator[Trained | None]:
    """Count the text by parts in `folder`, learn the merges, and give them to the block, which saves them.

    When the block ends without an error, the folder is removed. After an error, or a kill, the same call goes on with
    the parts that are done. Several processes may call it at once (`cluster.on = "share"`): the one that finds all
    parts done gets the merges, the others None.

    Args:
        inputs: files, folders and globs.
        vocab_size: as in `train_bpe`.
        request: what the counts depend on.
        folder: where the parts go, which all processes see.
        means: who counts, and how.
        is_saved: returns whether the block has saved the tokenizer; so a share that comes late has nothing to do.
        restart: throw away parts of other settings instead of refusing them.

    Raises:
        As `train_bpe` and `PartsFolder`; ValueError, too, for an input that is no file.
    """
    check_request(vocab_size, request.special_tokens)
    check_engine(means.engine, pattern=request.pattern)
    sample_of(request.sample, request.special_tokens)
    paths = [path.absolute() for path in expand_inputs(inputs)]
    _check_are_files(paths)
    part_bytes = means.part_bytes or means.cluster.part_mb * 1_000_000
    settings = {
        "command": "train-tokenizer", "inputs": [_facts_of(path) for path in paths], "part_bytes": part_bytes,
        "vocab_size": vocab_size, **asdict(request),
    }  # fmt: skip

    def list_items() -> list[Any]:
        parts = find_parts(paths, part_bytes=part_bytes, find_cut=request.find_cut())
        return [[asdict(part) for part in group] for group in gather_parts(parts, part_bytes=part_bytes)]

    opened = PartsFolder(folder, settings, list_items=list_items, cluster=means.cluster, restart=restart)
    with opened as parts, ExitStack() as stack:
        trained = None
        try:
            if means.cluster.on == "share" and is_saved() and not is_saving(folder):
                parts.remove()  # which this process has created, after another one had removed it
            else:
                trained = _train(parts, paths, vocab_size, request, means, stack=stack)
        except FileNotFoundError:
            if means.cluster.on != "share" or parts.is_there:
                raise
        yield trained
        if trained is not None:
            parts.remove()


def parts_path(output: Path) -> Path:
    """Return the folder of the parts of an output, which is beside it."""
    named = output if output.name not in ("", "..") else output.resolve()
    return named.with_name(f"{named.name}.parts")


def is_saving(folder: Path) -> bool:
    """Return whether the parts in a folder are all counted, and a tokenizer is being saved or the saving was killed.

    A folder whose removal was killed is no longer saving: its tokenizer is complete.
    """
    return (folder / _SAVING).exists() and not is_abandoned(folder)


def count_part(
    folder: Path,
    *,
    pieces: Sequence[Mapping[str, Any]],
    request: Mapping[str, Any],
    engine: Engine,
    engine_bytes: int,
    num_workers: int | None,
    memory_limit_mb: float | None,
) -> Facts:
    """Write the counts of some text to a folder, and return what reading it met; `engine_bytes` are those of all."""
    texts, wanted = [TextPart(**piece) for piece in pieces], Request(**request)
    stats = ReadStats(wanted.refuse_invalid)
    words = count_words(
        texts, wanted.special_tokens, compiled=takes_kernels(engine, engine_bytes, pattern=wanted.pattern),
        num_workers=num_workers, text_field=wanted.text_field, allow_special=wanted.allow_special,
        pattern=wanted.pattern, stats=stats, memory_limit_mb=memory_limit_mb,
        sample=sample_of(wanted.sample, wanted.special_tokens),
    )  # fmt: skip
    write_words(folder, words)
    return {name: getattr(stats, name) for name in _FACTS}


def merge_group(folder: Path, *, parts: str, names: Sequence[str], group: int, compiled: bool) -> Facts:
    """Add up one group of all parts' words and write it to a folder."""
    words = (read_words(Path(parts) / name, slice(group, group + 1)) for name in names)
    write_words(folder, add_word_lists(words, compiled=compiled))
    return {}


def write_words(folder: Path, words: WordList) -> None:
    """Write counted words to a folder, group by group."""
    sizes = np.diff(words.ends, prepend=0)  # (words,)
    group_of = _group_of(words.data, words.ends, sizes)
    order = np.argsort(group_of, kind="stable")
    ends = np.cumsum(np.bincount(group_of, minlength=NUM_GROUPS))  # of the groups, in words
    num_bytes = np.r_[0, np.cumsum(sizes[order])]
    laid_out = np.empty(int(num_bytes[-1]), dtype=np.uint8)
    start = 0
    for end in ends.tolist():  # group by group, as the places of bytes take eight times their room
        own = order[start:end]
        shifts = np.repeat(words.ends[own] - num_bytes[start + 1 : end + 1], sizes[own])
        first, last = int(num_bytes[start]), int(num_bytes[end])
        laid_out[first:last] = words.data[np.arange(first, last) + shifts]
        start = end
    groups = np.stack([ends, num_bytes[ends]], axis=1).astype(np.int64, order="C")  # (groups, 2), in words and in bytes
    arrays: tuple[Array, ...] = (
        laid_out,
        sizes[order].astype(np.uint32),
        words.counts[order].astype(np.uint64),
        groups,
    )
    for name, array in zip(_FILES, arrays, strict=True):
        path = folder / f"{name}.npy"
        with naming(path), path.open("wb") as file:  # numpy itself would not say why a write fails, nor where
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.data)


def read_words(folder: Path, groups: slice = slice(0, NUM_GROUPS)) -> WordList:
    """Return the words in a folder, or those of some groups."""
    data, sizes, counts, ends = (np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _FILES)
    first, start = ends[groups.start - 1].tolist() if groups.start else (0, 0)
    last, end = ends[groups.stop - 1].tolist()
    own = np.zeros(end - start + 8, dtype=np.uint8)
    own[: end - start] = data[start:end]
    return WordList(own, np.cumsum(sizes[first:last], dtype=np.int64), np.array(counts[first:last]))


def _group_of(data: Array, ends: Array, sizes: Array) -> Array:
    """Return the group of each word, int64 `(words,)`: a hash of its first and last eight bytes and its length."""
    # Eight bytes from each place on, as a number: (bytes - 7,).
    eights: Array = np.ndarray((max(0, len(data) - 7),), dtype="<u8", buffer=data, strides=(1,))
    starts = ends - sizes
    unused = (8 * (8 - np.minimum(sizes, 8))).astype(np.uint64)  # bits of the next word
    digest = sizes.astype(np.uint64) * _MIXERS[0]
    for places, mixer in ((starts, _MIXERS[1]), (np.maximum(starts, ends - 8), _MIXERS[2])):
        digest ^= (eights[places] << unused) * mixer
        digest ^= digest >> np.uint64(29)
        digest *= _MIXERS[0]
    groups: Array = (digest >> np.uint64(58)).astype(np.int64)
    return groups


def _train(
    parts: PartsFolder, paths: Sequence[Path], vocab_size: int, request: Request, means: Means, *, stack: ExitStack
) -> Trained | None:
    """Return what was learned, and hold the right to save it until the stack ends; None if another process has it."""
    facts = _count_all(parts, request, means)
    compiled = takes_kernels(means.engine, total_bytes(paths), pattern=request.pattern)
    groups = None if facts is None else _merge_groups(parts, list(facts), compiled=compiled)
    if facts is None or groups is None or not stack.enter_context(parts.alone("tokenizer")) or not parts.is_there:
        return None
    merges = learn_from_lists(
        groups, vocab_size - 256 - len(request.special_tokens), compiled=compiled,
        where=name_inputs(paths, request.sample),
        memory_limit_mb=means.memory_limit_mb, progress=means.progress,
    )  # fmt: skip
    _fill(means.stats, facts, paths, text_field=request.text_field)
    (parts.path / _SAVING).touch()
    return Trained(vocabulary_of(merges, request.special_tokens), merges)


def _count_all(parts: PartsFolder, request: Request, means: Means) -> dict[str, Facts] | None:
    """Do the parts that are left; None if other shares are still doing some."""
    on_ray = means.cluster.on == "ray"
    num_workers = (means.num_workers or 1) if on_ray else means.num_workers
    sizes = [sum(piece["num_bytes"] for piece in pieces) for pieces in parts.items]
    shared = {
        "request": asdict(request), "engine": means.engine, "engine_bytes": sum(sizes), "num_workers": num_workers,
        "memory_limit_mb": means.memory_limit_mb,
    }  # fmt: skip
    todo = [Part(f"counts-{n:06}", count_part, {"pieces": pieces, **shared}) for n, pieces in enumerate(parts.items)]
    on_done = _progress_of({part.name: size for part, size in zip(todo, sizes, strict=True)}, means.progress)
    return parts.run(todo, num_cpus=num_workers or 1, wait=len(todo) > MERGE_ALONE, on_done=on_done)


def _progress_of(sizes: Mapping[str, int], progress: ProgressCallback | None) -> Callable[[str, bool], None]:
    """Return what shows the progress of this call: what an earlier one did is not in it."""
    left, total = dict(sizes), sum(sizes.values())
    done = 0

    def on_done(name: str, is_old: bool) -> None:
        nonlocal done, total
        size = left.pop(name, 0)
        if is_old:
            total -= size
            return
        done += size
        if progress is not None:
            progress("count", done, total)

    return on_done


def _merge_groups(parts: PartsFolder, names: Sequence[str], *, compiled: bool) -> Iterator[Iterator[WordList]] | None:
    """Return the words of all parts as `sum_counts` takes them; None if other shares are still adding up."""
    if len(names) <= MERGE_ALONE:
        return iter([(read_words(parts.path / name) for name in names)])
    shared = {"parts": str(parts.path), "names": names, "compiled": compiled}
    todo = [Part(f"words-{group:02}", merge_group, {"group": group, **shared}) for group in range(NUM_GROUPS)]
    facts = parts.run(todo)
    return None if facts is None else (iter([read_words(parts.path / name)]) for name in facts)


def _fill(stats: ReadStats, facts: Mapping[str, Facts], paths: Sequence[Path], *, text_field: str) -> None:
    """Fill the statistics with those of all parts, and with the sample, which no part knows."""
    for path in paths:
        if stats.sample_chars:
            # What the parts have met is not counted again.
            unused = ReadStats(sample_chars=stats.sample_chars)
            for _ in read_text(path, text_field=text_field, stats=unused):
                if not unused.sample_chars:
                    break
            stats.sample, stats.sample_chars = stats.sample + unused.sample, unused.sample_chars
    for name in _FACTS:
        setattr(stats, name, getattr(stats, name) + sum(found[name] for found in facts.values()))


def _facts_of(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"path": str(path), "bytes": status.st_size, "modified": status.st_mtime_ns}


def _check_are_files(paths: Sequence[Path]) -> None:
    for path in paths:
        if not path.is_file():
            raise ValueError(
                f'input: expected files that any process can read, found {path} (cluster.on = "local" takes pipes)'
            )
