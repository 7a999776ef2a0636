"""The rotation as a product of complex numbers: the plain form's numbers, however the input lies in memory."""

from __future__ import annotations

import pytest
import torch

from transformerlm.models import functional
from transformerlm.models.fast.rotate import rotate
from transformerlm.utils.plain_forms import plain_forms

RTOL = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize(
    "x",
    [torch.randn(2, 6, 9)[..., 1:], torch.randn(1 + 2 * 6 * 8)[1:].view(2, 6, 8), torch.zeros(0, 6, 8)],
    ids=["odd stride", "odd place", "empty"],
)
def test_it_is_the_plain_form(x: torch.Tensor) -> None:
    """Values and gradients agree, also for features that are not aligned to pairs: torch views those as complex."""
    angles, x = torch.randn(6, 4), x.detach().requires_grad_()
    fast = rotate(x, angles.cos(), angles.sin())
    upstream = torch.randn_like(fast)
    (fast_grad,) = torch.autograd.grad(fast, x, upstream)
    with plain_forms():
        plain = functional.rotate(x, angles.cos(), angles.sin())
    torch.testing.assert_close(fast, plain, **RTOL)
    torch.testing.assert_close(fast_grad, torch.autograd.grad(plain, x, upstream)[0], **RTOL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_it_computes_in_fp32_at_least_and_returns_the_dtype(dtype: torch.dtype) -> None:
    """bfloat16 comes back as bfloat16, rounded once."""
    angles, x = torch.randn(6, 4, dtype=torch.float64), torch.randn(2, 6, 8).to(dtype)
    cos, sin = (x.to(torch.float64 if dtype == torch.float64 else torch.float32) for x in (angles.cos(), angles.sin()))
    found = rotate(x, cos, sin)
    with plain_forms():
        expected = functional.rotate(x.double(), cos.double(), sin.double()).to(dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0.01 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_what_the_compiler_sees_is_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """While torch.compile traces, nothing is handed over: it fuses the formula and has no complex numbers."""
    angles, x = torch.randn(6, 4), torch.randn(2, 6, 8)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    compiled = functional.rotate(x, angles.cos(), angles.sin())
    with plain_forms():
        assert torch.equal(functional.rotate(x, angles.cos(), angles.sin()), compiled)
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin()), compiled, **RTOL)
