"""The layouts of a weight: each gives the same product, and 8 bits stay within their error."""

from __future__ import annotations

import pytest
import torch

from transformerlm.inference.fast.packed_linear import GROUP, Int8Linear, OneDnnLinear, PlainLinear, pack

needs_blocked = pytest.mark.skipif(
    not isinstance(pack(torch.ones(8, 8)), OneDnnLinear), reason="this torch has no oneDNN"
)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("kind", [PlainLinear, pytest.param(OneDnnLinear, marks=needs_blocked)])
def test_a_product_is_the_plain_one(kind: type, rows: int) -> None:
    """It is, with and without a residual, for one row and for many."""
    weight, x, residual = torch.randn(24, 16), torch.randn(rows, 16), torch.randn(rows, 24)
    product = kind(weight)
    torch.testing.assert_close(product(x), x @ weight.T)
    torch.testing.assert_close(product.add(x, residual), residual + x @ weight.T)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", [PlainLinear, pack])
def test_bf16_weights_take_and_give_fp32(kind: type, rows: int) -> None:
    """Only the product itself is in bfloat16; input and output keep their dtype."""
    weight, x = torch.randn(24, 16).to(torch.bfloat16), torch.randn(rows, 16)
    found = kind(weight).add(x, torch.ones(rows, 24))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, 1 + x @ weight.float().T, rtol=0.02, atol=0.05)


def test_a_packed_weight_does_not_follow_the_original() -> None:
    """A packed weight is a copy."""
    weight = torch.ones(8, 8)
    product = pack(weight)
    weight.zero_()
    assert torch.equal(product(torch.ones(1, 8)), torch.full((1, 8), 8.0))


def test_int8_rounds_to_half_a_step_of_each_row() -> None:
    """The error of a weight is at most half of its row's scale, which is the row's largest number over 127."""
    weight = torch.randn(20, 64) * torch.logspace(-4, 4, 20).unsqueeze(1)
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    error = (Int8Linear(weight).dequantised() - weight).abs()
    # The scale is rounded to 8 bits, up or down; if down, the largest numbers are cut at 127 levels.
    assert (error <= scale * (0.5 * 1.004 + 127 * 0.004)).all()
    assert (error.mean(dim=1, keepdim=True) <= 0.3 * scale).all()


def test_a_great_weight_takes_levels_from_its_group_alone() -> None:
    """The others of the row keep theirs."""
    weight = torch.randn(4, 3 * GROUP // 2)
    weight[:, 5] = 1000.0
    error = (Int8Linear(weight).dequantised() - weight).abs()
    assert error[:, :GROUP].max() > 1.0
    assert error[:, GROUP:].max() < 0.05


def test_int8_has_127_levels_on_each_side() -> None:
    """A row whose largest number is 127 times a power of two has that as its scale, and whole levels are exact."""
    levels = torch.cat((torch.arange(-127, 128), torch.zeros(1))).expand(3, -1)
    weight = levels * torch.tensor([[1.0], [2.0**-9], [4.0]])
    assert torch.equal(Int8Linear(weight).dequantised(), weight)


def test_int8_row_of_zeros_stays_zero() -> None:
    """The scale of such a row must not be 0."""
    assert torch.equal(Int8Linear(torch.zeros(4, 8)).dequantised(), torch.zeros(4, 8))


@pytest.mark.parametrize("in_features", [64, 40, 7, GROUP + 64, 2 * GROUP + 7])
@pytest.mark.parametrize("rows", [1, 2, 16, 17])
def test_int8_product_is_that_of_its_weights(rows: int, in_features: int) -> None:
    """Few rows and many are computed in different ways; the sums agree up to bfloat16's rounding of the input."""
    product = Int8Linear(torch.randn(32, in_features))
    x = torch.randn(rows, in_features)
    torch.testing.assert_close(product(x), x @ product.dequantised().T, rtol=0.02, atol=0.3)


@pytest.mark.parametrize("in_features", [40, 64, 1100])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_reproducible_product_is_the_plain_one_and_the_same_for_any_rows(precision: str, in_features: int) -> None:
    """Features that fill no block or pass 1,024; 2 to 32 rows have the bits that they have in pairs."""
    weight = torch.randn(48, in_features).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    linear, x, residual = pack(weight, int8=precision == "int8", reproducible=True), torch.randn(32, in_features), 1.0
    expected = x @ weight.float().T
    torch.testing.assert_close(linear(x), expected, rtol=0.02, atol=1.5 if precision != "fp32" else 1e-4)
    torch.testing.assert_close(linear.add(x, torch.ones(32, 48)), linear(x) + residual, rtol=1e-5, atol=1e-4)
    pairs = torch.cat([linear(x[first : first + 2]) for first in range(0, 32, 2)])
    for count in (2, 3, 5, 16, 17, 32):
        assert torch.equal(linear(x[32 - count :]), pairs[32 - count :]), count
