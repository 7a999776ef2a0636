"""Reading a token file: its ids as a memory map, and the facts of the sidecar beside it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from transformerlm.token_files.array import open_token_array
from transformerlm.utils.json_files import read_json_object, values_sha256

FORMAT = 1
"""The version of the sidecar, which `writer` writes and `TokenDataset` expects."""
_MAX_SIDECAR_BYTES = 1 << 24
_SCAN_ELEMENTS = 2**22


def sidecar_path(path: Path) -> Path:
    """Return where the sidecar of a token file lies: `train.json` beside `train.npy`."""
    return path.with_suffix(".json")


class TokenDataset:
    """A token file written by transformerlm-make-data, memory-mapped, with the facts of its sidecar.

    `tokens` is the read-only array; `num_tokens`, `num_bytes`, `num_documents`, `vocab_size`, `tokenizer_sha256` and
    `sha256` come from the JSON file beside it. Raises FileNotFoundError when one of the two is absent, and ValueError
    when one is malformed or they contradict each other.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata = _read_sidecar(self.path)
        self.tokens = open_token_array(self.path)
        self.num_tokens: int = self.metadata["tokens"]
        self.num_bytes: int = self.metadata["bytes"]
        self.num_documents: int = self.metadata["documents"]
        self.vocab_size: int = self.metadata["vocab_size"]
        self.tokenizer_sha256: str = self.metadata["tokenizer_sha256"]
        self.sha256: str = self.metadata["sha256"]
        if len(self.tokens) != self.num_tokens:
            raise _contradiction(self.path, "tokens", self.num_tokens, len(self.tokens))
        if self.tokens.dtype.name != self.metadata["dtype"]:
            raise _contradiction(self.path, "dtype", self.metadata["dtype"], self.tokens.dtype.name)

    def __len__(self) -> int:
        return self.num_tokens

    def bytes_per_token(self) -> float:
        """Return how many bytes of text one token stands for on average; loss in bits per byte divides by it."""
        return self.num_bytes / self.num_tokens

    def max_id(self) -> int:
        """Return the largest id in the file, reading it once in blocks; -1 when it is empty."""
        starts = range(0, self.num_tokens, _SCAN_ELEMENTS)
        return max((int(self.tokens[start : start + _SCAN_ELEMENTS].max()) for start in starts), default=-1)

    def verify(self) -> None:
        """Read the whole file and raise ValueError when its sha256 is not the sidecar's."""
        with self.path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise _contradiction(self.path, "sha256", self.sha256, found)


_SIDECAR_TYPES: dict[str, type] = {
    "tokens": int,
    "bytes": int,
    "documents": int,
    "dtype": str,
    "vocab_size": int,
    "tokenizer_sha256": str,
    "sha256": str,
}


def _read_sidecar(path: Path) -> dict[str, Any]:
    sidecar = sidecar_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such token file; run transformerlm-make-data to write it")
    if not sidecar.is_file() and path.suffix != ".npy":
        raise FileNotFoundError(
            f"{path}: expected a token file (.npy, with a .json beside it), found neither; transformerlm-make-data "
            "makes one from text"
        )
    if not sidecar.is_file():
        raise FileNotFoundError(f"{sidecar}: missing beside {path.name}; run transformerlm-make-data to write both")
    try:
        metadata = read_json_object(sidecar, max_bytes=_MAX_SIDECAR_BYTES)
    except ValueError as error:
        raise ValueError(f"{error}; run transformerlm-make-data again") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{sidecar}: expected format {FORMAT}, found {metadata.get('format')!r}; run transformerlm-make-data again"
        )
    for key, kind in _SIDECAR_TYPES.items():
        if type(metadata.get(key)) is not kind:
            expected = f"expected {key} of type {kind.__name__}, found {metadata.get(key)!r}"
            raise ValueError(f"{sidecar}: {expected}; run transformerlm-make-data again")
        if isinstance(metadata[key], int) and metadata[key] < 0:
            raise ValueError(f"{sidecar}: expected {key} >= 0, found {metadata[key]}; make the file again")
    promised = metadata.get("sidecar_sha256")  # the first sidecars had none
    if promised is not None and promised != (found := values_sha256(metadata, kept_in="sidecar_sha256")):
        raise ValueError(
            f"{sidecar}: its values have changed since it was written (their sha256 is {found}, sidecar_sha256 "
            f"{promised}); run transformerlm-make-data again"
        )
    return metadata


def _contradiction(path: Path, key: str, promised: object, found: object) -> ValueError:
    return ValueError(
        f"{path}: {key} is {promised} in {path.with_suffix('.json').name}, found {found} in the file; "
        "run transformerlm-make-data again"
    )
