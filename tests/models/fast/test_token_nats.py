"""The loss of each token with a backward pass of its own: the plain form's numbers, in any blocks."""

from __future__ import annotations

import pytest
import torch

from transformerlm.models import functional
from transformerlm.models.fast.token_nats import token_nats
from transformerlm.utils import row_blocks as blocks
from transformerlm.utils.plain_forms import plain_forms


@pytest.mark.parametrize("elements", [1, 10, 25, 10_000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_it_is_the_plain_form(dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, dtypes and gradients agree, with a last block that is smaller, too."""
    monkeypatch.setattr(blocks, "CPU_ELEMENTS", elements)
    logits, targets = torch.randn(2, 7, 5).to(dtype).requires_grad_(), torch.randint(0, 5, (2, 7))
    fast = token_nats(logits, targets)
    upstream = torch.randn_like(fast)
    with plain_forms():
        plain = functional.token_nats(logits, targets)
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(
        torch.autograd.grad(fast, logits, upstream), torch.autograd.grad(plain, logits, upstream)
    )


def test_only_the_logits_wait_for_the_backward_pass() -> None:
    """A target and one number a row are kept besides, and no table of exponentials."""
    logits, targets, saved = torch.randn(30, 50, requires_grad=True), torch.zeros(30, dtype=torch.long), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        token_nats(logits, targets).sum().backward()
    assert sum(saved) == logits.numel() + 2 * 30
