"""Norm and gate as kernels have the numbers of their plain forms, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels import DEVICE, launch_here
from transformerlm.models import functional
from transformerlm.models.fast import gated_silu, rms_norm
from transformerlm.utils.plain_forms import plain_forms

kernels = pytest.importorskip("transformerlm.models.fast.row_kernels", reason="no Triton", exc_type=ImportError)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, weight, 1e-3)


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return the tensors for which a kernel was wanted; tiles are small, so that there are several."""
    monkeypatch.setattr(kernels, "_TILE", 16)
    return launch_here(monkeypatch, rms_norm, gated_silu)


def make_inputs(second: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return `(3, 5, 6)`, not contiguous, and a second input."""
    x = torch.randn(5, 3, 6, device=DEVICE, dtype=dtype).transpose(0, 1)
    return x.requires_grad_(), torch.randn(second, device=DEVICE, dtype=dtype, requires_grad=True)


def check_against_plain(function: Callable[[Tensor, Tensor], Tensor], inputs: tuple[Tensor, Tensor]) -> None:
    grad = torch.randn(5, 3, 6, device=DEVICE).transpose(0, 1)
    found = function(*inputs)
    grads = torch.autograd.grad(found, inputs, grad)
    with plain_forms():
        expected = function(*inputs)
        expected_grads = torch.autograd.grad(expected, inputs, grad)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("num_programs", [3, 512])
def test_the_norm_is_that_of_the_plain_form(
    num_programs: int, asked: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifteen rows of six, two at a time: the last tile is half full, and a program may have several."""
    monkeypatch.setattr(kernels, "_MAX_PROGRAMS", num_programs)
    check_against_plain(norm, make_inputs((6,)))
    assert len(asked) == 2, "forward and backward"


def test_the_gate_is_that_of_the_plain_form(asked: list[Tensor]) -> None:
    """Ninety numbers, sixteen at a time."""
    check_against_plain(functional.gated_silu, make_inputs((3, 5, 6)))
    assert len(asked) == 2, "forward and backward"


@pytest.mark.parametrize("function", [norm, functional.gated_silu], ids=["norm", "gate"])
def test_bf16_comes_back_as_it_went_in(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Results and gradients have the inputs' dtypes and are those of fp32, rounded."""
    inputs = make_inputs((6,) if function is norm else (3, 5, 6), torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    found = function(*inputs)
    grads = torch.autograd.grad(found.float().sum(), inputs)
    with plain_forms():
        expected = function(*wide)
        expected_grads = torch.autograd.grad(expected.sum(), wide)
    for x, y in zip((found, *grads), (expected, *expected_grads), strict=True):
        assert x.dtype == torch.bfloat16
        # A device rounds to nearest, Triton in Python cuts off.
        torch.testing.assert_close(x.float(), y, rtol=2**-7, atol=1e-6)


def test_rows_that_no_program_can_hold_and_none_at_all_take_the_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is not asked, and the numbers are the same."""
    monkeypatch.setattr(kernels, "norm_forward", None)
    monkeypatch.setattr(kernels, "gate_forward", None)
    monkeypatch.setattr(kernels, "MAX_COLUMNS", 5)
    check_against_plain(norm, make_inputs((6,)))
    empty = torch.zeros(0, 4, device=DEVICE, requires_grad=True)
    assert norm(empty, torch.ones(4, device=DEVICE)).shape == functional.gated_silu(empty, empty).shape == (0, 4)
