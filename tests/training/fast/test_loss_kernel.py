"""The loss as one kernel has the numbers of the plain form, and leaves the gradient in place of the logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.kernels import DEVICE, launch_here
from transformerlm.training import loss
from transformerlm.training.fast import linear_cross_entropy
from transformerlm.utils import row_blocks as blocks
from transformerlm.utils.plain_forms import plain_forms

kernel = pytest.importorskip("transformerlm.training.fast.loss_kernel", reason="no Triton", exc_type=ImportError)


def _inputs(vocab_size: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 4, 5, device=DEVICE), torch.randn(vocab_size, 5, device=DEVICE)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(vocab_size, (2, 4), device=DEVICE)


@pytest.mark.parametrize(("cap", "z_loss", "block"), [(None, 0.0, 64), (None, 0.1, 16), (2.0, 0.0, 16), (2.0, 0.1, 64)])
def test_it_equals_the_plain_form(
    cap: float | None, z_loss: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both numbers and both gradients, with soft cap and z-loss, for rows in chunks, in three blocks or in one."""
    asked = launch_here(monkeypatch, linear_cross_entropy)
    monkeypatch.setattr(kernel, "_BLOCK", block)
    for name in ("_CPU_LOGITS", "_DEVICE_LOGITS"):
        monkeypatch.setattr(blocks, name, 5 * 37)  # chunks of five rows
    hidden, weight, targets = _inputs()
    found = linear_cross_entropy.training_loss(hidden, weight, targets, soft_cap=cap, z_loss=z_loss)
    grads = torch.autograd.grad(3.0 * found[1], (hidden, weight))
    with plain_forms():
        plain = loss.training_loss(hidden, weight, targets, soft_cap=cap, z_loss=z_loss)
    assert [len(logits) for logits in asked] == [5, 3]
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(grads, torch.autograd.grad(3.0 * plain[1], (hidden, weight)))


def test_bf16_logits_become_bf16_gradients() -> None:
    """Sums are fp32 and exact; gradients differ from those of fp32 by their rounding alone."""
    logits = torch.randn(3, 50, device=DEVICE).bfloat16()
    targets = torch.tensor([0, 49, 7], device=DEVICE)
    wide = logits.float().requires_grad_()
    nats = torch.nn.functional.cross_entropy(wide, targets, reduction="sum")
    (expected,) = torch.autograd.grad(nats / 4, wide)
    sums = kernel.replace_by_gradient(logits, targets, num_rows=4, soft_cap=None, z_loss=0.0)
    torch.testing.assert_close(sums[0], nats.detach())
    torch.testing.assert_close(sums[1], wide.detach().logsumexp(-1).square().sum())
    # A device rounds to nearest, Triton in Python cuts off.
    torch.testing.assert_close(logits.float(), expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_a_loss_that_is_not(bad: float) -> None:
    """So the step is refused, as with the plain form; a row of large logits is fine."""
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 1.0, 2.0]], device=DEVICE)
    targets = torch.tensor([1, 2], device=DEVICE)
    fine = kernel.replace_by_gradient(logits.clone(), targets, num_rows=2, soft_cap=None, z_loss=0.0)
    assert fine[0].item() == pytest.approx(2e4 + 0.4076059)
    logits[1, 0] = bad
    assert kernel.replace_by_gradient(logits, targets, num_rows=2, soft_cap=None, z_loss=0.0)[0].isnan()


def test_a_target_that_is_no_id_reads_no_foreign_memory() -> None:
    """It makes the loss nan, which refuses the step."""
    for target in (-1, 3):
        logits = torch.zeros(1, 3, device=DEVICE)
        where = torch.tensor([target], device=DEVICE)
        assert kernel.replace_by_gradient(logits, where, num_rows=1, soft_cap=None, z_loss=0.0)[0].isnan()
