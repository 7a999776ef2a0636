"""Token files and the batches cut from them.

A training batch is a pure function of (seed, step): which windows it holds depends neither on the number of ranks and
micro-batches it is dealt out to, nor on what was drawn before, so a resumed run sees what an uninterrupted one does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transformerlm.training.token_array import open_token_array
from transformerlm.utils.json_files import read_json_object, values_sha256

Tokens = npt.NDArray[Any]
Batch = tuple[Tensor, Tensor]

SIDECAR_FORMAT = 1
_MAX_SIDECAR_BYTES = 1 << 24
_SCAN_ELEMENTS = 2**22


def sample_starts(
    num_tokens: int, *, batch_size: int, context_length: int, seed: int, step: int
) -> npt.NDArray[np.int64]:
    """Return the first positions of the `batch_size` windows of batch (seed, step), each equally likely.

    The numbers are the raw 64-bit words of numpy's Philox generator keyed with (seed, step), modulo the number of
    starts. numpy promises that this stream never changes, which it does not for `Generator.integers`; the modulo
    favours small starts by less than num_tokens / 2^64. Raises ValueError when there are fewer than context_length + 1
    tokens.
    """
    num_starts = _num_starts(num_tokens, context_length)
    if seed < 0 or step < 0:
        raise ValueError(f"data: seed and step must be at least 0, got seed {seed} and step {step}")
    words = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(batch_size)
    return (words % np.uint64(num_starts)).astype(np.int64)


def get_batch(
    tokens: Tokens,
    *,
    batch_size: int,
    context_length: int,
    seed: int,
    step: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    micro_batch: int = 0,
    num_micro_batches: int = 1,
) -> Batch:
    """Return one part of batch (seed, step): inputs and targets, int64, `(windows, context_length)`.

    `batch_size` counts the windows of the whole batch. It is cut into `num_micro_batches * world_size` contiguous parts
    whose sizes differ by one at most; part `micro_batch * world_size + rank` is returned. Raises ValueError when a part
    would be empty, or the data is shorter than a window.
    """
    num_parts, part = num_micro_batches * world_size, micro_batch * world_size + rank
    if not (0 <= rank < world_size and 0 <= micro_batch < num_micro_batches):
        raise ValueError(
            f"data: rank {rank} of {world_size}, micro_batch {micro_batch} of {num_micro_batches}: counted from 0"
        )
    if batch_size < num_parts:
        parts = f"{num_micro_batches} micro-batches x {world_size} ranks"
        raise ValueError(f"data: a batch of {batch_size} windows cannot be cut into {parts}; use a larger batch_size")
    starts = sample_starts(len(tokens), batch_size=batch_size, context_length=context_length, seed=seed, step=step)
    own = starts[part * batch_size // num_parts : (part + 1) * batch_size // num_parts]
    return _windows(tokens, own, context_length, device)


class Prefetcher:
    """Makes the batches of the next step in a thread, while the device computes those of this one.

    `make` is a pure function of the step, so what is made ahead is what would be made later. A step that was not
    foreseen, as after a rollback, is made when it is asked for.
    """

    def __init__(self, make: Callable[[int], list[Batch]]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, "prefetch", initializer=_take_device, initargs=(_current_device(),))
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def __call__(self, step: int) -> list[Batch]:
        """Return the batches of `step`, and begin to make those of the step after it."""
        ahead, self._ahead = self._ahead, None
        batches = ahead[1].result() if ahead and ahead[0] == step else self._make(step)
        self._ahead = (step + 1, self._thread.submit(self._make, step + 1))
        return batches


def _current_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def _take_device(index: int | None) -> None:
    if index is not None:  # each thread has a CUDA device of its own, at first the machine's first
        torch.cuda.set_device(index)


def random_batch(
    dataset: Tokens,
    batch_size: int,
    context_length: int,
    device: torch.device | str,
    *,
    rng: np.random.Generator | None = None,
) -> Batch:
    """Return a batch of random windows, inputs and targets int64 `(batch_size, context_length)`.

    `rng` defaults to a fresh generator seeded by the operating system. Training uses `get_batch` instead.
    """
    rng = np.random.default_rng() if rng is None else rng
    starts = rng.integers(0, _num_starts(len(dataset), context_length), size=batch_size)
    return _windows(dataset, starts, context_length, device)


def sequential_batches(
    tokens: Tokens,
    *,
    batch_size: int,
    context_length: int,
    max_windows: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Yield the data in order as windows that do not overlap, for evaluation; the last batch may be smaller.

    Every token but the first is a target once, except for an end shorter than a window. Raises ValueError when the data
    is shorter than context_length + 1 tokens.
    """
    _num_starts(len(tokens), context_length)
    starts = np.arange((len(tokens) - 1) // context_length, dtype=np.int64) * context_length
    for index in range(0, len(starts[:max_windows]), batch_size):
        yield _windows(tokens, starts[:max_windows][index : index + batch_size], context_length, device)


def _num_starts(num_tokens: int, context_length: int) -> int:
    if num_tokens < context_length + 1:
        raise ValueError(
            f"data: {num_tokens} tokens are too few for a window of context_length + 1 = {context_length + 1}; "
            "use more text or a smaller context_length"
        )
    return num_tokens - context_length


def _windows(tokens: Tokens, starts: npt.NDArray[np.int64], context_length: int, device: torch.device | str) -> Batch:
    device = torch.device(device)
    positions = starts[:, None] + np.arange(context_length + 1)  # (windows, context_length + 1)
    windows = torch.from_numpy(np.asarray(tokens[positions]).astype(np.int64))
    if device.type == "cuda" and torch.cuda.is_available():
        windows = windows.pin_memory()  # lets the copy run while the device computes
    windows = windows.to(device, non_blocking=True)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


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
    sidecar = path.with_suffix(".json")
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
    if metadata.get("format") != SIDECAR_FORMAT:
        raise ValueError(
            f"{sidecar}: expected format {SIDECAR_FORMAT}, found {metadata.get('format')!r}; "
            "run transformerlm-make-data again"
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
