"""Sums of rows by embedding bags, against the matrix products they stand for."""

from __future__ import annotations

import pytest
import torch

from transformerlm.inference.bags import HeadBags, Int8RowProduct, RowProduct


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_features", [1, 15, 64, 257, 448, 449, 1536, 10_007])
def test_the_product_of_one_row(out_features: int, dtype: torch.dtype) -> None:
    """Few features and many, whole strips and a last one that is filled up."""
    weight, x = torch.randn(out_features, 24).to(dtype), torch.randn(1, 24).to(dtype)
    product = RowProduct(weight)
    assert product._table.is_contiguous()  # else it would be copied at each call
    found = product(x)
    assert found.dtype == dtype
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.01, "atol": 0.01}
    torch.testing.assert_close(found.float(), x.float() @ weight.float().T, **tolerance)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_any_number_of_threads_gives_the_same_sums(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread has a strip of its own; how many there are decides no digit."""
    weight, x = torch.randn(1000, 40), torch.randn(1, 40)
    expected = RowProduct(weight)(x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(RowProduct(weight)(x), expected)


def test_the_product_keeps_its_own_copy() -> None:
    """The weight may change afterwards."""
    weight = torch.ones(8, 8)
    product = RowProduct(weight)
    weight.zero_()
    assert torch.equal(product(torch.ones(1, 8)), torch.full((1, 8), 8.0))


@pytest.mark.parametrize("out_features", [3, 500])
def test_bytes_are_numbers_of_both_signs(out_features: int) -> None:
    """All levels of int8, with a scale for each output feature; the input is not rounded."""
    weight = torch.randint(-128, 128, (out_features, 48)).to(torch.int8)
    weight[0, :2] = torch.tensor([-128, 127])
    scales, x = torch.rand(out_features), torch.randn(1, 48)
    expected = x @ (weight.float() * scales.unsqueeze(1)).T
    torch.testing.assert_close(Int8RowProduct(weight, scales)(x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("max_length", [7, 200])
def test_heads_attend_to_their_own_keys(kv_heads: int, max_length: int) -> None:
    """Scores and sums at every length of the cache; what lies behind the end is never seen."""
    batch_size, num_heads, d_head = 3, 4, 8
    keys = torch.randn(batch_size, kv_heads, d_head, max_length)
    values = torch.randn(batch_size, kv_heads, max_length, d_head)
    bags = HeadBags(keys, num_heads)
    for end in {1, 2, 7, 64, 65, 199, max_length} & set(range(max_length + 1)):
        query, shares = torch.randn(batch_size, num_heads, d_head), torch.rand(batch_size, num_heads, end)
        served_keys, served_values = (each.repeat_interleave(num_heads // kv_heads, 1) for each in (keys, values))
        scores = (query.unsqueeze(2) @ served_keys[..., :end]).view(-1, end)
        mixed = (shares.unsqueeze(2) @ served_values[:, :, :end]).view(-1, d_head)
        torch.testing.assert_close(bags.scores(query, keys, end), scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bags.mix(shares, values), mixed, rtol=1e-4, atol=1e-5)


def test_few_widths_are_compiled() -> None:
    """A text of 8,192 tokens needs some thirty kernels for its scores, and reads an eighth too much at most."""
    bags = HeadBags(torch.zeros(1, 1, 2, 8192), 1)
    widths = [bags._width(end) for end in range(1, 8193)]
    assert len(set(widths)) <= 40
    assert all(end <= width <= max(end + 63, end * 1.125) for end, width in enumerate(widths, start=1))
    assert HeadBags(torch.zeros(1, 1, 2, 100), 1)._width(70) == 100
