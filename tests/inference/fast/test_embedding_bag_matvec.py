"""Sums of rows by embedding bags, against the matrix products that they replace."""

from __future__ import annotations

import math

import pytest
import torch

from tests.inference.helpers import make_model
from transformerlm.inference.fast import embedding_bag_matvec
from transformerlm.inference.fast.decoder import Decoder
from transformerlm.inference.fast.embedding_bag_matvec import AttentionRows, EmbeddingBagMatvec, Int8EmbeddingBagMatvec


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_features", [1, 15, 64, 257, 448, 449, 1536, 10_007])
def test_the_product_of_one_row(out_features: int, dtype: torch.dtype) -> None:
    """Few features and many, whole strips and a last one that is padded."""
    weight, x = torch.randn(out_features, 24).to(dtype), torch.randn(1, 24).to(dtype)
    product = EmbeddingBagMatvec(weight)
    assert product._table.is_contiguous()  # else it would be copied at each call
    found = product(x)
    assert found.dtype == dtype
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.01, "atol": 0.01}
    torch.testing.assert_close(found.float(), x.float() @ weight.float().T, **tolerance)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_any_number_of_threads_gives_the_same_sums(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread has a strip of its own; their number does not change a single digit."""
    weight, x = torch.randn(1000, 40), torch.randn(1, 40)
    expected = EmbeddingBagMatvec(weight)(x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(EmbeddingBagMatvec(weight)(x), expected)


def test_the_product_keeps_its_own_copy() -> None:
    """The weight may change afterwards."""
    weight = torch.ones(8, 8)
    product = EmbeddingBagMatvec(weight)
    weight.zero_()
    assert torch.equal(product(torch.ones(1, 8)), torch.full((1, 8), 8.0))


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("out_features", [3, 500])
def test_bytes_have_both_signs(out_features: int, groups: int) -> None:
    """The product takes all levels of int8, with a scale for each group of a row, and does not round the input."""
    levels = torch.randint(-128, 128, (groups, out_features, 48)).to(torch.int8)
    levels[0, 0, :2] = torch.tensor([-128, 127])
    scales, x = torch.rand(groups, out_features), torch.randn(1, groups * 48)
    expected = torch.einsum("goi,go,gi->o", levels.float(), scales, x.view(groups, 48)).unsqueeze(0)
    torch.testing.assert_close(Int8EmbeddingBagMatvec(levels, scales)(x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("in_features", [1, 40])
@pytest.mark.parametrize("out_features", [5, 900])
def test_an_input_that_is_a_view(out_features: int, in_features: int) -> None:
    """A column of a larger tensor is read with its stride."""
    x, weight = torch.randn(in_features, 5)[:, 2:3].T, torch.randint(-9, 9, (out_features, in_features)).to(torch.int8)
    expected = x @ weight.float().T
    torch.testing.assert_close(EmbeddingBagMatvec(weight.float())(x), expected)
    torch.testing.assert_close(
        Int8EmbeddingBagMatvec(weight.unsqueeze(0), torch.ones(1, out_features))(x), expected, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("out_features", [1, 15, 257, 512, 1000, 2688, 2752, 10_000, 50_257])
def test_strips_are_shared_out_evenly(out_features: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips are whole vectors, not too wide, and cover all features; no thread has much more than its share."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    count, width = embedding_bag_matvec._choose_strips(out_features)
    assert count * width >= out_features
    assert width % 16 == 0
    assert width <= 448
    assert width >= 64 or count == 1
    busiest = math.ceil(count / threads) * width
    assert busiest <= max(1.15 * out_features / threads + 16, 128)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("max_length", [7, 300])
def test_heads_attend_to_their_own_keys(kv_heads: int, max_length: int) -> None:
    """Scores and sums are right at every length of the cache; nothing after the end is seen."""
    batch_size, num_heads, d_head = 3, 4, 8
    keys = torch.randn(batch_size, kv_heads, d_head, 384 if max_length == 300 else 128)
    values = torch.randn(batch_size, kv_heads, max_length, d_head)
    rows = AttentionRows(keys, values, num_heads)
    served_keys, served_values = (each.repeat_interleave(num_heads // kv_heads, 1) for each in (keys, values))
    for end in (each for each in (300, 1, 2, 7, 127, 128, 129, 257) if each <= max_length):
        query, shares = torch.randn(batch_size, num_heads, d_head), torch.rand(batch_size, num_heads, end)
        scores = (query.unsqueeze(2) @ served_keys[..., :end]).view(-1, end)
        mixed = (shares.unsqueeze(2) @ served_values[:, :, :end]).view(-1, d_head)
        heads = rows.up_to(end)
        torch.testing.assert_close(heads.scores(query, keys), scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(heads.mix(shares, values), mixed, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not embedding_bag_matvec.has_fast_kernel(torch.device("cpu")), reason="this torch has no FBGEMM")
@pytest.mark.parametrize("int8", [False, True])
def test_a_step_sums_bags_and_copies_no_table(int8: bool) -> None:
    """A layer has four products and two of attention, the head is one more; no table needs to be copied first."""
    decoder = Decoder(make_model(num_layers=2, d_model=64, context_length=200), int8=int8, compiled=False)
    cache = decoder.make_cache(1)
    decoder(torch.zeros(1, 5, dtype=torch.int64), cache=cache)
    with torch.profiler.profile(record_shapes=True) as profile:
        decoder(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    kernels = ("aten::_embedding_bag_forward_only", "quantized::embedding_bag_byte_rowwise_offsets")
    calls = [event for event in profile.events() if event.name in kernels]
    assert len(calls) == 2 * (4 + 2) + 1
    copied = [event.input_shapes[0] for event in profile.events() if event.name in ("aten::contiguous", "aten::clone")]
    assert all(math.prod(shape) <= 8 * 64 * 3 for shape in copied)
