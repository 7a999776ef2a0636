"""Behaviour of the norm and the gate with backward passes of their own: autograd's numbers, in any blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from transformerlm.models.fast.elementwise import gated_silu, rms_norm
from transformerlm.utils import row_blocks as blocks

Function = Callable[[Tensor, Tensor], Tensor]
CASES: dict[str, tuple[Function, Function, tuple[int, ...]]] = {
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-3), lambda x, w: F.rms_norm(x, (6,), w, 1e-3), (6,)),
    "gated_silu": (gated_silu, lambda gate, x: F.silu(gate) * x, (3, 5, 6)),
}


def _inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 6, dtype=dtype).transpose(0, 1)  # not contiguous
    return x.requires_grad_(), torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("elements", [1, 13, 10**6])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_torchs(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the blocks, also for a tensor that is not contiguous."""
    monkeypatch.setattr(blocks, "CPU_ELEMENTS", elements)
    function, expected, shape = CASES[name]
    inputs = _inputs(shape)
    torch.testing.assert_close(function(*inputs), expected(*inputs))
    grad = torch.randn(3, 5, 6, dtype=torch.float64)
    found = torch.autograd.grad(function(*inputs), inputs, grad)
    torch.testing.assert_close(found, torch.autograd.grad(expected(*inputs), inputs, grad))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """gradcheck in float64."""
    function, _, shape = CASES[name]
    assert torch.autograd.gradcheck(function, _inputs(shape))


@pytest.mark.parametrize("name", CASES)
def test_half_precision_comes_back_as_it_went_in(name: str) -> None:
    """Results and gradients have the inputs' dtypes and are near those of float64."""
    function, expected, shape = CASES[name]
    inputs = _inputs(shape, torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found, reference = function(*inputs), expected(*wide)
    grads = torch.autograd.grad(found.float().sum(), inputs)
    assert {x.dtype for x in (found, *grads)} == {torch.bfloat16}
    for x, y in zip((found, *grads), (reference, *torch.autograd.grad(reference.sum(), wide)), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0.03, atol=0.06)


@pytest.mark.parametrize("name", CASES)
def test_without_gradients_the_formula_is_the_same(name: str) -> None:
    """Evaluation and training see the same numbers, and the inputs are left as they were."""
    function, _, shape = CASES[name]
    inputs = _inputs(shape, torch.float32)
    copies = [x.detach().clone() for x in inputs]
    with torch.no_grad():
        plain = function(*inputs)
    torch.testing.assert_close(plain, function(*inputs), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_only_the_inputs_wait_for_the_backward_pass(name: str) -> None:
    """And one number a row: no step's result is kept."""
    function, _, shape = CASES[name]
    inputs, saved = _inputs(shape), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        function(*inputs).sum().backward()
    assert 0 < sum(saved) <= sum(x.numel() for x in inputs) + 15
