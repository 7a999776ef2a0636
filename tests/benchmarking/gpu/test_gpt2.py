"""The suite's part about 124 M parameters: what its rows are about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarking.gpu import gpt2
from benchmarking.gpu.results import read
from benchmarking.gpu.task import Task
from benchmarking.peers.training import TrainCase
from transformerlm.models.transformer import TransformerLM


def test_the_peak_is_that_of_the_steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrices of the product that is measured beside them come into memory after it is read."""
    allocated = [4e9]

    def matmul_peak(*_: Any) -> Callable[[], dict[str, float]]:
        allocated[0] += 0.4e9
        return lambda: {"flops_per_second": 1e12}

    monkeypatch.setattr(gpt2, "MatmulPeak", matmul_peak)
    monkeypatch.setattr(gpt2, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: allocated[0])
    hparams = TransformerLM(**gpt2.TINY.model(), device="meta").hparams()
    task = Task("gpt2", "cuda", True, tmp_path, tmp_path, seconds=60.0)
    gpt2._measure(task, TrainCase(hparams, 4, "cuda"), lambda: 0.0, 1.5)
    (line,) = read(tmp_path)
    assert line["cells"]["peak_gb"] == 4.0
    assert line["cells"]["first_step_s"] == 1.5
