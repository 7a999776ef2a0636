"""The KV cache's bookkeeping and its errors."""

from __future__ import annotations

import pytest
import torch

from transformerlm.models.kv_cache import KVCache, LayerCache


def make_cache(max_length: int = 4) -> KVCache:
    return KVCache(num_layers=2, batch_size=3, num_kv_heads=2, max_length=max_length, d_head=5)


def test_append_returns_everything_so_far_in_order() -> None:
    """Appended pieces come back joined, without a copy of the buffer."""
    layer = LayerCache(torch.zeros(1, 2, 6, 3), torch.zeros(1, 2, 6, 3))
    first, second = torch.randn(1, 2, 2, 3), torch.randn(1, 2, 3, 3)
    layer.append(first, -first)
    keys, values = layer.append(second, -second)
    assert torch.equal(keys, torch.cat((first, second), dim=2))
    assert torch.equal(values, -keys)
    assert keys.data_ptr() == layer.keys.data_ptr()


def test_overflow_names_both_numbers_and_changes_nothing() -> None:
    """The cache refuses the whole of a piece that does not fit."""
    cache = make_cache()
    for layer in cache.layers:
        layer.append(torch.zeros(3, 2, 3, 5), torch.zeros(3, 2, 3, 5))
    with pytest.raises(ValueError, match=r"3 \+ 2 positions exceed its max_length of 4"):
        cache.layers[0].append(torch.ones(3, 2, 2, 5), torch.ones(3, 2, 2, 5))
    with pytest.raises(ValueError, match=r"3 \+ 2 positions exceed its max_length of 4"):
        cache.check(batch_size=3, num_new=2)
    assert cache.length == 3
    assert not cache.layers[0].keys.any()


def test_batch_of_another_size_is_refused() -> None:
    """A cache belongs to one batch size."""
    with pytest.raises(ValueError, match="made for a batch of 3, got a batch of 1"):
        make_cache().check(batch_size=1, num_new=1)


def test_truncate_and_reset_forget_the_end() -> None:
    """After a truncation the next piece overwrites what was cut; a cache cannot keep more than it holds."""
    cache = make_cache()
    for layer in cache.layers:
        layer.append(torch.ones(3, 2, 4, 5), torch.ones(3, 2, 4, 5))
    cache.truncate(1)
    keys, _ = cache.layers[1].append(torch.full((3, 2, 1, 5), 7.0), torch.zeros(3, 2, 1, 5))
    assert keys[0, 0, :, 0].tolist() == [1.0, 7.0]
    cache.truncate(1)
    with pytest.raises(ValueError, match="cannot keep 2 positions, it holds"):
        KVCache.truncate(make_cache(), 2)
    cache.reset()
    assert cache.length == 0
