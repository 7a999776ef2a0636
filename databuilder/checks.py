"""What is checked before a build of token files begins, or as soon as it is known."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from databuilder.sources import SourceFiles
from transformerlm.token_files.index import INDEX
from transformerlm.token_files.loss_mask import MASK_SUFFIX, mask_path
from transformerlm.token_files.sidecar import FACTS, MAX_BYTES, OFFSETS_SUFFIX, offsets_path, sidecar_path
from transformerlm.tokenizer import Tokenizer
from transformerlm.utils.files import check_free, check_writable
from transformerlm.utils.json_files import read_json_object
from transformerlm.utils.text_formats import format_of


def check_limit(max_tokens: int | None, sources: Sequence[SourceFiles]) -> None:
    """Refuse a limit that is none, or that weights contradict.

    Raises:
        ValueError: it is.
    """
    if max_tokens is None:
        return
    if max_tokens < 1:
        raise ValueError(f"max_tokens: expected at least 1, found {max_tokens}")
    if sources[0].weighted:
        raise ValueError("max_tokens: expected input, found weighted sources, of which it would take the first alone")


def check_room(folder: Path, expected: int) -> None:
    """Refuse early if what was encoded first shows that the disk has too little room.

    Raises:
        OSError: it has too little.
    """
    free = shutil.disk_usage(folder).free
    if expected > free:
        needed = f"about {expected / 1e6:,.0f} MB for the token files"
        raise OSError(f"{folder}: expected {needed}, found {free / 1e6:,.0f} MB free")


def check_split(
    train_path: str | os.PathLike[str], valid_path: str | os.PathLike[str] | None, valid_fraction: float
) -> None:
    """Refuse a split, or names of outputs, that do not fit together.

    Raises:
        ValueError: they do not.
    """
    if not (math.isfinite(valid_fraction) and 0 <= valid_fraction < 1):
        raise ValueError(f"valid_fraction: expected 0 or more and less than 1, found {valid_fraction}")
    if (valid_path is None) != (valid_fraction == 0):
        raise ValueError(
            f"valid_path: expected exactly when valid_fraction is above 0, found {valid_path} with {valid_fraction}"
        )
    for path in (train_path, valid_path):
        if path is not None and Path(path).suffix not in (".npy", ".shards"):
            raise ValueError(f"expected token files that end in .npy, found {path}; a folder of them ends in .shards")
        for suffix in (OFFSETS_SUFFIX, MASK_SUFFIX):
            if path is not None and Path(path).name.endswith(suffix):
                raise ValueError(f"expected a token file that does not end in {suffix}, found {path}")
    if valid_path is not None and Path(valid_path).suffix != Path(train_path).suffix:
        raise ValueError(f"valid_path: expected a name that ends as {train_path} does, found {valid_path}")
    if valid_path is not None and Path(valid_path).resolve() == Path(train_path).resolve():
        raise ValueError(f"valid_path: expected another file than train_path, found {valid_path} twice")


def check_outputs(outputs: Sequence[Path], inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse token files that are inputs, or, without `overwrite`, that exist already.

    Raises:
        ValueError: an output among the inputs, or a folder in its place, or a JSON file that is no sidecar.
        FileExistsError: an output exists already.
        OSError: an output's folder cannot be written to.
    """
    sources = {path.resolve() for path in inputs}
    for output in outputs:
        check_writable(output.parent)
        if output.suffix == ".shards":
            check_free(output, overwrite=overwrite, holds=INDEX, beside=("*.npy",))
            continue
        for path in (output, sidecar_path(output), offsets_path(output), mask_path(output)):
            if path.resolve() in sources:
                raise ValueError(f"{path}: expected an output that is not an input, found it among the inputs")
            if path.is_dir():
                raise ValueError(f"{path}: expected a file to write, found a folder")
            if path.exists() and not overwrite:
                raise FileExistsError(f"{path}: expected no such file yet, found one (overwrite replaces it)")
        _check_is_sidecar(sidecar_path(output))


def _check_is_sidecar(path: Path) -> None:
    """Refuse to overwrite a JSON file that lacks what every sidecar has: it is somebody's own."""
    try:
        found = read_json_object(path, max_bytes=MAX_BYTES)
    except FileNotFoundError:
        return
    except ValueError:
        found = {}
    if FACTS.keys() - found.keys():
        raise ValueError(
            f"{path}: expected the facts of a token file, which overwrite replaces, found another file; move it, or "
            "choose another output"
        )


def check_conversations(paths: Sequence[Path]) -> None:
    """Refuse files that cannot hold conversations, before the first is read.

    Raises:
        ValueError: one is not JSON lines.
    """
    for path in paths:
        if format_of(path).layout != "JSON lines":
            raise ValueError(f"{path}: expected conversations as JSON lines (.jsonl), found another kind of file")


def check_separator(tokenizer: Tokenizer, separator: str) -> None:
    """Refuse a separator that is not one of the tokenizer's special tokens.

    Raises:
        ValueError: it is not.
    """
    if separator not in tokenizer.special_token_ids:
        known = ", ".join(map(repr, tokenizer.special_tokens)) or "none at all"
        raise ValueError(f"separator: expected a special token of the tokenizer ({known}), found {separator!r}")
