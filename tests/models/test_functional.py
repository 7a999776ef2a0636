"""The formulas against torch, at the extremes, and the door between a plain form and its fast one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from transformerlm.models import functional
from transformerlm.models.functional import causal_attention, causal_mask, scaled_dot_product_attention, silu, softmax
from transformerlm.models.transformer import TransformerLM
from transformerlm.utils.plain_forms import plain_forms

RTOL = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax_equals_torch_and_survives_large_inputs(dim: int) -> None:
    """Any dimension works, and values around +-1e4 do not overflow."""
    x = torch.randn(3, 4, 5)
    for inputs in (x, x * 1e4, x + 1e4, x - 1e4):
        torch.testing.assert_close(softmax(inputs, dim), torch.softmax(inputs, dim), **RTOL)


def test_softmax_gradient_equals_torch() -> None:
    """The shift by the maximum does not change the gradient."""
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: softmax(value, -1), (x,))


def test_softmax_of_nothing_is_nothing() -> None:
    """A slice of -inf gives zeros and finite gradients; a partly masked one gives zeros only where it is masked."""
    x = torch.tensor([[-math.inf, -math.inf], [0.0, -math.inf]], requires_grad=True)
    found = softmax(x, -1)
    assert torch.equal(found, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    found.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_softmax_returns_the_dtype_it_was_given() -> None:
    """bfloat16 comes back as bfloat16, and the softmax is computed in fp32."""
    x = torch.randn(8, 100).to(torch.bfloat16)
    found = softmax(x, -1)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.softmax(x.float(), -1).to(torch.bfloat16))


def test_silu_equals_torch_even_where_the_exponential_overflows() -> None:
    """silu is x sigmoid(x), finite at +-1e4."""
    x = torch.tensor([-1e4, -30.0, -1.0, 0.0, 0.5, 30.0, 1e4])
    torch.testing.assert_close(silu(x), torch.nn.functional.silu(x), **RTOL)


def test_attention_equals_torch_with_any_leading_dimensions() -> None:
    """The leading dimensions may be none, one or three."""
    for leading in ((), (3,), (2, 3, 4)):
        query, key, value = (torch.randn(*leading, 5, 8) for _ in range(3))
        found = scaled_dot_product_attention(query, key, value)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(query, key, value), **RTOL)


def test_causal_mask_puts_the_queries_last() -> None:
    """With a cache of two keys, the first of three queries sees three keys."""
    expected = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    assert torch.equal(causal_mask(3, 5), expected)


def test_causal_attention_equals_torch() -> None:
    """No query sees a later key; with grouped heads each key-value head serves two query heads."""
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(causal_attention(query, key, value), expected, **RTOL)


def test_what_the_plain_attention_keeps_is_counted() -> None:
    """A head has as many probabilities as scores."""
    query, saved = torch.randn(3, 20, 4, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.shape), x)[1], lambda x: x):
        causal_attention(query, query, query)
    assert (3, 20, 20) in saved
    assert functional.num_kept_probabilities(20, 4) == 20 * 20


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 1, "qk_norm": True, "norm_position": "post"}], ids=str)
def test_a_whole_model_in_plain_forms_is_the_fast_one(changes: dict[str, object], precision: str) -> None:
    """Logits and the gradient of every weight agree, with nothing handed over to a fast form."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "context_length": 16, "d_model": 32, "num_layers": 2, "num_heads": 4}
    model, ids = TransformerLM(**sizes, **changes), torch.randint(0, 50, (2, 16))

    def forward_and_backward() -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = model(ids).float()
        return [logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))]

    fast = forward_and_backward()
    with plain_forms():
        plain = forward_and_backward()
    tolerance = 1e-4 if precision == "fp32" else 0.05
    torch.testing.assert_close(plain, fast, rtol=tolerance, atol=tolerance)


def test_plain_forms_hand_nothing_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the switch no fast form is called, nested or not; after it, each is called again."""
    calls: list[str] = []
    for name in ("rms_norm", "gated_silu", "rotate", "token_nats"):
        plain = getattr(functional, name)
        monkeypatch.setattr(functional, f"fast_{name}", lambda *arguments, name=name: calls.append(name))
        x = torch.ones(2, 4)
        arguments = {
            "rms_norm": (x, torch.ones(4), 1e-5),
            "gated_silu": (x, x),
            "rotate": (x, x[:, :2], x[:, 2:]),
            "token_nats": (x, torch.zeros(2, dtype=torch.long)),
        }[name]
        with plain_forms():
            with plain_forms():
                plain(*arguments)
            plain(*arguments)
        assert calls == []
        plain(*arguments)
        assert calls.pop() == name
