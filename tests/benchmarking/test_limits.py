"""The speeds that results are compared with."""

from __future__ import annotations

import torch

from benchmarking.limits import CopyBandwidth, MatmulPeak


def test_limits_are_positive() -> None:
    """Both measure something on this machine."""
    device = torch.device("cpu")
    assert MatmulPeak(device, torch.float32)()["flops_per_second"] > 0
    assert CopyBandwidth(device)()["bytes_per_second"] > 0
