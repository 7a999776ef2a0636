"""Where the tests of Triton's kernels run them: on a CUDA device, or else as Python on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from transformerlm.utils import triton_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def launch_here(monkeypatch: pytest.MonkeyPatch, *modules: object) -> list[Tensor]:
    """Let `modules` launch their kernels on `DEVICE`; return the list of the tensors for which they asked to."""
    pytest.importorskip("triton", reason="no Triton for this system")
    asked: list[Tensor] = []
    kinds = triton_kernels.DTYPES

    def can_launch(x: Tensor) -> bool:
        asked.append(x)
        return x.dtype in kinds

    for module in modules:
        monkeypatch.setattr(module, "can_launch", can_launch)
    return asked
