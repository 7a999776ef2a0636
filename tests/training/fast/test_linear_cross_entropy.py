"""The loss that makes its own logits has torch's numbers, in any chunks, and never holds all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from transformerlm.models.functional import soft_cap
from transformerlm.training import loss
from transformerlm.training.fast.linear_cross_entropy import training_loss
from transformerlm.utils import row_blocks as blocks
from transformerlm.utils.plain_forms import plain_forms


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 7, 5, dtype=dtype), torch.randn(11, 5, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, 11, (2, 7))


def _from_torch(
    hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None, z_loss: float
) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T
    logits = (logits if cap is None else soft_cap(logits, cap)).flatten(0, 1)
    entropy = F.cross_entropy(logits, targets.flatten())
    return entropy, entropy + z_loss * logits.logsumexp(-1).square().mean()


@pytest.mark.parametrize("sizes", [(1, 1), (33, 22), (44, 10**6), (10**6, 10**6)], ids=str)
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_it_equals_the_plain_form_in_value_and_gradient(
    sizes: tuple[int, int], cap: float | None, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the chunks and blocks, both numbers and both gradients are those of torch and of the plain form."""
    monkeypatch.setattr(blocks, "_CPU_LOGITS", sizes[0])
    monkeypatch.setattr(blocks, "CPU_ELEMENTS", sizes[1])
    hidden, weight, targets = _inputs()
    found = training_loss(hidden, weight, targets, soft_cap=cap, z_loss=z_loss)
    grads = torch.autograd.grad(3.0 * found[1], (hidden, weight))
    with plain_forms():
        plain = loss.training_loss(hidden, weight, targets, soft_cap=cap, z_loss=z_loss)
    for expected in (_from_torch(hidden, weight, targets, cap, z_loss), plain):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(grads, torch.autograd.grad(3.0 * expected[1], (hidden, weight)))
    assert not plain[0].requires_grad
    assert not found[0].requires_grad


def test_a_second_backward_pass_is_refused() -> None:
    """The gradients are scaled in place, once; asking again is an error that says so, not a wrong number."""
    hidden, weight, targets = _inputs()
    minimised = training_loss(hidden, weight, targets)[1]
    minimised.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="expected one backward pass, found a second; compute the loss again"):
        minimised.backward()


def test_under_autocast_products_are_bf16_and_the_sums_are_not() -> None:
    """The losses are fp32 and near those of fp32; gradients have their tensors' dtypes; a tied weight gets both."""
    hidden, weight, targets = _inputs(torch.float32)
    expected = _from_torch(hidden, weight, targets, None, 0.0)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = training_loss(hidden * 1.0 + weight.sum(), weight, targets)[1]
        plain = _from_torch(hidden * 1.0 + weight.sum(), weight, targets, None, 0.0)[1]
        near = training_loss(hidden, weight, targets)[1]
    assert found.dtype == torch.float32
    torch.testing.assert_close(near, expected, rtol=0.02, atol=0.02)
    grads = torch.autograd.grad(found, (hidden, weight))
    assert [grad.dtype for grad in grads] == [torch.float32] * 2
    torch.testing.assert_close(grads, torch.autograd.grad(plain, (hidden, weight)), rtol=0.05, atol=0.02)


def test_large_logits_do_not_overflow() -> None:
    """Logits of +-1e4 have the right loss and a finite gradient."""
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    entropy, minimised = training_loss(hidden, weight, torch.tensor([0, 0]))
    assert entropy.item() == pytest.approx(1e4)
    minimised.backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_nothing_as_large_as_the_logits_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for the backward pass is as large as the vectors and the matrix, not as their product."""
    hidden = torch.randn(300, 4, requires_grad=True)
    weight = torch.randn(200, 4, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        training_loss(hidden, weight, torch.zeros(300, dtype=torch.long))[1].backward()
    assert 0 < sum(saved) <= hidden.numel() + weight.numel()


def test_targets_of_another_shape_are_refused() -> None:
    """The message gives both shapes."""
    with pytest.raises(ValueError, match=r"vectors \(2, 3, 5\) need targets \(2, 3\), got \(2,\)"):
        loss.training_loss(torch.zeros(2, 3, 5), torch.zeros(7, 5), torch.zeros(2, dtype=torch.long))
