"""What every elementwise fast form promises; each of their test files asks for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from transformerlm.utils import row_blocks as blocks
from transformerlm.utils.plain_forms import plain_forms

Function = Callable[[Tensor, Tensor], Tensor]


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return `(3, 5, 6)`, not contiguous, and a second input of `shape`."""
    torch.manual_seed(0)
    x = torch.randn(5, 3, 6, dtype=dtype).transpose(0, 1)
    return x.requires_grad_(), torch.randn(shape, dtype=dtype, requires_grad=True)


def check_equals(
    fast: Function, others: list[Function], shape: tuple[int, ...], elements: int, patch: pytest.MonkeyPatch
) -> None:
    """Compare values and gradients with those of other forms, in blocks of `elements` numbers."""
    patch.setattr(blocks, "CPU_ELEMENTS", elements)
    inputs, grad = make_inputs(shape), torch.randn(3, 5, 6, dtype=torch.float64)
    for other in others:
        with plain_forms():
            expected = other(*inputs)
            expected_grads = torch.autograd.grad(expected, inputs, grad)
        torch.testing.assert_close(fast(*inputs), expected)
        torch.testing.assert_close(torch.autograd.grad(fast(*inputs), inputs, grad), expected_grads)


def check_half_precision(fast: Function, expected: Function, shape: tuple[int, ...]) -> None:
    """Compare dtypes with those of the inputs, and numbers with those of float64."""
    inputs = make_inputs(shape, torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found, reference = fast(*inputs), expected(*wide)
    grads = torch.autograd.grad(found.float().sum(), inputs)
    assert {x.dtype for x in (found, *grads)} == {torch.bfloat16}
    for x, y in zip((found, *grads), (reference, *torch.autograd.grad(reference.sum(), wide)), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0.03, atol=0.06)


def check_without_gradients(plain: Function, shape: tuple[int, ...]) -> None:
    """Compare what evaluation computes with what training does; the inputs are left as they were."""
    inputs = make_inputs(shape, torch.float32)
    copies = [x.detach().clone() for x in inputs]
    with torch.no_grad():
        evaluated = plain(*inputs)
    torch.testing.assert_close(evaluated, plain(*inputs), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


def check_keeps_only_inputs(fast: Function, shape: tuple[int, ...]) -> None:
    """Count what waits for the backward pass: the inputs, and at most one number a row."""
    inputs, saved = make_inputs(shape), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        fast(*inputs).sum().backward()
    assert 0 < sum(saved) <= sum(x.numel() for x in inputs) + 15
