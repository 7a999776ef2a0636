"""Kernels get tensors that they can read, where they can be built; elsewhere nobody notices that there are kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.gpu.fake_cuda import fake_cuda
from transformerlm.utils import triton_kernels
from transformerlm.utils.triton_kernels import can_launch


@pytest.fixture(autouse=True)
def _ask_again() -> Iterator[None]:
    triton_kernels.kernels_work.cache_clear()
    yield
    triton_kernels.kernels_work.cache_clear()


def test_a_tensor_on_a_cpu_goes_to_no_kernel() -> None:
    """Its type decides; Triton is not even looked for."""
    assert not can_launch(torch.zeros(3))
    assert triton_kernels.kernels_work.cache_info().misses == 0


def test_a_tensor_without_memory_goes_to_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake CUDA tensor has a device and no numbers, even where kernels work."""
    monkeypatch.setattr(triton_kernels, "kernels_work", lambda: True)
    with fake_cuda():
        assert not can_launch(torch.zeros(3, device="cuda"))


def test_an_old_card_computes_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton refuses bf16 before 8.0; fp32 goes to the kernels there, too."""
    monkeypatch.setattr(triton_kernels, "kernels_work", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for number, (capability, expected) in enumerate({(7, 5): False, (8, 0): True}.items()):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        x = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda", 40 + number))
        assert triton_kernels.computes(x) is expected
        x.dtype = torch.float32
        assert triton_kernels.computes(x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels work here")
def test_a_kernel_that_cannot_be_built_is_said_once() -> None:
    """Without a device the probe fails: one warning says why, and operators do the work."""
    pytest.importorskip("triton", reason="no Triton for this system")
    with pytest.warns(UserWarning, match="Triton cannot build kernels here .+: training takes slower operators"):
        assert not triton_kernels.kernels_work()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not triton_kernels.kernels_work()


def test_without_triton_nothing_is_said(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    """Windows and macOS have none: that is no fault of anybody's."""
    monkeypatch.setattr(triton_kernels.importlib.util, "find_spec", lambda name: None)
    assert not triton_kernels.kernels_work()
    assert not recwarn.list


BUILD = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from transformerlm.models.fast import row_kernels as rows
from transformerlm.training.fast import adamw_kernel, loss_kernel

ADAMW = dict(may="*i32", weights="*fp32", grads="*fp32", means="*fp32", squares="*fp32", size="i32", kept="fp32",
             new_mean="fp32", new_square="fp32", rate="fp32", floor="fp32", BLOCK="constexpr")
LOSS = dict(logits="*bf16", targets="*i64", nats="*fp32", row_stride="i32", target_stride="i32", num_columns="i32",
            share="fp32", twice_z_loss="fp32", cap="fp32", HAS_CAP="constexpr", BLOCK="constexpr")
NORM = dict(x="*fp32", weight="*fp32", output="*fp32", scale="*fp32", num_rows="i32", num_columns="i32", eps="fp32",
            ROWS="constexpr", COLUMNS="constexpr")
BACK = dict(grad="*fp32", x="*fp32", weight="*fp32", scale="*fp32", grad_x="*fp32", parts="*fp32", num_rows="i32",
            num_columns="i32", num_tiles="i32", ROWS="constexpr", COLUMNS="constexpr")
GATE = dict(gate="*bf16", x="*bf16", output="*bf16", size="i32", TILE="constexpr")
UNGATE = dict(grad="*bf16", gate="*bf16", x="*bf16", grad_gate="*bf16", grad_x="*bf16", size="i64", TILE="constexpr")
KERNELS = [
    (adamw_kernel._adamw_kernel, ADAMW, {"BLOCK": 1024}),
    (loss_kernel._loss_kernel, LOSS, {"HAS_CAP": True, "BLOCK": 4096}),
    (rows._norm_forward_kernel, NORM, {"ROWS": 4, "COLUMNS": 1024}),
    (rows._norm_backward_kernel, BACK, {"ROWS": 4, "COLUMNS": 1024}),
    (rows._gate_forward_kernel, GATE, {"TILE": 4096}),
    (rows._gate_backward_kernel, UNGATE, {"TILE": 4096}),
]
for kernel, signature, constants in KERNELS:
    for capability in (80, 90):
        source = ASTSource(kernel, signature, constexprs=constants)
        code = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert len(code.asm["cubin"]) > 1000
        print(kernel.__name__, capability)
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_cards_that_are_not_here(tmp_path: Path) -> None:
    """Triton and its assembler make machine code for compute capability 8.0 and 9.0 from each of them."""
    pytest.importorskip("triton", reason="no Triton for this system")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", BUILD], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 * len(re.findall(r"^    \(", BUILD, flags=re.MULTILINE))
