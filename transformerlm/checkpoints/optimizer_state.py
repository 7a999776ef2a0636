"""Model and optimizer states as tensors and JSON, without pickle: reading such a file never executes code from it.

`save_training_state` and `load_training_state` keep a whole training state in one safetensors file. Checkpoints, which
have another layout, share the two `optimizer_state_*` functions. Any torch optimizer whose state is tensors and plain
values works.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim import Optimizer

from transformerlm.distributed.rows import Rows
from transformerlm.utils.files import write_whole

FILE_FORMAT = "transformerlm-training-state-1"
_FACTS = "training_state"
_TUPLE = "__tuple__"
_TENSOR = "__tensor__"


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer's state as a checkpoint keeps it.

    Args:
        tensors: this rank's rows of each tensor; the names are those of `optimizer_state_to_tensors`.
        values: everything else, for JSON, with references to the tensors.
    """

    tensors: Mapping[str, Rows]
    values: dict[str, Any]

    @classmethod
    def of(cls, optimizer: Optimizer, rows: Sequence[Rows] | None = None) -> OptimizerState:
        """Return the state of an optimizer; `rows` says which part of each of its parameters is here, None: all of it.

        The parameters are in the order of the optimizer's groups. A tensor that belongs to a parameter and has the
        shape of the rows that are here is cut as the parameter is; any other tensor is whole, and equal on all ranks.
        """
        tensors, values = optimizer_state_to_tensors(optimizer)
        return cls({name: _rows_of(tensor, name, rows) for name, tensor in tensors.items()}, values)


def save_training_state(
    model: nn.Module, optimizer: Optimizer, iteration: int, out: str | os.PathLike[str] | IO[bytes]
) -> None:
    """Write model, optimizer and iteration to a path or a binary file; a file at a path appears whole."""
    optimizer_tensors, optimizer_json = optimizer_state_to_tensors(optimizer)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors.items()}
    facts = {"format": FILE_FORMAT, "iteration": iteration, "optimizer": optimizer_json}
    # One entry, because the library writes several in random order, and equal states should give equal files.
    data = save(_separate(tensors), {_FACTS: json.dumps(facts)})
    if not isinstance(out, str | os.PathLike):
        out.write(data)
        return
    write_whole(Path(out), data)


def load_training_state(src: str | os.PathLike[str] | IO[bytes], model: nn.Module, optimizer: Optimizer) -> int:
    """Load what `save_training_state` wrote into `model` and `optimizer`, and return the iteration.

    Raises ValueError if the file does not have that format, and RuntimeError if it does not fit the model.
    """
    data = Path(src).read_bytes() if isinstance(src, str | os.PathLike) else src.read()
    name = str(src) if isinstance(src, str | os.PathLike) else "training state"
    try:
        facts, tensors = _read_facts(data), load(data)
    except (SafetensorError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name}: not a readable safetensors file ({error}); save it again") from error
    if facts.get("format") != FILE_FORMAT:
        raise ValueError(f"{name}: expected format {FILE_FORMAT!r}, found {facts.get('format')!r}")
    try:
        optimizer_state = optimizer_state_from_tensors(_select(tensors, "optimizer."), facts["optimizer"])
        iteration = int(facts["iteration"])
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{name}: expected an optimizer's state and an iteration, found neither whole ({error})"
        ) from None
    model.load_state_dict(_select(tensors, "model."))
    optimizer.load_state_dict(optimizer_state)
    return iteration


def optimizer_state_to_tensors(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split `optimizer.state_dict()` into named tensors and a dict for JSON that refers to them.

    Tensors are named `state.{parameter}.{key}` and `param_groups.{group}.{key}`. Raises ValueError for a value that is
    neither a tensor nor plain.
    """
    state_dict = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    state = {
        str(index): {key: _encode(value, f"state.{index}.{key}", tensors) for key, value in values.items()}
        for index, values in state_dict["state"].items()
    }
    groups = [
        {key: _encode(value, f"param_groups.{index}.{key}", tensors) for key, value in group.items()}
        for index, group in enumerate(state_dict["param_groups"])
    ]
    return tensors, {"state": state, "param_groups": groups}


def optimizer_state_from_tensors(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state dict that `optimizer_state_to_tensors` split, for `optimizer.load_state_dict`.

    Raises ValueError if a tensor is missing.
    """
    state = {
        int(index): {key: _decode(value, tensors) for key, value in values.items()}
        for index, values in plain["state"].items()
    }
    groups = [{key: _decode(value, tensors) for key, value in group.items()} for group in plain["param_groups"]]
    return {"state": state, "param_groups": groups}


def _rows_of(tensor: Tensor, name: str, rows: Sequence[Rows] | None) -> Rows:
    kind, index, _ = name.split(".", 2)
    if rows is None or kind != "state" or tensor.shape != rows[int(index)].local.shape:
        return Rows.whole(tensor)
    return Rows(tensor, rows[int(index)].shape, rows[int(index)].first)


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if isinstance(value, tuple | list):
        items = [_encode(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"optimizer state: {name} is a {type(value).__name__}; expected a tensor, number, string or list")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if isinstance(value, dict) and _TUPLE in value:
        return tuple(_decode(item, tensors) for item in value[_TUPLE])
    if isinstance(value, dict):
        if value[_TENSOR] not in tensors:
            raise ValueError(f"optimizer state: tensor {value[_TENSOR]} is missing from the file")
        return tensors[value[_TENSOR]]
    return value


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors, no two of which share memory, as the file format demands."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        address = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return separate


def _read_facts(data: bytes) -> dict[str, Any]:
    # The file begins with the header's length in 8 bytes, then the header as JSON.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    facts: dict[str, Any] = json.loads(header.get("__metadata__", {}).get(_FACTS, "{}"))
    return facts


def _select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
