"""Files of tensors: written as the bytes arrive, and read a slice at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from transformerlm.checkpoints.layout import index_name, parts_of_index, single_name
from transformerlm.checkpoints.validation import CheckpointError, TensorFacts, read_header, unreadable
from transformerlm.utils import files
from transformerlm.utils.json_files import read_json_object

# In the order in which the safetensors library puts them into a file: the largest alignment first.
_DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.uint32: "U32",
    torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_OF_NAMES = {name: dtype for dtype, name in _DTYPES.items()}
_MAX_INDEX_BYTES = 1 << 25


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, and what the header of that file says about it."""

    path: Path
    facts: TensorFacts


class TensorFileWriter:
    """A safetensors file that is written as its bytes arrive, equal to what the library itself writes.

    Errors are kept until `finish`: the ranks that send must not wait for one whose disk is full.

    Args:
        path: the file, which does not exist yet.
        tensors: dtype and shape of each tensor that it will hold.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.path = path
        self.names = file_order({name: dtype for name, (dtype, _) in tensors.items()})
        self._file: BinaryIO | None = None
        self._error: OSError | None = None
        self._attempt(lambda: self._begin(_header({name: tensors[name] for name in self.names})))

    def write(self, data: Tensor) -> None:
        """Append bytes, `(num_bytes,)` of uint8; the tensors' bytes come in the order of `names`."""
        self._attempt(lambda: self._append(data.numpy().data))

    def finish(self) -> None:
        """Close the file and flush it to the disk.

        Raises:
            OSError: this or anything before has failed; the error names the file.
        """
        if self._file is not None:
            self._attempt(self._file.close)
        self._attempt(lambda: files.sync(self.path))
        if self._error is None:
            return
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        self._error.filename = str(self.path)  # a write on a full disk does not say where
        raise self._error

    def _begin(self, header: bytes) -> None:
        self._file = self.path.open("wb")
        self._file.write(header)

    def _append(self, data: memoryview) -> None:
        assert self._file is not None
        self._file.write(data)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._error is None:
            try:
                action()
            except OSError as error:
                self._error = error


def file_order(dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """Return the names of a file's tensors in the order of the file.

    Raises:
        ValueError: a dtype has no place in such a file.
    """
    order = list(_DTYPES)
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES:
            raise ValueError(f"{name}: expected a dtype that a safetensors file can hold, found {dtype}")
    return sorted(dtypes, key=lambda name: (order.index(dtypes[name]), name))


def _header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """Return how a file of these tensors begins: the header's length in 8 bytes, then JSON, padded to 8 bytes."""
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def stored_tensors(directory: Path, kind: str) -> dict[str, StoredTensor]:
    """Return where each tensor of a kind is, from the index and the headers, which must agree; no tensor is read.

    Raises:
        ValueError: a file contradicts itself, the index, or another file.
        OSError: a file cannot be read.
    """
    single, index = directory / single_name(kind), directory / index_name(kind)
    if not index.exists():
        return {name: StoredTensor(single, facts) for name, facts in read_header(single).items()}
    if single.exists():
        raise ValueError(f"{index}: expected an index or {single.name}, found both")
    weight_map = read_json_object(index, max_bytes=_MAX_INDEX_BYTES).get("weight_map")
    try:
        parts = parts_of_index(kind, weight_map)
    except ValueError as error:
        raise ValueError(f"{index}: {error}") from None
    stored: dict[str, StoredTensor] = {}
    for file, names in parts.items():
        found = read_header(directory / file)
        if different := sorted(found.keys() ^ set(names)):
            lists = f"the tensors that {index.name} lists for it"
            raise ValueError(f"{directory / file}: expected {lists}, found others; they differ in {_few(different)}")
        stored |= {name: StoredTensor(directory / file, facts) for name, facts in found.items()}
    return stored


def read_rows(stored: Mapping[str, StoredTensor], wanted: Mapping[str, range | None]) -> Iterator[tuple[str, Tensor]]:
    """Yield each wanted tensor, or only these rows of it (None: all), a file at a time.

    The bytes are read, not mapped: a process that maps a file dies where somebody shortens it, or a network disk fails.

    Raises:
        CheckpointError: a file is missing or damaged.
        CheckpointUnreadableError: a file cannot be read now.
    """
    for path in dict.fromkeys(stored[name].path for name in wanted):
        try:
            read_header(path)  # once more: it may have become shorter since
            with path.open("rb") as file:
                for name, rows in wanted.items():
                    if stored[name].path == path:
                        yield name, _read(file, stored[name].facts, rows)
        except OSError as error:
            raise unreadable(error, path) from None
        except ValueError as error:
            raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None


def _read(file: BinaryIO, facts: TensorFacts, rows: range | None) -> Tensor:
    """Return a tensor, or these rows of it, from its file.

    Raises:
        OSError, ValueError: it cannot be read, or is shorter than its header said.
    """
    shape, dtype = facts.shape, _OF_NAMES[facts.dtype]
    if rows is None or not shape:
        rows = range(shape[0]) if shape else range(1)
    values = torch.empty((len(rows), *shape[1:]) if shape else (), dtype=dtype)
    file.seek(facts.begin + rows.start * math.prod(shape[1:]) * dtype.itemsize)
    data = values.reshape(-1).view(torch.uint8)  # (num_bytes)
    if file.readinto(data.numpy().data) != len(data):  # type: ignore[attr-defined]
        raise ValueError("it ends too early")
    return values


def _few(names: list[str]) -> str:
    return ", ".join(names[:4])[:200] + (", ..." if len(names) > 4 else "")
