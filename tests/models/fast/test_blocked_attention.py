"""The blocked attention has the numbers of the written-out one, and its memory does not grow with seq^2."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from transformerlm.models import attention, functional
from transformerlm.models.attention import attend
from transformerlm.models.fast import blocked_attention
from transformerlm.models.fast.blocked_attention import blocked_causal_attention, num_kept_probabilities


def _inputs(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("shape", [(2, 3, 300, 8), (2, 3, 300, 40), (1, 1, 1, 4), (5, 128, 16), (2, 129, 2), (7, 16)])
def test_it_is_the_written_out_attention(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64 the result and all gradients agree, also where the last blocks of heads and queries are smaller.

    For 300 positions with 8 numbers each nothing is kept for the backward pass; with 40 numbers, the probabilities are.
    """
    monkeypatch.setattr(blocked_attention, "_BLOCK_SCORES", 2 * 128 * 128)
    inputs = _inputs(*shape)
    expected = functional.causal_attention(*inputs)
    found = blocked_causal_attention(*inputs)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad))


@pytest.mark.parametrize("kept", [0, 8])
def test_its_gradient_is_that_of_finite_differences(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite differences agree for blocks of two queries over five positions, with probabilities kept or recomputed."""
    monkeypatch.setattr(blocked_attention, "_QUERY_ROWS", 2)
    monkeypatch.setattr(blocked_attention, "_KEPT_SEQ_LEN_PER_DIM", kept)
    assert torch.autograd.gradcheck(blocked_causal_attention, _inputs(2, 5, 3))


def test_the_backward_pass_may_have_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept probabilities belong to the blocks of the forward pass, whatever the number of threads later."""
    monkeypatch.setattr(blocked_attention, "_BLOCK_SCORES", 2**15)
    inputs = _inputs(8, 200, 32)
    expected = torch.autograd.grad(blocked_causal_attention(*inputs).sum(), inputs)
    result = blocked_causal_attention(*inputs).sum()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    torch.testing.assert_close(torch.autograd.grad(result, inputs), expected)


def test_no_query_sees_a_later_key() -> None:
    """Changing a position changes nothing before it."""
    inputs = _inputs(2, 200, 4)
    before = blocked_causal_attention(*inputs)
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        x[:, 150] += 1.0
    after = blocked_causal_attention(*changed)
    assert torch.equal(before[:, :150], after[:, :150])
    assert not torch.equal(before[:, 150:], after[:, 150:])


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_bf16_on_a_cpu_takes_it_and_is_as_near_as_bf16_gets(num_kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused implementation under autocast, grouped queries too, is within bf16's precision of fp64."""
    calls: list[int] = []
    whole = attention.blocked_causal_attention
    monkeypatch.setattr(attention, "blocked_causal_attention", lambda *x: (calls.append(1), whole(*x))[1])
    query = _inputs(2, 4, 300, 8, dtype=torch.bfloat16)[0]
    key, value = _inputs(2, num_kv_heads, 300, 8, dtype=torch.bfloat16)[1:]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(query, key, value, is_causal=True, implementation="fused")
    assert calls
    assert found.dtype == torch.bfloat16
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    expected = functional.causal_attention(*wide)
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
    grad = torch.randn_like(found)
    pairs = zip(
        torch.autograd.grad(found, (query, key, value), grad),
        torch.autograd.grad(expected, wide, grad.double()),
        strict=True,
    )
    for grad_found, grad_expected in pairs:
        torch.testing.assert_close(grad_found.double(), grad_expected, rtol=0.03, atol=0.06)


def test_short_sequences_keep_their_probabilities() -> None:
    """Their number is what the memory estimate counts."""
    inputs = _inputs(3, 200, 25)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        blocked_causal_attention(*inputs)
    assert sum(saved) == 3 * (4 * 200 * 25 + num_kept_probabilities(200, 25))
    assert num_kept_probabilities(200, 25) == 128 * 128 + 72 * 200
    assert num_kept_probabilities(200, 24) == 0


def test_within_one_block_as_much_is_kept_as_by_the_plain_attention() -> None:
    """Later blocks omit the keys that no query of them sees, so they keep fewer."""
    for seq_len in (1, 100, 128):
        assert num_kept_probabilities(seq_len, 64) == functional.num_kept_probabilities(seq_len, 64)
    assert num_kept_probabilities(256, 64) == 3 * 128 * 128 < functional.num_kept_probabilities(256, 64)


def test_scores_of_long_sequences_are_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not kept for the backward pass, and no block has more scores than it may."""
    monkeypatch.setattr(blocked_attention, "_BLOCK_SCORES", 2**14)
    made: list[int] = []
    probabilities = blocked_attention._probabilities
    monkeypatch.setattr(
        blocked_attention, "_probabilities", lambda *x: (made.append((y := probabilities(*x)).numel()), y)[1]
    )
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        blocked_causal_attention(*_inputs(8, 256, 4)).sum().backward()
    assert max(made) <= 128 * 256
    assert sum(saved) < 5 * 8 * 256 * 4


@pytest.mark.parametrize("kept", [0, 8], ids=["recomputed", "kept"])
def test_a_compiler_sees_one_operator_and_gets_the_same_bits(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced without a break, under autocast too, result and gradients are eager code's; blocks of heads are uneven."""
    monkeypatch.setattr(blocked_attention, "_KEPT_SEQ_LEN_PER_DIM", kept)
    monkeypatch.setattr(blocked_attention, "_QUERY_ROWS", 4)
    monkeypatch.setattr(blocked_attention, "_BLOCK_SCORES", 60)
    torch._dynamo.reset()
    inputs, results = _inputs(2, 3, 10, 4, dtype=torch.bfloat16), []

    def attention_of(*qkv: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attend(*qkv, is_causal=True, implementation="fused") * 2.0

    grad = torch.randn(2, 3, 10, 4).bfloat16()
    for function in (attention_of, torch.compile(attention_of, backend="aot_eager", fullgraph=True)):
        found = function(*inputs)
        results.append((found, *torch.autograd.grad(found, inputs, grad)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
