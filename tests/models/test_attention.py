"""Attention: both implementations against the equation and against each other, and the module around them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from transformerlm.models.attention import MultiHeadSelfAttention, attend
from transformerlm.models.kv_cache import LayerCache
from transformerlm.models.layers import RotaryEmbedding

RTOL = {"rtol": 1e-5, "atol": 1e-6}


def attend_by_loops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Equation 1 of Vaswani et al., one query at a time, in float64."""
    result = torch.zeros(len(query), value.shape[-1], dtype=torch.float64)
    for i, row in enumerate(query.double()):
        weights = [
            math.exp(float(row @ k) / math.sqrt(len(row))) if mask[i, j] else 0.0 for j, k in enumerate(key.double())
        ]
        for weight, v in zip(weights, value.double(), strict=True):
            result[i] += weight / sum(weights) * v
    return result


@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_attention_is_equation_one(implementation: str) -> None:
    """Both implementations equal a loop over any number of queries and keys."""
    query, key, value = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5, 6)
    mask = torch.rand(3, 5) > 0.4
    mask[:, 0] = True
    found = attend(query[None, None], key[None, None], value[None, None], mask, implementation=implementation)
    torch.testing.assert_close(found[0, 0].double(), attend_by_loops(query, key, value, mask), **RTOL)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(6, 6), (3, 6), (1, 6)])
def test_fused_equals_reference(num_kv_heads: int, num_queries: int, num_keys: int) -> None:
    """Values and gradients agree with grouped heads, with fewer queries than keys, causal and with a mask."""
    query = torch.randn(2, 4, num_queries, 8, requires_grad=True)
    key = torch.randn(2, num_kv_heads, num_keys, 8, requires_grad=True)
    value = torch.randn(2, num_kv_heads, num_keys, 8, requires_grad=True)
    upstream = torch.randn(2, 4, num_queries, 8)
    mask = torch.rand(2, 1, num_queries, num_keys) > 0.5
    mask[..., 0] = True
    for options in ({}, {"is_causal": True}, {"mask": mask}):
        results = []
        for implementation in ("reference", "fused"):
            result = attend(query, key, value, implementation=implementation, **options)
            results.append((result, *torch.autograd.grad(result, (query, key, value), upstream)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_a_query_that_may_look_nowhere_gives_zeros(implementation: str) -> None:
    """A fully masked row is zero, not NaN, and leaves the other rows alone."""
    query, key, value = (torch.randn(1, 1, 3, 4) for _ in range(3))
    mask = torch.tensor([[True, True, True], [False, False, False], [True, False, False]])
    found = attend(query, key, value, mask, implementation=implementation)
    assert torch.equal(found[0, 0, 1], torch.zeros(4))
    torch.testing.assert_close(found[0, 0, 2], value[0, 0, 0], **RTOL)


def test_attention_refuses_contradictions() -> None:
    """A mask together with is_causal, or an unknown implementation, is an error that says so."""
    x = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match="not both"):
        attend(x, x, x, torch.ones(2, 2).bool(), is_causal=True)
    with pytest.raises(ValueError, match="one of reference, fused, got 'flash'"):
        attend(x, x, x, implementation="flash")


def test_multi_head_attention_equals_one_head_at_a_time() -> None:
    """Heads are consecutive slices of the projections; their results are joined and projected."""
    module = MultiHeadSelfAttention(12, 3)
    x = torch.randn(2, 5, 12)
    heads = []
    for h in range(3):
        rows = slice(4 * h, 4 * h + 4)
        query, key, value = (x @ p.weight[rows].T for p in (module.q_proj, module.k_proj, module.v_proj))
        heads.append(F.scaled_dot_product_attention(query, key, value, is_causal=True))
    torch.testing.assert_close(module(x), torch.cat(heads, dim=-1) @ module.output_proj.weight.T, **RTOL)


def test_grouped_heads_equal_full_heads_with_repeated_weights() -> None:
    """Two key-value heads for four query heads equal four heads whose weights repeat: heads 0, 0, 1, 1."""
    grouped, full = MultiHeadSelfAttention(16, 4, num_kv_heads=2), MultiHeadSelfAttention(16, 4)
    weights = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        weights[name] = weights[name].view(2, 4, 16).repeat_interleave(2, dim=0).reshape(16, 16)
    full.load_state_dict(weights)
    x = torch.randn(2, 6, 16)
    torch.testing.assert_close(grouped(x), full(x), **RTOL)


def test_qk_norm_bounds_the_scores() -> None:
    """With normed queries and keys, scaling their projections changes nothing."""
    module = MultiHeadSelfAttention(8, 2, qk_norm=True)
    x = torch.randn(1, 4, 8)
    before = module(x)
    with torch.no_grad():
        module.q_proj.weight.mul_(100)
        module.k_proj.weight.mul_(0.5)
    torch.testing.assert_close(module(x), before, rtol=1e-3, atol=1e-4)


def test_token_positions_may_differ_between_rows_of_a_batch() -> None:
    """Positions of shape (batch, seq) place each sequence by itself; a shift of all of them changes nothing."""
    module = MultiHeadSelfAttention(16, 2, rope=RotaryEmbedding(10000.0, 8, 64))
    x = torch.randn(2, 5, 16)
    positions = torch.stack((torch.arange(5), torch.arange(40, 45)))
    torch.testing.assert_close(module(x, token_positions=positions), module(x), rtol=1e-4, atol=1e-5)
    spread = module(x, token_positions=torch.stack((torch.arange(5), torch.arange(0, 10, 2))))
    torch.testing.assert_close(spread[0], module(x)[0], **RTOL)
    assert not torch.allclose(spread[1], module(x)[1])


def test_attention_over_a_cache_equals_attention_over_the_whole() -> None:
    """Feeding a sequence in pieces through a layer's cache gives what the whole gives."""
    module = MultiHeadSelfAttention(16, 4, num_kv_heads=2, rope=RotaryEmbedding(10000.0, 4, 16))
    x = torch.randn(2, 9, 16)
    cache = LayerCache(torch.zeros(2, 2, 16, 4), torch.zeros(2, 2, 16, 4))
    pieces = [module(piece, cache=cache) for piece in x.split([4, 1, 3, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), module(x), rtol=1e-4, atol=1e-5)


def test_heads_must_divide() -> None:
    """The errors name both numbers."""
    with pytest.raises(ValueError, match=r"d_model \(10\) is not divisible by num_heads \(4\)"):
        MultiHeadSelfAttention(10, 4)
    with pytest.raises(ValueError, match=r"num_heads \(4\) is not divisible by num_kv_heads \(3\)"):
        MultiHeadSelfAttention(16, 4, num_kv_heads=3)
