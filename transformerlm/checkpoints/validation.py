"""What a checkpoint from a stranger must satisfy before one of its tensors is allocated or one of its paths is opened.

The sha256 sums in a checkpoint show damage, not intent: whoever wrote the files wrote the sums. So the header of a
`.safetensors` file is compared with the file's real size and with the model before the model is built, and no file may
be a link that leads out of the checkpoint.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformerlm.checkpoints.layout import MODEL, OPTIMIZER, kind_of, missing_files, single_name
from transformerlm.distributed.world import World, gather_text, is_main
from transformerlm.utils.files import file_sha256, wait_for
from transformerlm.utils.json_files import parse_json_object, read_json_object, values_sha256

FORMAT = 1
FORMAT_OF_SEVERAL_FILES = 2
"""The format where weights or optimizer are in several files, so that versions that know only the first say so."""
_MAX_STATE_BYTES = 64 * 2**20

MAX_HEADER_BYTES = 1 << 25
_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_STATE_TYPES: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "tokens": (int,),
    "best_val_loss": (float, int, type(None)),
    "val_loss": (float, int, type(None)),
    "best_step": (int, type(None)),
    "lowest_val_loss": (float, int, type(None)),
    "patience_val_loss": (float, int, type(None)),
    "validations_since_lowest": (int,),
    "seconds": (float, int),
    "elapsed_s": (float, int),
    "wandb_id": (str, type(None)),
    "data": (dict,),
    "rng": (dict,),
    "optimizer": (dict,),
    "sha256": (dict,),
}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or in another format."""


class CheckpointFormatError(CheckpointError):
    """A checkpoint that another version wrote; it may well be whole."""


class CheckpointNotSharedError(CheckpointError):
    """A checkpoint that some ranks do not see; it may well be whole."""


class CheckpointNotNowError(CheckpointError):
    """A checkpoint that cannot be read now, as by an error of the disk or for lack of memory; it may well be whole."""


def read_state(directory: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint's `state.json`.

    Raises:
        CheckpointError: it is missing, not JSON, or in another format.
    """
    path = directory / "state.json"
    try:
        state = read_json_object(path, max_bytes=_MAX_STATE_BYTES)
    except OSError as error:
        raise CheckpointNotNowError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{error}; damaged") from None
    if type(state.get("format")) is not int:
        raise CheckpointError(f"{path}: expected an object with a format number; damaged")
    if state["format"] not in (FORMAT, FORMAT_OF_SEVERAL_FILES):
        known = f"{FORMAT} or {FORMAT_OF_SEVERAL_FILES}"
        raise CheckpointFormatError(f"{path}: expected checkpoint format {known}, found {state['format']}")
    if type(state.get("step")) is not int or not isinstance(state.get("sha256"), dict):
        raise CheckpointError(f"{path}: expected the keys step and sha256; damaged")
    if state.get("state_sha256") != values_sha256(state, kept_in="state_sha256"):
        raise CheckpointError(f"{path}: its values do not have the sha256 recorded with them; damaged")
    with as_checkpoint_error(f"{path}: "):
        check_state_types(state)
    return state


def verify(
    directory: Path,
    *,
    world: World = World(),  # noqa: B008 (frozen)
    weights_only: bool = False,
) -> dict[str, Any]:
    """Return the checkpoint's state after checking that every file is there and has its recorded sha256.

    All ranks call this. Each hashes its share of the files, and all come to the same result. With `weights_only` the
    optimizer's files need only be there: they are two thirds of the bytes, and only a training reads them.

    Raises:
        CheckpointError: a file is missing, cannot be read, or has changed.
        CheckpointNotSharedError: rank 0 sees another checkpoint than another rank, which is not damage.
    """
    state: dict[str, Any] = {}
    with agreed(world):
        if is_main(world):
            state = _read_listed(directory)
    with agreed(world):
        if not is_main(world):
            state = _read_shared(directory)
    if len(set(gather_text(state["state_sha256"], world))) > 1:
        raise CheckpointNotSharedError(f"{directory}: expected the same checkpoint on all ranks, found several")
    with agreed(world), as_checkpoint_error():
        # Tensor files in order, each read by the rank after the one that wrote it, then the small files.
        names = sorted(state["sha256"], key=lambda name: (not name.endswith(".safetensors"), name))
        names = [name for name in names if not (weights_only and kind_of(name) == OPTIMIZER)]
        for name in names[(world.rank - 1) % world.world_size :: world.world_size]:
            _check_sum(directory, name, state["sha256"][name])
    return state


def fingerprint(state: Mapping[str, Any]) -> str:
    """Return step and the first eight digits of the sha256 of the weights, from a checkpoint's state.

    Where several files hold the weights, it is the sha256 of their sums, in order.
    """
    sums = {name: value for name, value in state["sha256"].items() if kind_of(name) == MODEL}
    whole = (
        sums.get(single_name(MODEL))
        or hashlib.sha256("".join(sums[name] for name in sorted(sums)).encode()).hexdigest()
    )
    return f"{state['step']}-{whole[:8]}"


def _read_listed(directory: Path) -> dict[str, Any]:
    """Return the state of a checkpoint that has all files that it lists, and lists all that it must have."""
    with as_checkpoint_error():
        check_contained(directory)
    state = read_state(directory)
    found = set(file_names(directory)) - {"state.json"}
    for name in state["sha256"]:
        if name not in found:
            raise CheckpointError(f"{directory}: {name} is missing")
    may_be_several = state["format"] == FORMAT_OF_SEVERAL_FILES
    if missing := missing_files(state["sha256"].keys(), may_be_several=may_be_several):
        raise CheckpointError(f"{directory}: state.json does not list {', '.join(missing)}")
    return state


def _read_shared(directory: Path) -> dict[str, Any]:
    """Return the state of a checkpoint that rank 0 sees whole, once all of it is visible here, too."""
    try:
        wait_for(directory / "state.json")
        state = read_state(directory)
        for name in state["sha256"]:
            wait_for(directory / name)
    except (OSError, CheckpointError) as error:
        raise CheckpointNotSharedError(
            f"{error}, but rank 0 does: expected all machines to see the same directory"
        ) from None
    return state


def _check_sum(directory: Path, name: str, expected: str) -> None:
    actual = file_sha256(directory / name)
    if actual != expected:
        raise CheckpointError(f"{directory}: {name} is damaged: sha256 {actual[:12]}..., recorded {expected[:12]}...")


@contextmanager
def agreed(world: World) -> Iterator[None]:
    """Let a CheckpointError of one rank be raised by all of them when the block ends, as the first rank has it.

    An OSError remains one on its own rank, and is a CheckpointError on the others.
    """
    problem: CheckpointError | OSError | None = None
    try:
        yield
    except (CheckpointError, OSError) as error:
        problem = error
    kinds = {kind.__name__: kind for kind in (CheckpointFormatError, CheckpointNotSharedError, CheckpointNotNowError)}
    texts = gather_text("" if problem is None else f"{type(problem).__name__}: {problem}", world)
    if isinstance(problem, OSError):
        raise problem
    for found in filter(None, texts):
        kind, message = found.split(": ", 1)
        raise kinds.get(kind, CheckpointError)(message)


@dataclass(frozen=True)
class TensorFacts:
    """What a safetensors header says about one tensor."""

    dtype: str
    shape: tuple[int, ...]
    begin: int = field(default=0, compare=False)
    """Where its data begin in the file."""


def check_contained(directory: Path) -> None:
    """Refuse a checkpoint that is a link, or that holds a link leading out of it.

    Raises:
        ValueError: it is, or does.
    """
    if directory.is_symlink():
        raise ValueError(f"{directory}: expected a directory, found a link (name the directory itself)")
    root = directory.resolve()
    for path in directory.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise ValueError(f"{path}: expected a file of the checkpoint, found a link out of it (copy the file here)")


def check_state_types(state: Mapping[str, Any]) -> None:
    """Refuse a `state.json` whose values do not have the types of their keys.

    Raises:
        ValueError: a value has another type; the message names its key.
    """
    for key, kinds in _STATE_TYPES.items():
        if key in state and (
            type(state[key]) not in kinds or (type(state[key]) is int and not 0 <= state[key] < 2**63)
        ):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"expected {key} to be {names}, found {str(state[key])[:60]}")
    for key in ("data", "sha256"):
        if not all(isinstance(value, str) for value in state.get(key, {}).values()):
            raise ValueError(f"expected {key} to hold strings")


def read_header(path: Path) -> dict[str, TensorFacts]:
    """Return what the header of a `.safetensors` file says, checked against the file's size; no tensor is read.

    Raises:
        ValueError: a length, an offset or a shape that contradicts the file, overlapping tensors, or gaps.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        room = min(size - 8, MAX_HEADER_BYTES)
        if size < 8 or length > room:
            raise ValueError(f"{path}: expected a header of at most {max(0, room):,} bytes, found {length:,}")
        text = file.read(length)
    header = parse_json_object(text.decode("utf-8", "replace"), where=f"{path}: header")
    header.pop("__metadata__", None)
    facts = {name: _check_entry(path, name, entry, data_begin=8 + length) for name, entry in header.items()}
    end = 0
    for begin, stop, name in sorted((*entry["data_offsets"], name) for name, entry in header.items()):
        if begin != end:
            raise ValueError(f"{path}: {name}: expected its data at offset {end:,}, found {begin:,}")
        end = stop
    if end != size - 8 - length:
        raise ValueError(f"{path}: expected {end:,} bytes of tensors, found {size - 8 - length:,}")
    return facts


def _check_entry(path: Path, name: str, entry: Any, *, data_begin: int) -> TensorFacts:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{path}: {name}: expected dtype, shape and data_offsets, found {str(entry)[:60]}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ValueError(f"{path}: {name}: expected a dtype such as F32, found {str(dtype)[:60]!r}")
    for values in (shape, offsets):
        if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 2**63 for value in values):
            raise ValueError(f"{path}: {name}: expected whole numbers >= 0, found {str(values)[:60]}")
    if len(shape) > 8 or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _ITEM_BYTES[dtype]:
        found = f"shape {str(shape)[:60]} at {str(offsets)[:60]}"
        raise ValueError(f"{path}: {name}: expected offsets that hold the shape, found {dtype}, {found}")
    return TensorFacts(dtype, tuple(shape), data_begin + offsets[0])


def check_weights(directory: Path, found: Mapping[str, TensorFacts], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint whose headers do not list exactly these tensors in fp32; no tensor is read.

    Raises:
        ValueError: a tensor is missing or unknown, or has another shape or dtype.
    """
    if found.keys() != shapes.keys():
        different = ", ".join(sorted(found.keys() ^ shapes.keys())[:4])
        raise ValueError(f"{directory}: weights do not fit the model of config.toml: {different}")
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise ValueError(f"{directory}: {name}: expected shape {shape}, found {found[name].shape}")
        if found[name].dtype != "F32":
            raise ValueError(f"{directory}: {name}: expected dtype F32, found {found[name].dtype}")


def check_size(directory: Path, found: Mapping[str, TensorFacts], num_parameters: int) -> None:
    """Refuse a checkpoint whose weights are not `num_parameters` numbers, before a model of that size is built.

    Raises:
        ValueError: it holds more or fewer.
    """
    numbers = sum(math.prod(facts.shape) for facts in found.values())
    if numbers != num_parameters:
        raise ValueError(
            f"{directory}: weights do not fit the model of config.toml: expected {num_parameters:,} numbers, "
            f"found {numbers:,}"
        )


def check_finite(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Refuse tensors that hold NaN or infinity.

    Raises:
        ValueError: one does; the message names the first.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{directory}: {name}: expected finite numbers, found NaN or infinity")


def check_optimizer_state(state_dict: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuse an optimizer's state with a tensor that is neither a single number nor has the shape of its parameter.

    `shapes` are those of the parameters, in the order of the optimizer's groups.

    Raises:
        ValueError: there is such a tensor, or one that belongs to no parameter.
    """
    for index, values in state_dict["state"].items():
        if not 0 <= index < len(shapes):
            raise ValueError(f"expected the state of {len(shapes)} parameters, found one with number {index}")
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim and tuple(value.shape) != shapes[index]:
                raise ValueError(
                    f"{key} of parameter {index}: expected shape {shapes[index]}, found {tuple(value.shape)}"
                )


@contextmanager
def as_checkpoint_error(prefix: str = "") -> Iterator[None]:
    """Turn any error that a stranger's file causes into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointNotNowError(f"{prefix}{error.filename}: cannot be read: {error.strerror}") from None
    except KeyError as error:
        raise CheckpointError(f"{prefix}expected the key {error}, found none") from None
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"{prefix}{error}") from None


def file_names(directory: Path) -> Iterator[str]:
    """Yield the name of each file in a checkpoint, relative to it, in order."""
    return (path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file())
