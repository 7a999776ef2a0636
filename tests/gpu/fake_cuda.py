"""CUDA tensors without a device: shapes, dtypes and devices are right, and there are no numbers.

PyTorch's `FakeTensorMode` runs every operator on them and refuses to mix devices. A CPU build has no autograd for them,
and some of Python's doors to the operators ask for a device: `_ByOperators` goes round them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Let tensors made on "cuda" be fake; nothing in it is differentiated."""
    with FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad(), _ByOperators():
        yield


def on_fake_cuda(model: nn.Module) -> nn.Module:
    """Move a model, made on the meta device, in place; call it within `fake_cuda`."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_like(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _like(buffer)
    return model


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="cuda")


_NO_DEVICE = "not linked with support for cuda"


class _ByOperators(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__getitem__:
            return _get(*args)
        if function is Tensor.__setitem__:
            tensor, index, value = args
            if _tensors(index):
                return torch.ops.aten.index_put_(tensor, _with_none(index), value)
            return torch.ops.aten.copy_(_get(tensor, index), value)
        try:
            return function(*args, **(kwargs or {}))
        except RuntimeError as error:
            name = {"__invert__": "bitwise_not"}.get(function.__name__, function.__name__)
            if _NO_DEVICE not in str(error) or not hasattr(torch.ops.aten, name):
                raise
            return getattr(torch.ops.aten, name)(*args, **(kwargs or {}))


def _get(tensor: Tensor, index: Any) -> Tensor:
    if _tensors(index):
        return torch.ops.aten.index(tensor, _with_none(index))
    dim = 0
    for each in _whole(tensor, index):
        if each is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(each, int):
            tensor = tensor.select(dim, each)
            continue
        elif each != slice(None):
            tensor = torch.ops.aten.slice(tensor, dim, each.start, each.stop, each.step or 1)
        dim += 1
    return tensor


def _whole(tensor: Tensor, index: Any) -> list[Any]:
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        place, count = parts.index(Ellipsis), sum(part is not None for part in parts) - 1
        parts[place : place + 1] = [slice(None)] * (tensor.ndim - count)
    return parts


def _tensors(index: Any) -> bool:
    return any(isinstance(part, Tensor) for part in (index if isinstance(index, tuple) else (index,)))


def _with_none(index: Any) -> list[Any]:
    return [part if isinstance(part, Tensor) else None for part in (index if isinstance(index, tuple) else (index,))]
