"""The parts of a block against independent formulas, and the promises of their docstrings."""

from __future__ import annotations

import math

import pytest
import torch

from transformerlm.models.layers import (
    Embedding,
    Linear,
    RMSNorm,
    RotaryEmbedding,
    SiLUFFN,
    SwiGLU,
    rope_factors,
)

RTOL = {"rtol": 1e-5, "atol": 1e-6}


def test_linear_multiplies_by_the_transposed_weight() -> None:
    """The layer is y = x W^T over the last dimension, for any leading dimensions."""
    layer = Linear(5, 3)
    x = torch.randn(2, 4, 5)
    torch.testing.assert_close(layer(x), torch.einsum("oi,bsi->bso", layer.weight, x), **RTOL)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


@pytest.mark.parametrize(
    ("layer", "std"),
    [(Linear(400, 200), math.sqrt(2 / 600)), (Embedding(400, 200), 1.0), (Embedding(400, 200, std=0.1), 0.1)],
)
def test_weights_are_drawn_from_a_normal_cut_at_three_sigma(layer: torch.nn.Module, std: float) -> None:
    """Initial weights have the documented deviation, and none is further out than three of it."""
    weight = layer.weight.detach()
    assert weight.abs().max() <= 3 * std
    assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert weight.mean().item() == pytest.approx(0.0, abs=0.02 * std)


def test_embedding_looks_up_rows_and_sums_their_gradients() -> None:
    """Each id gives its row; a row that is used twice gets both gradients, as with torch's own lookup."""
    table = Embedding(7, 3)
    ids = torch.tensor([[1, 2, 1], [6, 0, 1]])
    upstream = torch.randn(2, 3, 3)
    table(ids).backward(upstream)
    reference = table.weight.detach().clone().requires_grad_()
    torch.nn.functional.embedding(ids, reference).backward(upstream)
    assert torch.equal(table(ids), reference[ids])
    torch.testing.assert_close(table.weight.grad, reference.grad, **RTOL)


def test_rmsnorm_equals_torch_in_value_and_gradient() -> None:
    """Values and gradients are those of torch's rms_norm."""
    norm = RMSNorm(6, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 4, 6, requires_grad=True)
    expected = torch.nn.functional.rms_norm(x, (6,), norm.weight, 1e-3)
    torch.testing.assert_close(norm(x), expected, **RTOL)
    upstream = torch.randn_like(x)
    found = torch.autograd.grad(norm(x), (x, norm.weight), upstream)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, norm.weight), upstream), rtol=1e-4, atol=1e-5)


def test_rmsnorm_computes_half_precision_in_fp32_and_returns_it() -> None:
    """A float16 input whose squares overflow its range is normed in fp32 and comes back as float16."""
    x = (torch.randn(2, 64) * 1e3).to(torch.float16)
    found = RMSNorm(64)(x)
    assert found.dtype == torch.float16
    expected = torch.nn.functional.rms_norm(x.double(), (64,), eps=1e-5).to(torch.float16)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_rmsnorm_of_zeros_is_zero() -> None:
    """The epsilon keeps a zero vector from dividing by zero."""
    assert torch.equal(RMSNorm(4)(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_feed_forward_layers_are_their_formulas() -> None:
    """SwiGLU is w2(silu(w1 x) * w3 x), and the plain layer w2(silu(w1 x))."""
    x = torch.randn(2, 3, 4)
    gated, plain = SwiGLU(4, 6), SiLUFFN(4, 6)
    hidden = torch.nn.functional.silu(x @ gated.w1.weight.T) * (x @ gated.w3.weight.T)
    torch.testing.assert_close(gated(x), hidden @ gated.w2.weight.T, **RTOL)
    torch.testing.assert_close(plain(x), torch.nn.functional.silu(x @ plain.w1.weight.T) @ plain.w2.weight.T, **RTOL)


def complex_rotation(x: torch.Tensor, theta: float, positions: torch.Tensor) -> torch.Tensor:
    """RoPE as Su et al. write it: pair i is the complex number x[2i] + j x[2i+1], times e^(j position theta_i)."""
    d_k = x.shape[-1]
    frequencies = theta ** (-torch.arange(0, d_k, 2, dtype=torch.float64) / d_k)
    turn = torch.exp(1j * positions.double().unsqueeze(-1) * frequencies)
    numbers = torch.complex(x[..., 0::2].double(), x[..., 1::2].double()) * turn
    return torch.stack((numbers.real, numbers.imag), dim=-1).flatten(-2).to(x.dtype)


def test_rope_multiplies_pairs_by_complex_turns() -> None:
    """Feature pairs (2i, 2i+1) turn by position * theta^(-2i/d), at positions in order, offset, and arbitrary."""
    rope = RotaryEmbedding(10000.0, 8, 64)
    x = torch.randn(2, 3, 10, 8)
    torch.testing.assert_close(rope(x), complex_rotation(x, 10000.0, torch.arange(10)), **RTOL)
    torch.testing.assert_close(rope(x, offset=54), complex_rotation(x, 10000.0, torch.arange(54, 64)), **RTOL)
    positions = torch.randint(0, 64, (2, 1, 10))
    torch.testing.assert_close(rope(x, positions), complex_rotation(x, 10000.0, positions), **RTOL)


def test_rope_makes_scores_depend_on_distance_only() -> None:
    """The product of a rotated query and key is the same when both move by the same number of positions."""
    rope = RotaryEmbedding(100.0, 16, 128)
    query, key = torch.randn(1, 16), torch.randn(1, 16)
    near = rope(query, offset=7) @ rope(key, offset=3).T
    far = rope(query, offset=107) @ rope(key, offset=103).T
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)


def test_rope_keeps_lengths_and_position_zero() -> None:
    """A rotation changes no length, and position 0 is not rotated."""
    x = torch.randn(5, 12, 4)
    rotated = RotaryEmbedding(10000.0, 4, 12)(x)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1), **RTOL)
    assert torch.equal(rotated[:, 0], x[:, 0])


def test_rope_tables_stay_fp32_and_true_when_the_model_moves() -> None:
    """Casting to bfloat16 does not round the tables, and to_empty from the meta device fills them."""
    expected = RotaryEmbedding(10000.0, 8, 32)
    cast = RotaryEmbedding(10000.0, 8, 32).to(torch.bfloat16)
    empty = RotaryEmbedding(10000.0, 8, 32, device="meta").to_empty(device="cpu")
    again = RotaryEmbedding(10000.0, 8, 32).to_empty(device="cpu")
    for rope in (cast, empty, again):
        assert torch.equal(rope.cos, expected.cos)
        assert torch.equal(rope.sin, expected.sin)
    assert torch.equal(cast(torch.ones(1, 8)), expected(torch.ones(1, 8)))
    assert RotaryEmbedding(10000.0, 8, 32).to("meta").sin.device.type == "meta"
    assert expected.state_dict() == {}
    assert cast(torch.randn(3, 8).to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "scaling",
    [
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 8192},
        {"factor": 32.0, "low_freq_factor": 0.5, "high_freq_factor": 6.0, "original_context_length": 64},
        {"factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 8192},
    ],
    ids=str,
)
def test_rope_scaling_is_that_of_transformers(scaling: dict[str, float]) -> None:
    """The frequencies of every pair are those that transformers computes for a Llama 3.1 with these settings."""
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    theirs = {key: value for key, value in scaling.items() if key != "original_context_length"}
    original = int(scaling["original_context_length"])
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": original, **theirs}
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    expected, _ = rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    turned = RotaryEmbedding(5e5, 128, 2, scaling=scaling)
    torch.testing.assert_close(torch.atan2(turned.sin[1], turned.cos[1]), expected, **RTOL)


def test_rope_scaling_keeps_fast_pairs_and_slows_slow_ones() -> None:
    """The factors rise from 1 to `factor`, from pair to pair."""
    settings = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 8192}
    factors = rope_factors(5e5, 128, **settings)
    assert (factors[0], factors[-1]) == (1, 8)
    assert bool((factors.diff() >= 0).all())
    assert 0 < int(((factors > 1) & (factors < 8)).sum()) < 64
    assert torch.equal(rope_factors(5e5, 128, **{**settings, "factor": 1.0}), torch.ones(64, dtype=torch.float64))


def test_rope_scaling_stays_when_the_model_moves() -> None:
    """The tables are recomputed with the scaling."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 32}
    expected, plain = RotaryEmbedding(100.0, 8, 64, scaling=scaling), RotaryEmbedding(100.0, 8, 64)
    moved = RotaryEmbedding(100.0, 8, 64, scaling=scaling, device="meta").to_empty(device="cpu")
    assert torch.equal(moved.cos, expected.cos)
    assert not torch.equal(moved.cos, plain.cos)
    assert "factor" in repr(moved)
    assert "scaling" not in repr(plain)


def test_rope_refuses_odd_sizes_and_positions_past_its_tables() -> None:
    """Both errors name the two numbers that do not fit."""
    with pytest.raises(ValueError, match="even to rotate pairs of features, got 7"):
        RotaryEmbedding(10000.0, 7, 16)
    with pytest.raises(ValueError, match="17 positions asked for, but max_seq_len is 16"):
        RotaryEmbedding(10000.0, 4, 16)(torch.randn(5, 4), offset=12)
