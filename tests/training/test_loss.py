"""Cross-entropy against torch, at extreme logits, and in blocks of any size."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from transformerlm.training.loss import cross_entropy
from transformerlm.utils import row_blocks as blocks

RTOL = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 3, 4)])
def test_equals_torch_in_value_and_gradient(shape: tuple[int, ...], reduction: str) -> None:
    """Any leading dimensions and both reductions to a scalar agree."""
    logits, targets = torch.randn(*shape, 11, requires_grad=True), torch.randint(0, 11, shape)
    found = cross_entropy(logits, targets, reduction=reduction)
    expected = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)
    torch.testing.assert_close(found, expected, **RTOL)
    torch.testing.assert_close(
        torch.autograd.grad(3.0 * found, logits), torch.autograd.grad(3.0 * expected, logits), **RTOL
    )


def test_without_reduction_each_target_has_its_loss_and_gradient() -> None:
    """reduction="none" keeps the shape of the targets, and each loss's gradient is scaled by what flows into it."""
    logits, targets = torch.randn(2, 3, 7, requires_grad=True), torch.randint(0, 7, (2, 3))
    upstream = torch.randn(2, 3)
    found = cross_entropy(logits, targets, reduction="none")
    expected = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(found, expected, **RTOL)
    torch.testing.assert_close(
        torch.autograd.grad(found, logits, upstream), torch.autograd.grad(expected, logits, upstream), **RTOL
    )


@pytest.mark.parametrize("block_elements", [1, 10, 25, 10_000])
def test_blocks_leave_no_trace(monkeypatch: pytest.MonkeyPatch, block_elements: int) -> None:
    """The numbers are the same for one row a block, a smaller last block, and one block of everything."""
    logits, targets = torch.randn(7, 5, requires_grad=True), torch.randint(0, 5, (7,))
    expected = F.cross_entropy(logits, targets)
    monkeypatch.setattr(blocks, "CPU_ELEMENTS", block_elements)
    found = cross_entropy(logits, targets)
    torch.testing.assert_close(found, expected, **RTOL)
    torch.testing.assert_close(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits), **RTOL)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_is_stable_at_large_logits(scale: float) -> None:
    """Logits of +-1e4 neither overflow nor vanish: the loss is finite and that of float64."""
    logits = (torch.randn(5, 9) * scale).requires_grad_()
    targets = torch.randint(0, 9, (5,))
    found = cross_entropy(logits, targets)
    torch.testing.assert_close(found.double(), F.cross_entropy(logits.double(), targets), rtol=1e-5, atol=1e-3)
    found.backward()
    assert torch.isfinite(logits.grad).all()


def test_bfloat16_logits_give_an_fp32_loss() -> None:
    """Half-precision logits are widened first; the gradient comes back in their dtype."""
    logits, targets = torch.randn(4, 50).to(torch.bfloat16).requires_grad_(), torch.randint(0, 50, (4,))
    found = cross_entropy(logits, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.cross_entropy(logits.float(), targets), **RTOL)
    found.backward()
    assert logits.grad.dtype == torch.bfloat16


def test_gradient_is_exact() -> None:
    """The hand-written backward pass is the derivative of the forward pass, by gradcheck in float64."""
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, 1])
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets, reduction="none"), (logits,))


def test_form_for_compiled_code_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain formula that the compiler sees gives the blocked one's value and gradient."""
    logits, targets = torch.randn(6, 8, requires_grad=True), torch.randint(0, 8, (6,))
    eager = cross_entropy(logits, targets)
    (eager_grad,) = torch.autograd.grad(eager, logits)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    compiled = cross_entropy(logits, targets)
    torch.testing.assert_close(eager, compiled, **RTOL)
    torch.testing.assert_close(eager_grad, torch.autograd.grad(compiled, logits)[0], **RTOL)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    """A model that knows nothing has a loss of ln(vocab_size) nats."""
    assert cross_entropy(torch.zeros(3, 100), torch.tensor([0, 50, 99])).item() == pytest.approx(math.log(100))


def test_mismatched_shapes_and_unknown_reductions_are_refused() -> None:
    """The errors show both shapes, or the word that was given."""
    with pytest.raises(ValueError, match=r"logits \(2, 3, 5\) need targets \(2, 3\), got \(2,\)"):
        cross_entropy(torch.zeros(2, 3, 5), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="mean, sum or none, got 'median'"):
        cross_entropy(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), reduction="median")
