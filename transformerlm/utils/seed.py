"""Seeding, and the states of all random generators as plain JSON, for checkpoints that resume exactly."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NUM_KEYS = 624  # of a Mersenne twister


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """Return the states of the global generators of Python, numpy, torch and each CUDA device, as JSON-able values."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _to_text(torch.get_rng_state()),
        "cuda": [_to_text(state) for state in cuda],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned.

    CUDA states are restored for the devices that exist. Raises ValueError if `state` does not have that form.
    """
    try:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, position, has_gauss, cached = state["numpy"]
        if not (len(keys) == _NUM_KEYS and 0 <= position <= _NUM_KEYS):  # numpy would read beyond its memory
            raise ValueError(f"numpy's position {position} in {len(keys)} keys")
        np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(_to_tensor(state["torch"]))
        cuda = [_to_tensor(text) for text in state["cuda"]]
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(
            f"rng state: expected the dict that rng_state() returns, found a malformed one ({error})"
        ) from error
    for index, cuda_state in enumerate(cuda[: torch.cuda.device_count() if torch.cuda.is_available() else 0]):
        torch.cuda.set_rng_state(cuda_state, index)


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _to_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
