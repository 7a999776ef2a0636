"""Parts of the text that were encoded become token files or folders of shards, which then get their names."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

from databuilder.build import Build
from databuilder.parts import EncodedPart, append_source, write_shard
from databuilder.reports import SplitReport, split_report
from databuilder.sources import SourceReport
from transformerlm.distributed.work import UNFINISHED, Facts, has_died, remove, who
from transformerlm.token_files.index import INDEX, Shard, write_index
from transformerlm.token_files.sidecar import sidecar_path
from transformerlm.token_files.writer import TokenFileWriter, publish
from transformerlm.utils import files

SPLITS = ("train", "valid")


def write_token_files(
    folder: Path, *, build: Build, encoded: Sequence[Sequence[EncodedPart]], invalid_utf8: int
) -> Facts:
    """Write the token files with their sidecars, `train/` and `valid/`, under the names of the outputs."""
    dtype, id_bytes = build.dtype, build.id_bytes
    with ExitStack() as stack:
        writers = [
            stack.enter_context(TokenFileWriter(folder / split / path.name, dtype, **build.writing))
            for split, path in zip(SPLITS, build.outputs, strict=False)
        ]
        held = [
            append_source(source, parts, writers, separator_id=build.separator_id, id_bytes=id_bytes)
            for source, parts in zip(build.sources, encoded, strict=True)
        ]
        of_splits = zip(writers, zip(*held, strict=True), strict=True)
        splits = [split_report(writer.path, reports) for writer, reports in of_splits]
        shared = {**build.shared_facts(), "invalid_utf8": invalid_utf8}
        publish(writers, [{**build.own_facts(split), **shared} for split in splits])
    return {"splits": [_as_json(split) for split in splits]}


def write_shard_folders(
    folder: Path,
    *,
    build: Build,
    encoded: Sequence[Sequence[EncodedPart]],
    invalid_utf8: int,
    shards: Mapping[str, Facts],
) -> Facts:
    """Write the folders of shards with their indexes, `train/` and `valid/`, from the shards of each part."""
    names = iter(shards)
    entries: list[list[Shard]] = [[], []]
    reports: list[list[SourceReport]] = [[], []]
    for source, parts in zip(build.sources, encoded, strict=True):
        found: dict[str, list[Shard]] = {"train": [], "valid": [], "more": []}
        for part, name in zip(parts, names, strict=False):
            for kind, entry in shards[name].items():
                found[kind].append(Shard(**entry))
                _link_all(part.folder.parent / name / kind, folder / ("valid" if kind == "valid" else "train"))
        for number, of_split in enumerate((found["train"] * int(source.weight) + found["more"], found["valid"])):
            entries[number] += of_split
            totals = (sum(getattr(one, key) for one in of_split) for key in ("documents", "tokens", "bytes"))
            reports[number].append(SourceReport(source.input, source.weight, *totals))
    splits = []
    for split, path, listed, of_sources in zip(SPLITS, build.outputs, entries, reports, strict=False):
        splits.append(split_report(path, of_sources))
        own = {key: value for key, value in build.own_facts(splits[-1]).items() if key not in ("bytes", "documents")}
        known = {"dtype": build.dtype.name, **own, **build.shared_facts(), "invalid_utf8": invalid_utf8}
        write_index(folder / split, listed or [_empty_shard(build, folder / split)], known)
    return {"splits": [_as_json(split) for split in splits]}


def _link_all(built: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path in built.iterdir():
        _link_or_copy(path, folder / path.name)


def _as_json(split: SplitReport) -> Facts:
    return {key: value for key, value in asdict(split).items() if key != "path"}


def _empty_shard(build: Build, folder: Path) -> Shard:
    """Write a shard without documents, where there are no others."""
    path, dtype = folder / "000000.npy", build.dtype
    return Shard(**write_shard(path, [], dtype=dtype, writing=build.writing, id_bytes=build.id_bytes))


def remove_leftovers(output: Path, *, of_others: bool) -> None:
    """Remove what a process that was killed in `put_in_place` left; `of_others`: also that of other machines."""
    for left in output.parent.glob(f".{glob.escape(output.name)}{UNFINISHED}*"):
        if of_others or has_died(left.name):
            remove(left)


def put_in_place(built: Path, output: Path, *, is_whole: Callable[[], bool]) -> None:
    """Give what is in the folder `built` the names of an output; it stays in `built`, too, so this may be repeated.

    The sidecar, or the index, comes last; an older one goes first. Several processes may do this at once: each has all
    files under names of its own before it touches the output, and leaves alone what is in place already.

    Args:
        built: holds the files.
        output: the token file or the folder of shards.
        is_whole: returns whether all of `built` is still there; another process may be removing it.

    Raises:
        FileNotFoundError: `built` is no longer whole; the output is as it was.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f".{output.name}{UNFINISHED}{who()}")
    new, is_folder = beside / "new", output.suffix == ".shards"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        _link_all(built, new)
        if not is_whole():
            raise FileNotFoundError(f"{built}: another process has put it in place and removed it")
        places = {path: output / path.name if is_folder else output.with_name(path.name) for path in new.iterdir()}
        if all(place.exists() and place.samefile(path) for path, place in places.items()):
            return
        if is_folder:
            _replace_folder(new, output, old=beside / "old")
            return
        sidecar = sidecar_path(output)
        sidecar.unlink(missing_ok=True)
        for path in sorted(places, key=lambda path: path.name == sidecar.name):
            files.move_into_place(path, places[path])
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _replace_folder(new: Path, output: Path, *, old: Path) -> None:
    """Put a folder in the place of another one, if there is one, which becomes `old`."""
    files.sync_tree(new)
    with suppress(FileNotFoundError):
        output.rename(old)
    try:
        new.rename(output)
    except OSError:
        if not (output / INDEX).exists():  # another process has just put the same there
            raise
    files.sync(output.absolute().parent)


def _link_or_copy(path: str | Path, to: str | Path) -> None:
    try:
        os.link(path, to)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(path, to)
