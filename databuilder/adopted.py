"""Files of ids that other programs wrote: checked, counted, and described as our token files are.

Such a file says neither which tokenizer made it nor where its documents end, so the caller does. Each id is checked, in
one pass. The file itself is never changed, and nothing that exists is replaced.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config.paths import is_utf8, not_utf8
from transformerlm.token_files.array import open_row
from transformerlm.token_files.sidecar import OFFSETS_SUFFIX, new_sidecars, offsets_path, sidecar_path
from transformerlm.token_files.writer import OffsetsWriter, TokenFileWriter, publish
from transformerlm.tokenizer import Tokenizer
from transformerlm.tokenizer.parallel import ProgressCallback
from transformerlm.utils import files

BLOCK_TOKENS = 1 << 20
_IN_PLACE: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in ("<u2", "<u4")}
_COPIED = _IN_PLACE | {name: np.dtype(name) for name in ("<i4", "<i8", "<u8")}
_BEGINNING = 24

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class AdoptReport:
    """What a file holds; `beginning` is its first ids as text, by which a reader can judge the tokenizer.

    `bytes` counts the documents' UTF-8 bytes, without separators; `ends_documents` says whether any separator is in it.
    """

    path: Path
    tokens: int
    bytes: int
    documents: int
    beginning: str
    ends_documents: bool


def adopt_ids(
    source: Path,
    *,
    tokenizer: Tokenizer,
    separator: str,
    output: Path | None = None,
    raw_dtype: str = "uint16",
    progress: ProgressCallback | None = None,
) -> AdoptReport:
    """Describe the ids in `source` with a sidecar and document offsets, and return what they are.

    Args:
        source: an `.npy` with a row of whole numbers, or a `.bin` of numbers without a header.
        tokenizer: it encoded the ids.
        separator: the special token that ends a document.
        output: the token file to write with a copy of the ids; None: the sidecar and the offsets are written beside
            `source`, an `.npy` of uint16 or uint32, which stays as it is.
        raw_dtype: the type of the ids in a `.bin`.
        progress: called with ("check", bytes read, bytes in all).

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: a file is where one would be written.
        ValueError: the file is no row of whole numbers, an id is not one of the tokenizer's, or the separator is none
            of its special tokens.
    """
    path = source if output is None else output
    _check_names(source, output)
    if separator not in tokenizer.special_token_ids:
        known = ", ".join(map(repr, tokenizer.special_tokens)) or "none at all"
        raise ValueError(f"separator: expected a special token of the tokenizer ({known}), found {separator!r}")
    ids = _open_ids(source, output, raw_dtype)
    if not len(ids):
        raise ValueError(f"{source}: expected ids, found an empty file")
    separator_id = tokenizer.special_token_ids[separator]
    facts: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.fingerprint(),
        "separator": separator,
        "separator_id": separator_id,
        "sources": [{"path": str(source), "bytes": source.stat().st_size}],
    }
    checked = _Checked(ids, tokenizer, separator_id, where=source, progress=progress)
    if output is None:
        documents = _describe(source, checked, separator_id, facts)
    else:
        documents = _copy(output, checked, separator_id, facts)
    beginning = repr(tokenizer.decode(ids[:_BEGINNING].tolist()))
    return AdoptReport(path, len(ids), checked.num_bytes, documents, beginning, checked.ends_documents)


class _Checked:
    """The ids of a file in blocks, each checked and counted as it passes."""

    def __init__(
        self, ids: Array, tokenizer: Tokenizer, separator_id: int, *, where: Path, progress: ProgressCallback | None
    ) -> None:
        self.ids = ids
        self.num_bytes = 0
        self.ends_documents = False
        self._separator_id = separator_id
        self._where = where
        self._progress = progress
        self._id_bytes = np.array([len(tokenizer.vocab[one]) for one in range(tokenizer.vocab_size)], dtype=np.int64)
        self._id_bytes[separator_id] = 0
        # Ids of two bytes where all fit, as make-data writes them.
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)

    def blocks(self) -> Iterator[Array]:
        """Yield the ids in blocks.

        Raises:
            ValueError: an id is not one of the tokenizer's.
        """
        total, size = self.ids.nbytes, len(self._id_bytes)
        for start in range(0, len(self.ids), BLOCK_TOKENS):
            block = np.asarray(self.ids[start : start + BLOCK_TOKENS])
            outside = np.flatnonzero((block < 0) | (block >= size))[:1]
            if len(outside):
                place = int(outside[0])
                raise ValueError(
                    f"{self._where}: expected ids below {size:,}, the tokenizer's, found {block[place]} at position "
                    f"{start + place:,}; give the tokenizer that encoded the file"
                )
            self.num_bytes += int(self._id_bytes.take(block).sum())
            self.ends_documents |= bool((block == self._separator_id).any())
            yield block
            if self._progress is not None:
                self._progress("check", min(total, (start + BLOCK_TOKENS) * self.ids.itemsize), total)


def _describe(path: Path, checked: _Checked, separator_id: int, facts: dict[str, Any]) -> int:
    """Write the offsets and the sidecar beside an `.npy` that is already there; return the number of documents."""
    digest = hashlib.sha256()
    with path.open("rb") as file, closing(OffsetsWriter(offsets_path(path), separator_id)) as offsets:
        digest.update(file.read(path.stat().st_size - checked.ids.nbytes))  # the header
        for block in checked.blocks():
            digest.update(block.data)
            offsets.append(block)
        known = {
            "tokens": len(checked.ids),
            "dtype": checked.ids.dtype.name,
            "sha256": digest.hexdigest(),
            "documents_sha256": (documents_sha256 := offsets.finish()),
            "bytes": checked.num_bytes,
            "documents": offsets.num_documents,
        }
        beside = offsets_path(path)
        with new_sidecars({path: {**known, **facts}}):
            if not os.path.lexists(beside):
                offsets.rename()
            elif not beside.is_file() or files.file_sha256(beside) != documents_sha256:  # not of a call that was killed
                advice = "is there already, with other offsets than these ids have; move that file"
                raise FileExistsError(f"{beside}: {advice}")
            files.sync(path.absolute().parent)
        return offsets.num_documents


def _copy(output: Path, checked: _Checked, separator_id: int, facts: dict[str, Any]) -> int:
    """Write the ids as a token file of our own; return the number of documents."""
    with TokenFileWriter(output, checked.dtype, separator_id=separator_id) as writer:
        for block in checked.blocks():
            writer.append(block.astype(checked.dtype))
        documents = writer.documents
        assert documents is not None, output
        publish([writer], [{"bytes": checked.num_bytes, "documents": documents, **facts}])
    return documents


def _check_names(source: Path, output: Path | None) -> None:
    """Refuse a file that is not there, and files that are where new ones would be written.

    Offsets beside a file that is described where it is may be those of a call that was killed: they are compared later.
    """
    path = source if output is None else output
    if not is_utf8(str(source)):  # the sidecar names it
        raise ValueError(f"source: {not_utf8(str(source)[-60:])}")
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file")
    if path.name.endswith(OFFSETS_SUFFIX):
        raise ValueError(f"{path}: expected a token file that does not end in {OFFSETS_SUFFIX}, as those of offsets do")
    for new in (sidecar_path(path), *([] if output is None else [offsets_path(path), output])):
        if new.exists() or new.is_symlink():
            advice = "it is a token file already, or move that file" if output is None else "choose another output"
            raise FileExistsError(f"{new}: is there already; {advice}")


def _open_ids(source: Path, output: Path | None, raw_dtype: str) -> Array:
    """Return the numbers of a file as a read-only memory map."""
    if source.suffix == ".bin":
        dtype, size = np.dtype(raw_dtype).newbyteorder("<"), source.stat().st_size
        if size % dtype.itemsize:
            raise ValueError(f"{source}: expected ids of {dtype.itemsize} bytes each, found {size:,} bytes in all")
        return np.memmap(source, dtype, mode="r") if size else np.empty(0, dtype)
    if output is None:
        advice = "give an output, and it is copied, from int32, int64 and uint64, too"
        return open_row(source, _IN_PLACE, kinds="uint16 or uint32", advice=advice)
    advice = "save it with numpy.save as such a row"
    return open_row(source, _COPIED, kinds="uint16, uint32, int32, int64 or uint64", advice=advice)
