"""A build of token files by parts: planned, encoded, put together and published, each step once, whatever is killed.

Beside the output is a folder `OUTPUT.parts/` (see `distributed.parts_folder`) with the parts' ids, until the output is
in place. The output is itself a part of that folder before it is published. So publishing is no more than giving files
their names, which may be done twice.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from databuilder.build import Build
from databuilder.checks import check_room
from databuilder.parts import EncodedPart, encode_part, numbered_parts, write_id_bytes, write_part_shards
from databuilder.parts_output import SPLITS, put_in_place, remove_leftovers, write_shard_folders, write_token_files
from databuilder.reports import BuildReport, SplitReport
from databuilder.sources import SourceReport
from transformerlm.distributed.parts_folder import PartsFolder, check_cluster, finish_removal, is_abandoned, is_planned
from transformerlm.distributed.work import Facts, Part, do_part, read_facts
from transformerlm.tokenizer import Tokenizer
from transformerlm.tokenizer.parallel import map_in_order, resolve_num_workers
from transformerlm.utils import files
from transformerlm.utils.text_parts import DocumentEnds, find_parts, gather_parts

_OUTPUT, _MARK, _TOKENIZER, _ID_BYTES = "output", "publishing", "tokenizer", "id-bytes"


class PartsBuild:
    """A build of which the text, in parts, may be encoded in any order by several processes."""

    def __init__(self, build: Build) -> None:
        self.build = build
        self.cluster = build.cluster

    @property
    def path(self) -> Path:
        """The folder of the parts: `train.npy.parts` beside `train.npy`."""
        return self.build.outputs[0].with_name(f"{self.build.outputs[0].name}.parts")

    @property
    def is_publishing(self) -> bool:
        """Whether this very build was interrupted after it had begun to put its outputs in place."""
        return (self.path / _MARK).exists() and is_planned(self.path, self.build.settings())

    @property
    def is_needed(self) -> bool:
        """Whether to build by parts: for a cluster, for shards, to go on with parts, and where there are several."""
        if self.build.in_shards or self.cluster.on != "local" or self.path.exists():
            return True
        return self.build.num_bytes > self.build.part_bytes and not self.build.pipes and len(self.groups) > 1

    def check(self, max_tokens: int | None) -> None:
        """Refuse what does not go together with parts, or with a cluster.

        Raises:
            ValueError: it does not.
        """
        check_cluster(self.cluster)
        if not (self.build.in_shards or self.cluster.on != "local"):
            return
        reason = f'cluster.on = "{self.cluster.on}"' if self.cluster.on != "local" else "a folder of shards"
        if max_tokens is not None:
            raise ValueError(
                f"max_tokens: expected none with {reason}, found {max_tokens:,}: it needs one pass, in order"
            )
        if pipes := self.build.pipes:
            raise ValueError(f"{pipes[0]}: expected a file, since {reason} reads it in parts, found a pipe or device")
        if self.build.overwrite and self.cluster.on == "share":
            raise ValueError(
                'overwrite: expected false with cluster.on = "share", where a late share would begin anew; remove the '
                "old outputs first"
            )

    def finish_removal(self) -> None:
        """Remove what is left of a folder of parts whose removal was interrupted, after the outputs were in place."""
        if is_abandoned(self.path) and self.build.is_made():
            finish_removal(self.path)

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """The parts in order as JSON: the source's number and the pieces of text, small files together."""
        find_cut = DocumentEnds(self.build.separator, self.build.tokenizer.special_tokens)
        size = self.build.part_bytes
        return [
            {"source": number, "pieces": [asdict(piece) for piece in pieces]}
            for number, source in enumerate(self.build.sources)
            for pieces in gather_parts(find_parts(source.paths, part_bytes=size, find_cut=find_cut), part_bytes=size)
        ]

    def check_outputs(self) -> None:
        """Refuse outputs as `Build.check_outputs` does, but not those that another share has just begun to write."""
        try:
            self.build.check_outputs(is_publishing=self.is_publishing)
        except FileExistsError:
            if not (self.is_publishing or (self.cluster.on == "share" and self.build.is_made())):
                raise

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
            self.build.settings(),
            list_items=lambda: self.groups,
            cluster=self.cluster,
            restart=self.build.overwrite or self.cluster.on == "local",
        )
        with folder:
            if self.cluster.on == "share" and self.build.is_made() and not self.is_publishing:
                folder.remove()  # which this process has created, after another one had removed it
                return None
            try:
                report = self._build(folder)
            except OSError:  # such as a part that another share was removing, since it has published
                if self.cluster.on != "share" or folder.is_there:
                    raise
                return None
        return None if report is None else replace(report, seconds=time.perf_counter() - start)

    def _build(self, folder: PartsFolder) -> BuildReport | None:
        progress = _Progress(self.build, folder)
        encoding = self._encoding_parts(folder, progress)
        facts = folder.run(
            encoding, num_cpus=self._workers_of_a_part(), wait=self.build.in_shards, on_done=progress.on_done
        )
        if facts is None:
            return None
        for message in dict.fromkeys(text for one in facts.values() for text in one["warnings"]):
            warnings.warn(message, stacklevel=2)
        folders: list[list[Path]] = [[] for _ in self.build.sources]
        for part, group in zip(encoding, folder.items, strict=True):
            folders[group["source"]].append(folder.path / part.name)
        encoded = numbered_parts(folders, facts, self.build.valid_fraction)
        self.build.check_split(self._num_documents(encoded))
        for source, parts in zip(self.build.sources, encoded, strict=True):
            source.check_documents(sum(part.facts["documents"] for part in parts))
        totals = {key: sum(one[key] for one in facts.values()) for key in ("invalid_utf8", "empty_documents")}
        shards = self._write_shards(folder, encoded) if self.build.in_shards else {}
        if shards is None:
            return None
        with folder.alone(_OUTPUT) as held:
            if not held or not folder.is_there:  # another share is publishing, or has published
                return None
            write = partial(write_shard_folders, shards=shards) if self.build.in_shards else write_token_files
            output = {"build": self.build, "encoded": encoded, "invalid_utf8": totals["invalid_utf8"]}
            do_part(folder.path, folder.plan_sha256, Part(_OUTPUT, write, output))
            return self._publish(folder, **totals)

    def _encoding_parts(self, folder: PartsFolder, progress: _Progress) -> list[Part]:
        tokenizer: Tokenizer | dict[str, str] = self.build.tokenizer
        if self.cluster.on == "ray":
            self.build.tokenizer.save(folder.path / _TOKENIZER)
            tokenizer = {"directory": str(folder.path / _TOKENIZER), "engine": self.build.tokenizer.engine}
            tokenizer["sha256"] = self.build.tokenizer.fingerprint()  # a worker may remember an earlier build's
        shared = {
            "tokenizer": tokenizer,
            "separator": self.build.separator,
            "allow_special": self.build.allow_special,
            "refuse_invalid": self.build.refuse_invalid,
            "chat": self.build.chat.to_json() if self.build.chat else None,
            "engine_bytes": self.build.num_bytes,
            "num_workers": self._workers_of_a_part(),
            "progress": None if self.cluster.on == "ray" else progress.show,
        }
        parts = []
        for number, group in enumerate(folder.items):
            pieces = group["pieces"]
            if self.cluster.on == "ray":  # whose workers have other working directories
                pieces = [{**piece, "path": os.path.abspath(piece["path"])} for piece in pieces]
            own = {"pieces": pieces, "text_field": self.build.sources[group["source"]].text_field}
            parts.append(Part(_name_of(number), encode_part, {**own, **shared}))
        return parts

    def _workers_of_a_part(self) -> int:
        if self.cluster.on == "ray":
            return self.build.num_workers or 1
        return resolve_num_workers(self.build.num_workers, self.build.num_bytes)

    def _num_documents(self, encoded: Sequence[Sequence[EncodedPart]]) -> list[int]:
        parts = [part for of_source in encoded for part in of_source]
        train = sum(part.num_train for part in parts)
        return [train, sum(part.facts["documents"] for part in parts) - train]

    def _write_shards(self, folder: PartsFolder, encoded: Sequence[Sequence[EncodedPart]]) -> dict[str, Facts] | None:
        # A part like the others, since all shares come here at once.
        table = Part(_ID_BYTES, write_id_bytes, {"id_bytes": self.build.id_bytes})
        do_part(folder.path, folder.plan_sha256, table)
        shared = {
            "dtype": self.build.dtype.name,
            "writing": self.build.writing,
            "id_bytes": str(folder.path / _ID_BYTES),
        }
        parts: list[Part] = []
        for source, of_source in zip(self.build.sources, encoded, strict=True):
            for one in of_source:
                number = f"{len(parts):06d}"
                own = {"encoded": {**asdict(one), "folder": str(one.folder)}, "weight": source.weight}
                parts.append(Part(f"shards-{number}", write_part_shards, {**own, **shared, "name": number}))
        workers = resolve_num_workers(self.build.num_workers, self.build.num_bytes)
        return folder.run(parts, mapper=partial(_in_threads, workers))

    def _publish(self, folder: PartsFolder, *, invalid_utf8: int, empty_documents: int) -> BuildReport:
        """Put the outputs in place, remove the parts, and return what was written."""
        facts = read_facts(folder.path / _OUTPUT, plan=folder.plan_sha256)
        if facts is None:
            raise FileNotFoundError(f"{folder.path / _OUTPUT}: removed while it was about to be put in place")
        self.check_outputs()  # nothing may have come there meanwhile
        (folder.path / _MARK).touch()  # from now on, what is at the outputs' places is ours
        files.sync(folder.path)
        for split, path in zip(SPLITS, self.build.outputs, strict=False):
            remove_leftovers(path, of_others=self.cluster.on != "share")
            put_in_place(folder.path / _OUTPUT / split, path, is_whole=lambda: folder.is_there)
        folder.remove()
        splits = [
            SplitReport(path=path, **{**known, "sources": [SourceReport(**source) for source in known["sources"]]})
            for path, known in zip(self.build.outputs, facts["splits"], strict=True)
        ]
        valid = splits[1] if len(splits) > 1 else None
        found = {"invalid_utf8": invalid_utf8, "empty_documents": empty_documents, "num_files": self.build.num_files}
        return BuildReport(splits[0], valid, 0.0, **found)


def _in_threads(num_workers: int, do: Callable[[Part], str], parts: Iterable[Part]) -> Iterable[str]:
    return map_in_order(do, parts, num_workers=num_workers, threads=True)


def _name_of(number: int) -> str:
    return f"encoded-{number:06d}"


class _Progress:
    """Shows how much text has been encoded; after the first part it looks at the room on the disk."""

    def __init__(self, build: Build, folder: PartsFolder) -> None:
        self._build = build
        self._folder = folder
        self._done, self._total = 0, build.num_bytes
        self._has_room = False
        pieces = {_name_of(number): group["pieces"] for number, group in enumerate(folder.items)}
        self._sizes = {name: sum(piece["num_bytes"] for piece in own) for name, own in pieces.items()}
        self._first_files = {name: Path(own[0]["path"]) for name, own in pieces.items()}

    def show(self, num_bytes: int) -> None:
        """Show that so many bytes of the part in hand have been read."""
        if self._build.progress is not None:
            self._build.progress("encode", self._done + num_bytes, self._total)

    def on_done(self, name: str, is_old: bool) -> None:
        """Show that a part is done; what an earlier call did is no progress of this one."""
        if not self._has_room:
            self._check_room(name)
        self._has_room = True
        if is_old:
            self._total -= self._sizes[name]
        else:
            self._done += self._sizes[name]
            self.show(0)

    def _check_room(self, name: str) -> None:
        facts = read_facts(self._folder.path / name, plan=self._folder.plan_sha256)
        there = {path.name for path in self._folder.path.iterdir()}
        size, done = self._sizes[name], sum(size for name, size in self._sizes.items() if name in there)
        if facts is not None and size and self._sizes.keys() - there:
            # The ids of the parts that are left, and the output, as often as the weights say; shards have no copies.
            path = self._first_files[name]
            in_shards, sources = self._build.in_shards, self._build.sources
            copies = [min(one.weight, 1 + one.weight % 1) if in_shards else one.weight for one in sources]
            passes = sum(one.disk_bytes_like(path) * (1 + times) for one, times in zip(sources, copies, strict=True))
            expected = facts["ids"] * self._build.stream_dtype.itemsize * (passes - done) / size
            check_room(self._folder.path, int(expected))
