"""The index of a folder of shards: `index.json`, which lists token files that are read one after the other as one.

A shard that the index lists twice is read twice: so a text can have a weight without a copy of its ids. The index is
written last and removed first, so a folder that has an index is whole.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformerlm.token_files.array import TOKEN_TYPE_NAMES, open_token_array
from transformerlm.token_files.loss_mask import MASK_SUFFIX, mask_path
from transformerlm.token_files.sidecar import (
    FACTS,
    OFFSETS_SUFFIX,
    check_types,
    offsets_path,
    read_facts,
    sidecar_path,
    write_facts,
)
from transformerlm.utils import files

FORMAT = 2
"""The version of a token file that is a folder, which its index names."""
INDEX = "index.json"
_MAX_TOKENS = 1 << 62
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.npy")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TYPES: dict[str, type] = {"file": str, "tokens": int, "bytes": int, "documents": int, "sha256": str}
_BESIDE = ("documents_sha256", "mask_sha256")  # of files that a shard may have


@dataclass(frozen=True)
class Shard:
    """One entry of an index: a token file in its folder, and what it holds.

    `bytes` are the documents' UTF-8 bytes, without separators; `sha256` is that of the whole `.npy`, and
    `documents_sha256` that of the file of document offsets beside it, `mask_sha256` that of the mask beside it; None:
    there is no such file.
    """

    file: str
    tokens: int
    bytes: int
    documents: int
    sha256: str
    documents_sha256: str | None = None
    mask_sha256: str | None = None


def facts_path(path: Path) -> Path:
    """Return the path of the JSON with the facts of a token file, its sidecar, or of a folder of shards, its index."""
    return path / INDEX if path.is_dir() else sidecar_path(path)


def stream_sha256(shards: Iterable[Shard]) -> str:
    """Return the sha256 of what an index lists: of a line `SHA256 TOKENS` for each entry, in order."""
    lines = "".join(f"{shard.sha256} {shard.tokens}\n" for shard in shards)
    return hashlib.sha256(lines.encode()).hexdigest()


def remove_index(folder: Path) -> None:
    """Remove the index of a folder whose shards are about to change, so that nobody reads half of them."""
    (folder / INDEX).unlink(missing_ok=True)
    files.sync(folder)


def write_index(folder: Path, shards: Sequence[Shard], facts: Mapping[str, Any]) -> None:
    """Write the index of shards that are in `folder` already, after all of them are on the disk.

    `facts` are those of a sidecar without tokens, bytes, documents and sha256, which are added up here: dtype,
    vocab_size, tokenizer_sha256, separator, separator_id, sources, and what else is worth keeping. An older index is
    removed first.

    Raises:
        ValueError: a shard is not the array that its entry says, the folder holds another `.npy`, or the index would be
            larger than a reader takes.
        FileNotFoundError: a shard is missing.
    """
    values = {
        "format": FORMAT,
        "tokens": sum(shard.tokens for shard in shards),
        "bytes": sum(shard.bytes for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "sha256": stream_sha256(shards),
        **facts,
        "shards": [{key: value for key, value in asdict(shard).items() if value is not None} for shard in shards],
    }
    where = folder / INDEX
    check_types(values, FACTS, where=str(where))
    _checked_shards(values, where)
    remove_index(folder)
    _check_folder(folder, shards)
    for shard in {shard.file: shard for shard in shards}.values():
        open_shard(folder, shard, dtype=values["dtype"])
        files.sync(folder / shard.file)
        if shard.documents_sha256 is not None:
            files.sync(offsets_path(folder / shard.file))
        if shard.mask_sha256 is not None:
            files.sync(mask_path(folder / shard.file))
    files.sync(folder)  # the shards' names before the index's
    write_facts(where, values)


def read_index(folder: Path) -> tuple[dict[str, Any], list[Shard]]:
    """Return the facts in the index of a folder, and its shards; no shard is opened.

    Raises:
        FileNotFoundError: the index or a shard is missing.
        ValueError: an index that is damaged or contradicts itself, a shard that leads out of the folder, or an `.npy`
            that the index does not list.
    """
    where = folder / INDEX
    if not where.is_file():
        raise FileNotFoundError(
            f"{folder}: expected a folder of token files with an {INDEX}, found none; run transformerlm-make-data again"
        )
    facts = read_facts(where, form=FORMAT)
    shards = _checked_shards(facts, where)
    _check_folder(folder, shards)
    return facts, shards


def open_shard(folder: Path, shard: Shard, *, dtype: str) -> Any:
    """Return the ids of a shard as a read-only memory map, shape (tokens,).

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is not the array that the index says.
    """
    path = folder / shard.file
    tokens = open_token_array(path)
    for key, promised, found in (("tokens", shard.tokens, len(tokens)), ("dtype", dtype, tokens.dtype.name)):
        if promised != found:
            raise ValueError(
                f"{path}: {key} is {promised} in {INDEX}, found {found} in the file; run transformerlm-make-data again"
            )
    return tokens


def _checked_shards(facts: Mapping[str, Any], where: Path) -> list[Shard]:
    """Return the entries of an index, which must agree with each other and with its totals."""

    def error(expected: str, found: object) -> ValueError:
        shown = str(found)[:100]
        return ValueError(f"{where}: expected {expected}, found {shown}; run transformerlm-make-data again")

    if facts["dtype"] not in TOKEN_TYPE_NAMES:
        raise error(f"dtype {' or '.join(TOKEN_TYPE_NAMES)}", repr(facts["dtype"]))
    entries = facts.get("shards")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise error("a list of shards", repr(entries))
    by_name: dict[str, Shard] = {}
    shards = [_shard(entry, f"{where}: shards[{number}]") for number, entry in enumerate(entries)]
    for number, shard in enumerate(shards):
        if by_name.setdefault(shard.file, shard) != shard:
            raise error(f"the same facts for {shard.file} wherever it is listed", f"others in shards[{number}]")
    for key in ("tokens", "bytes", "documents"):
        if (total := sum(getattr(shard, key) for shard in shards)) != facts[key]:
            raise error(f"{key} to be {total}, the sum over its shards", facts[key])
    if facts["tokens"] > _MAX_TOKENS:
        raise error(f"at most {_MAX_TOKENS} tokens", facts["tokens"])
    if (digest := stream_sha256(shards)) != facts["sha256"]:
        raise error(f"sha256 {digest}, that of its shards", facts["sha256"])
    return shards


def _shard(entry: Mapping[str, Any], where: str) -> Shard:
    check_types(entry, _TYPES, where=where)
    shard = Shard(**{key: entry.get(key) for key in (*_TYPES, *_BESIDE)})  # type: ignore[arg-type]
    if not _NAME.fullmatch(shard.file) or shard.file.endswith((OFFSETS_SUFFIX, MASK_SUFFIX)):
        expected = "expected the name of a token file in this folder, such as 00000.npy"
        raise ValueError(f"{where}: {expected}, found {shard.file[:100]!r}; run transformerlm-make-data again")
    for key, value in (("sha256", shard.sha256), *((key, getattr(shard, key)) for key in _BESIDE)):
        if value is not None and not (isinstance(value, str) and _SHA256.fullmatch(value)):
            expected = f"expected {key} of 64 hexadecimal digits"
            raise ValueError(f"{where}: {expected}, found {str(value)[:100]!r}; run transformerlm-make-data again")
    return shard


def _check_folder(folder: Path, shards: Sequence[Shard]) -> None:
    """Refuse a folder without one of the shards, or with one too many; it is listed, and no shard is opened."""
    named = {shard.file for shard in shards}
    with os.scandir(folder) as entries:
        there = {entry.name: entry for entry in entries if _NAME.fullmatch(entry.name)}
    if missing := sorted(named - there.keys()):
        raise FileNotFoundError(
            f"{folder / missing[0]}: listed in {INDEX}, but missing, as {len(missing)} of {len(named)} shards are; "
            "restore it, or run transformerlm-make-data again"
        )
    if extra := sorted(name for name in there.keys() - named if not name.endswith((OFFSETS_SUFFIX, MASK_SUFFIX))):
        raise ValueError(
            f"{folder / extra[0]}: expected only the {len(named)} shards that {INDEX} lists, found this one, too; move "
            "it out of the folder"
        )
    for name in named:
        path = folder / name
        if there[name].is_symlink() and path.resolve().parent != folder.resolve():
            raise ValueError(
                f"{path}: expected a file in this folder, found a link to {path.resolve()}; put the file itself there"
            )
