"""Download files of the hub so that a cut connection costs only what was on the wire.

A file grows under the name `NAME.part`; `NAME.part.json` beside it says which version its bytes belong to. It gets its
name once its size and checksum are those that the hub, or the caller, named. The next call, even in another process,
continues where the last one stopped. Bytes of another version, or with a wrong checksum, are fetched again.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, NamedTuple

from databuilder.hub import Hub, HubFile, RemoteFacts, TransientError, is_offline, strong_etag
from transformerlm.utils.files import move_into_place, write_whole
from transformerlm.utils.json_files import read_json_object
from transformerlm.utils.lock import try_lock

BLOCK_BYTES = 1 << 20
MAX_WAIT = 300.0
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")

RECIPES: dict[str, tuple[HubFile, ...]] = {
    "tinystories": tuple(
        HubFile("roneneldan/TinyStories", f"TinyStoriesV2-GPT4-{split}.txt") for split in ("train", "valid")
    ),
    "openwebtext_sample": tuple(
        HubFile("stanford-cs336/owt-sample", f"owt_{split}.txt.gz") for split in ("train", "valid")
    ),
}

ByteProgress = Callable[[int, int], None]
"""Called with the number of bytes that are here, and of the whole file."""


class DownloadReport(NamedTuple):
    """A file that is here and correct; `checked` says by what, `fetched` whether the network was needed this time."""

    path: Path
    bytes: int
    checked: str
    fetched: bool


@dataclass(frozen=True)
class Download:
    """One file to download to `path`.

    `sha256` is what its content must have, whatever the hub says. `retries` is the number of failures in a row without
    progress before giving up, and `wait` is how to sleep between them.
    """

    file: HubFile
    path: Path
    sha256: str | None = None
    overwrite: bool = False
    retries: int = 5
    progress: ByteProgress | None = None
    wait: Callable[[float], None] = time.sleep

    def run(self, hub: Hub) -> DownloadReport:
        """Fetch what is missing, and return once the file is whole, checked and on disk.

        Raises:
            FileExistsError: another file is at `path`, or another process is downloading it.
            FileNotFoundError, PermissionError, ValueError: the hub will give the same answer next time.
            OSError: too many failures, or the disk has no room.
        """
        if is_offline():
            return self._found_offline()
        failures, farthest = 0, self._part_bytes()
        while True:
            try:
                return self._attempt(hub)
            except TransientError as error:
                reached = self._part_bytes()
                failures = 1 if reached >= farthest + BLOCK_BYTES else failures + 1
                farthest = max(farthest, reached)
                if failures > self.retries:
                    hint = "; the same command goes on from here" if reached else ""
                    raise OSError(f"{error} ({failures} failures in a row{hint})") from None
                if error.retry_after > MAX_WAIT:
                    raise OSError(f"{error} (asks to come back in {error.retry_after:,.0f} s)") from None
                seconds = max(error.retry_after, min(2.0 ** (failures - 1), 30.0))
                # With the number, for Python says the same words only once.
                again = f"trying again in {seconds:.0f} s ({failures} of {self.retries})"
                warnings.warn(f"{error}; {again}", stacklevel=2)
                self.wait(seconds)

    @property
    def _part(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def _record(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part.json")

    def _part_bytes(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _found_offline(self) -> DownloadReport:
        if not self.path.is_file():
            raise FileNotFoundError(f"HF_HUB_OFFLINE is set: expected {self.path} to be there already, found none")
        size = self.path.stat().st_size
        if self.sha256 is not None and checksum_of(self.path, self.sha256) != self.sha256:
            raise ValueError(f"{self.path}: expected sha256 {self.sha256}, found another (HF_HUB_OFFLINE is set)")
        return DownloadReport(self.path, size, "sha256" if self.sha256 else "nothing", fetched=False)

    def _attempt(self, hub: Hub) -> DownloadReport:
        facts = hub.facts(self.file)
        checksum = self._expected_checksum(facts, hub)
        checked = {64: "sha256", 40: "git sha1", 0: "size"}[len(checksum or "")]
        if self.path.exists():
            if _is_right(self.path, facts.size, checksum):
                return DownloadReport(self.path, facts.size, checked, fetched=False)
            if not self.overwrite:
                raise FileExistsError(
                    f"{self.path}: expected {facts.size:,} bytes with the hub's checksum, found another file "
                    "(overwrite replaces it)"
                )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._part.open("a+b") as part:
            if not try_lock(part, self._part):
                raise FileExistsError(f"{self._part}: expected to be the only download, found another process at it")
            self._complete(hub, part, facts)
            if not _is_right(self._part, facts.size, checksum):
                part.truncate(0)
                raise TransientError(f"{self.file.url(hub.endpoint)}: expected {checked} {checksum}, found wrong bytes")
            move_into_place(self._part, self.path)  # while it is locked: the next one finds no part to empty
        self._record.unlink(missing_ok=True)
        return DownloadReport(self.path, facts.size, checked, fetched=True)

    def _expected_checksum(self, facts: RemoteFacts, hub: Hub) -> str | None:
        theirs = facts.checksum
        if self.sha256 is not None and theirs is not None and len(theirs) == 64 and theirs != self.sha256:
            raise ValueError(f"{self.file.url(hub.endpoint)}: expected sha256 {self.sha256}, found {theirs}")
        return self.sha256 or theirs

    def _complete(self, hub: Hub, part: IO[bytes], facts: RemoteFacts) -> None:
        """Bring the part to the file's size, from where it ends, or from the beginning."""
        if self._part_bytes() and not self._record.exists():
            raise FileExistsError(f"{self._part}: expected the part of a download, found another file; move it away")
        start, etag = self._resume_point(facts)
        part.truncate(start)
        _check_room(self.path.parent, facts.size - start)
        if self.progress is not None:
            self.progress(start, facts.size)
        if start == facts.size:
            return
        with hub.open(self.file, start=start, etag=etag) as response:
            if start and not _continues(response, start, facts.size):
                part.truncate(0)
                start = 0
            if start == 0:
                if response.status != 200:
                    raise TransientError(f"{self.file.url(hub.endpoint)}: expected the bytes asked for, found others")
                record = {"version": facts.version, "etag": strong_etag(response.headers.get("ETag"))}
                write_whole(self._record, json.dumps(record))
            self._receive(response, part, start, facts.size)

    def _resume_point(self, facts: RemoteFacts) -> tuple[int, str]:
        """Return how many bytes of the part belong to this version, and the ETag that they came with."""
        try:
            record = read_json_object(self._record, max_bytes=10_000)
        except (OSError, ValueError):
            return 0, ""
        size = self._part_bytes()
        if not facts.version or record.get("version") != facts.version or size > facts.size:
            return 0, ""
        return size, strong_etag(record.get("etag"))

    def _receive(self, response: HTTPResponse, part: IO[bytes], done: int, size: int) -> None:
        """Append what arrives, but never more than one byte beyond the size."""
        where = self.file.url("")
        while done <= size:
            try:
                block = response.read1(min(BLOCK_BYTES, size - done + 1))
            except (OSError, HTTPException) as error:
                raise TransientError(f"{where}: {error or type(error).__name__} after {done:,} bytes") from None
            if not block:
                break
            self._append(part, block)
            done += len(block)
            if self.progress is not None:
                self.progress(min(done, size), size)
        if done < size:
            raise TransientError(f"{where}: expected {size:,} bytes, found the connection cut after {done:,}")
        if done > size:
            part.truncate(0)
            raise TransientError(f"{where}: expected {size:,} bytes, found more")

    def _append(self, part: IO[bytes], block: bytes) -> None:
        try:
            part.write(block)
            part.flush()
        except OSError as error:
            error.filename = str(self._part)  # a write on a full disk does not say where
            raise


def checksum_of(path: Path, like: str) -> str:
    """Return a file's sha256, or git's sha1 where `like` is one: that of `blob SIZE`, a zero byte, and the content."""
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(usedforsecurity=False)
    if len(like) != 64:
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _is_right(path: Path, size: int, checksum: str | None) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    return checksum is None or checksum_of(path, checksum) == checksum


def _continues(response: HTTPResponse, start: int, size: int) -> bool:
    """Return whether an answer holds the bytes from `start` to the end of a file of this size."""
    found = _RANGE.fullmatch(response.headers.get("Content-Range", "")) if response.status == 206 else None
    return found is not None and int(found[1]) == start and found[3] in ("*", str(size))


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{folder}: expected {needed / 1e6:,.1f} MB free for the download, found {free / 1e6:,.1f} MB")
