"""A build of token files by parts: planned, encoded, put together and published, each step once, whatever is killed.

Beside the output is a folder `OUTPUT.parts/` (see `distributed.parts_folder`) with the parts' ids, until the output is
in place. The output is itself a part of that folder before it is published. So publishing is no more than giving files
their names, which may be done twice.
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from config.schemas import ClusterConfig
from databuilder.checks import check_room, check_split_documents
from databuilder.encoding import Array, token_tables
from databuilder.parts import EncodedPart, append_source, encode_part, numbered_parts, write_part_shards, write_shard
from databuilder.reports import BuildReport, SplitReport, shared_facts, split_facts, split_report
from databuilder.sources import SourceFiles, SourceReport
from transformerlm.distributed.parts_folder import PartsFolder, check_cluster
from transformerlm.distributed.work import Facts, Part, do_part, read_facts
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.token_files.index import Shard, write_index
from transformerlm.token_files.sidecar import sidecar_path
from transformerlm.token_files.writer import TokenFileWriter, publish
from transformerlm.tokenizer import Tokenizer
from transformerlm.tokenizer.parallel import ProgressCallback, map_in_order, resolve_num_workers
from transformerlm.utils import files
from transformerlm.utils.text_parts import DocumentEnds, TextPart, find_parts

_OUTPUT, _MARK, _TOKENIZER, _ID_BYTES = "output", "publishing", "tokenizer", "id-bytes"
_SPLITS = ("train", "valid")


@dataclass(frozen=True)
class PartsBuild:
    """What `build_dataset` was asked for, its arguments checked and its sources found."""

    sources: Sequence[SourceFiles]
    outputs: Sequence[Path]
    tokenizer: Tokenizer
    valid_fraction: float
    separator: str
    allow_special: bool
    refuse_invalid: bool
    overwrite: bool
    num_workers: int | None
    cluster: ClusterConfig
    progress: ProgressCallback | None

    @property
    def num_bytes(self) -> int:
        """The size of the text on the disk."""
        return sum(source.disk_bytes for source in self.sources)

    @property
    def path(self) -> Path:
        """The folder of the parts: `train.npy.parts` beside `train.npy`."""
        return self.outputs[0].with_name(f"{self.outputs[0].name}.parts")

    @property
    def is_publishing(self) -> bool:
        """Whether a build by parts that was interrupted has begun to put its outputs in place."""
        return (self.path / _MARK).exists()

    @property
    def in_shards(self) -> bool:
        """Whether the outputs are folders of shards."""
        return self.outputs[0].suffix == ".shards"

    @property
    def is_by_parts(self) -> bool:
        """Whether to build by parts: for a cluster, for shards, to go on with parts, and where there are several."""
        needed = self.in_shards or self.cluster.on != "local" or self.path.exists()
        return needed or (self.num_bytes > self._part_bytes and not self._pipes() and len(self.groups) > 1)

    def check(self, max_tokens: int | None) -> None:
        """Refuse what does not go together with parts, or with a cluster.

        Raises:
            ValueError: it does not.
        """
        check_cluster(self.cluster)
        if not (self.in_shards or self.cluster.on != "local"):
            return
        reason = f'cluster.on = "{self.cluster.on}"' if self.cluster.on != "local" else "a folder of shards"
        if max_tokens is not None:
            raise ValueError(
                f"max_tokens: expected none with {reason}, found {max_tokens:,}: it needs one pass, in order"
            )
        if pipes := self._pipes():
            raise ValueError(f"{pipes[0]}: expected a file, since {reason} reads it in parts, found a pipe or device")
        if self.overwrite and self.cluster.on == "share":
            raise ValueError(
                'overwrite: expected false with cluster.on = "share", where a late share would begin anew; remove the '
                "old outputs first"
            )

    def _pipes(self) -> list[Path]:
        return [path for source in self.sources for path in source.paths if not path.is_file()]

    @property
    def _part_bytes(self) -> int:
        return int(self.cluster.part_mb * 1_000_000)

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """The parts in order as JSON: the source's number and the pieces of text, small files together."""
        find_cut = DocumentEnds(self.separator, self.tokenizer.special_tokens)
        groups: list[dict[str, Any]] = []
        for number, source in enumerate(self.sources):
            pieces: list[TextPart] = []
            for piece in find_parts(source.paths, part_bytes=self._part_bytes, find_cut=find_cut):
                if pieces and sum(one.num_bytes for one in pieces) + piece.num_bytes > self._part_bytes:
                    groups.append({"source": number, "pieces": [asdict(one) for one in pieces]})
                    pieces = []
                pieces.append(piece)
            groups.append({"source": number, "pieces": [asdict(one) for one in pieces]})
        return groups

    def run(self) -> BuildReport | None:
        """Do what is left to do, and return what was written.

        Returns None, with shares alone, if others are still at work or have written the output.

        Raises:
            ValueError: parts of other inputs or settings are there, or as `build_dataset`.
            OSError: as `build_dataset`.
        """
        start = time.perf_counter()
        folder = PartsFolder(
            self.path,
            self._settings(),
            list_items=lambda: self.groups,
            cluster=self.cluster,
            restart=self.overwrite or self.cluster.on == "local",
        )
        with folder:
            if self.cluster.on == "share" and self.is_made() and not self.is_publishing:
                folder.remove()  # which this process has created, after another one had removed it
                return None
            try:
                report = self._build(folder)
            except FileNotFoundError:
                if self.cluster.on != "share" or folder.is_there:
                    raise
                return None
        return None if report is None else replace(report, seconds=time.perf_counter() - start)

    def is_made(self) -> bool:
        """Return whether the outputs are there, and say that they were made of these texts with this tokenizer."""
        with suppress(OSError, ValueError):
            known = shared_facts(self.tokenizer, self.sources, self.separator)
            found = [TokenDataset(path).metadata for path in self.outputs]
            return all(facts.get(key) == value for facts in found for key, value in known.items())
        return False

    def _settings(self) -> dict[str, Any]:
        """Return all that the parts and the output depend on."""
        return {
            "command": "make-data",
            "tokenizer_sha256": self.tokenizer.fingerprint(),
            "separator": self.separator,
            "allow_special": self.allow_special,
            "refuse_invalid": self.refuse_invalid,
            "valid_fraction": self.valid_fraction,
            "outputs": [path.name for path in self.outputs],
            "part_bytes": self._part_bytes,
            "sources": [
                {
                    "weight": source.weight,
                    "text_field": source.text_field,
                    "files": [
                        {"path": str(path), "bytes": path.stat().st_size, "mtime": path.stat().st_mtime_ns}
                        for path in source.paths
                    ],
                }
                for source in self.sources
            ],
        }

    def _build(self, folder: PartsFolder) -> BuildReport | None:
        progress = _Progress(self, folder)
        encoding = self._encoding_parts(folder, progress)
        facts = folder.run(encoding, num_cpus=self._workers_of_a_part(), wait=self.in_shards, on_done=progress.on_done)
        if facts is None:
            return None
        for message in dict.fromkeys(text for one in facts.values() for text in one["warnings"]):
            warnings.warn(message, stacklevel=2)
        folders: list[list[Path]] = [[] for _ in self.sources]
        for part, group in zip(encoding, folder.items, strict=True):
            folders[group["source"]].append(folder.path / part.name)
        encoded = numbered_parts(folders, facts, self.valid_fraction)
        check_split_documents(self._num_documents(encoded), self.separator, self.valid_fraction)
        for source, parts in zip(self.sources, encoded, strict=True):
            source.check_documents(sum(part.facts["documents"] for part in parts))
        totals = {key: sum(one[key] for one in facts.values()) for key in ("invalid_utf8", "empty_documents")}
        shards = self._write_shards(folder, encoded) if self.in_shards else {}
        if shards is None:
            return None
        with folder.alone(_OUTPUT) as held:
            if not held:
                return None
            write = partial(_write_shard_folders, shards=shards) if self.in_shards else _write_token_files
            output = {"build": self, "encoded": encoded, "invalid_utf8": totals["invalid_utf8"]}
            do_part(folder.path, folder.plan_sha256, Part(_OUTPUT, write, output))
            return self._publish(folder, **totals)

    def _encoding_parts(self, folder: PartsFolder, progress: _Progress) -> list[Part]:
        tokenizer: Tokenizer | dict[str, str] = self.tokenizer
        if self.cluster.on == "ray":
            self.tokenizer.save(folder.path / _TOKENIZER)
            tokenizer = {"directory": str(folder.path / _TOKENIZER), "engine": self.tokenizer.engine}
        shared = {
            "tokenizer": tokenizer,
            "separator": self.separator,
            "allow_special": self.allow_special,
            "refuse_invalid": self.refuse_invalid,
            "engine_bytes": self.num_bytes,
            "num_workers": self._workers_of_a_part(),
            "progress": None if self.cluster.on == "ray" else progress.show,
        }
        parts = []
        for number, group in enumerate(folder.items):
            pieces = group["pieces"]
            if self.cluster.on == "ray":  # whose workers have other working directories
                pieces = [{**piece, "path": os.path.abspath(piece["path"])} for piece in pieces]
            own = {"pieces": pieces, "text_field": self.sources[group["source"]].text_field}
            parts.append(Part(_name_of(number), encode_part, {**own, **shared}))
        return parts

    def _workers_of_a_part(self) -> int:
        if self.cluster.on == "ray":
            return self.num_workers or 1
        return resolve_num_workers(self.num_workers, self.num_bytes)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the ids."""
        return np.dtype(np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32)

    @property
    def id_bytes(self) -> Array:
        """The bytes that each id stands for, 0 for the separator, uint32 `(vocab_size,)`."""
        return token_tables(self.tokenizer, self.separator)[0]

    @property
    def separator_id(self) -> int:
        """The separator's id."""
        return self.tokenizer.special_token_ids[self.separator]

    def own_facts(self, split: SplitReport) -> dict[str, Any]:
        """Return what a sidecar says of its own file."""
        return split_facts(split, with_mixture=self.sources[0].weighted)

    def shared_facts(self, invalid_utf8: int) -> dict[str, Any]:
        """Return what the sidecars of all outputs say."""
        return {**shared_facts(self.tokenizer, self.sources, self.separator), "invalid_utf8": invalid_utf8}

    def empty_shard(self, folder: Path) -> Shard:
        """Write a shard without documents."""
        entry = write_shard(
            folder / "000000.npy", [], dtype=self.dtype, separator_id=self.separator_id, id_bytes=self.id_bytes
        )
        return Shard(**entry)

    def _num_documents(self, encoded: Sequence[Sequence[EncodedPart]]) -> list[int]:
        parts = [part for of_source in encoded for part in of_source]
        train = sum(part.num_train for part in parts)
        return [train, sum(part.facts["documents"] for part in parts) - train]

    def _write_shards(self, folder: PartsFolder, encoded: Sequence[Sequence[EncodedPart]]) -> dict[str, Facts] | None:
        id_bytes = folder.path / _ID_BYTES
        files.write_whole(id_bytes, self.id_bytes.tobytes())
        shared = {
            "dtype": self.dtype.name,
            "separator_id": self.separator_id,
            "id_bytes": str(id_bytes),
        }
        parts: list[Part] = []
        for source, of_source in zip(self.sources, encoded, strict=True):
            for one in of_source:
                number = f"{len(parts):06d}"
                own = {"encoded": {**asdict(one), "folder": str(one.folder)}, "weight": source.weight}
                parts.append(Part(f"shards-{number}", write_part_shards, {**own, **shared, "name": number}))
        workers = resolve_num_workers(self.num_workers, self.num_bytes)
        return folder.run(parts, mapper=partial(_in_threads, workers))

    def _publish(self, folder: PartsFolder, *, invalid_utf8: int, empty_documents: int) -> BuildReport:
        """Put the outputs in place, remove the parts, and return what was written."""
        facts = read_facts(folder.path / _OUTPUT, plan=folder.plan_sha256)
        assert facts is not None, folder.path
        files.write_whole(folder.path / _MARK, b"")  # from now on, what is at the outputs' places is ours
        for split, path in zip(_SPLITS, self.outputs, strict=False):
            put_in_place(folder.path / _OUTPUT / split, path)
        folder.remove()
        splits = [
            SplitReport(path=path, **{**known, "sources": [SourceReport(**source) for source in known["sources"]]})
            for path, known in zip(self.outputs, facts["splits"], strict=True)
        ]
        valid = splits[1] if len(splits) > 1 else None
        return BuildReport(splits[0], valid, 0.0, invalid_utf8=invalid_utf8, empty_documents=empty_documents)


def put_in_place(built: Path, output: Path) -> None:
    """Give what is in the folder `built` the names of an output; it stays in `built`, too, so this may be repeated.

    The sidecar, or the index, comes last; an older one goes first.
    """
    beside = output.with_name(f".{output.name}.tmp-{os.getpid()}")
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".shards":
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(built, beside, copy_function=_link_or_copy)
        files.sync_tree(beside)
        if output.exists():
            old = output.with_name(f".{output.name}.tmp-old")
            shutil.rmtree(old, ignore_errors=True)
            output.rename(old)
            beside.rename(output)
            shutil.rmtree(old, ignore_errors=True)
        else:
            beside.rename(output)
        files.sync(output.absolute().parent)
        return
    sidecar = sidecar_path(output)
    sidecar.unlink(missing_ok=True)
    for path in sorted(built.iterdir(), key=lambda path: path.name == sidecar.name):
        beside.unlink(missing_ok=True)
        _link_or_copy(path, beside)
        files.move_into_place(beside, output.with_name(path.name))


def _link_or_copy(path: str | Path, to: str | Path) -> None:
    try:
        os.link(path, to)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(path, to)


def _in_threads(num_workers: int, do: Callable[[Part], str], parts: Iterable[Part]) -> Iterable[str]:
    return map_in_order(do, parts, num_workers=num_workers, threads=True)


def _write_token_files(
    folder: Path, *, build: PartsBuild, encoded: Sequence[Sequence[EncodedPart]], invalid_utf8: int
) -> Facts:
    """Write the token files with their sidecars, `train/` and `valid/`, under the names of the outputs."""
    dtype, id_bytes = build.dtype, build.id_bytes
    with ExitStack() as stack:
        writers = [
            stack.enter_context(TokenFileWriter(folder / split / path.name, dtype, separator_id=build.separator_id))
            for split, path in zip(_SPLITS, build.outputs, strict=False)
        ]
        held = [
            append_source(source, parts, writers, separator_id=build.separator_id, id_bytes=id_bytes)
            for source, parts in zip(build.sources, encoded, strict=True)
        ]
        of_splits = zip(writers, zip(*held, strict=True), strict=True)
        splits = [split_report(writer.path, reports) for writer, reports in of_splits]
        shared = build.shared_facts(invalid_utf8)
        publish(writers, [{**build.own_facts(split), **shared} for split in splits])
    return {"splits": [_as_json(split) for split in splits]}


def _write_shard_folders(
    folder: Path,
    *,
    build: PartsBuild,
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
    for split, path, listed, of_sources in zip(_SPLITS, build.outputs, entries, reports, strict=False):
        splits.append(split_report(path, of_sources))
        own = {key: value for key, value in build.own_facts(splits[-1]).items() if key not in ("bytes", "documents")}
        known = {"dtype": build.dtype.name, **own, **build.shared_facts(invalid_utf8)}
        write_index(folder / split, listed or [build.empty_shard(folder / split)], known)
    return {"splits": [_as_json(split) for split in splits]}


def _link_all(built: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path in built.iterdir():
        _link_or_copy(path, folder / path.name)


def _as_json(split: SplitReport) -> Facts:
    return {key: value for key, value in asdict(split).items() if key != "path"}


def _name_of(number: int) -> str:
    return f"encoded-{number:06d}"


class _Progress:
    """Shows how much text has been encoded; after the first part it looks at the room on the disk."""

    def __init__(self, build: PartsBuild, folder: PartsFolder) -> None:
        self._build = build
        self._folder = folder
        self._done = 0
        self._sizes = {
            _name_of(number): sum(piece["num_bytes"] for piece in group["pieces"])
            for number, group in enumerate(folder.items)
        }

    def show(self, num_bytes: int) -> None:
        """Show that so many bytes of the part in hand have been read."""
        if self._build.progress is not None:
            self._build.progress("encode", self._done + num_bytes, self._build.num_bytes)

    def on_done(self, name: str) -> None:
        """Show that a part is done."""
        if not self._done:
            self._check_room(name)
        self._done += self._sizes[name]
        self.show(0)

    def _check_room(self, name: str) -> None:
        facts = read_facts(self._folder.path / name, plan=self._folder.plan_sha256)
        if facts is not None and self._sizes[name]:
            # The ids of all parts, and the output, as often as the weights say; one part is on the disk already.
            passes = sum(source.disk_bytes * (1 + source.weight) for source in self._build.sources)
            left = passes / self._sizes[name] - 1
            check_room(self._folder.path, int(facts["ids"] * self._build.dtype.itemsize * left))
