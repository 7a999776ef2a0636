"""Kept chunks: bounded, the least recently used first, and never without those before them."""

from __future__ import annotations

import torch

from tests.inference.helpers import make_model
from transformerlm.inference.fast.prefix_cache import PrefixCache, put_back
from transformerlm.inference.generate import Decoder

CHUNK = 16


def test_a_chunk_comes_back_as_it_was() -> None:
    """In another slot, with its logits, and under exactly its ids."""
    decoder, ids = Decoder(make_model(context_length=64), compiled=False), [*range(20)]
    cache, prefixes = decoder.make_slots(2), PrefixCache(10**6)
    for keys, values in cache.layers:
        keys.normal_()
        values.normal_()
    logits = torch.randn(32, 257)[3:4]  # as a pass over several prompts gives them
    prefixes.keep(cache, 0, ids, start=16, logits=logits)
    assert prefixes.find(ids[:-1], is_whole=True) is None
    assert prefixes.find(ids, is_whole=False) is None
    kept = prefixes.find(ids, is_whole=True)
    assert kept is not None
    assert torch.equal(kept.logits, logits)
    assert kept.logits.untyped_storage().nbytes() == 257 * 4  # or the bound would not hold
    put_back(kept, cache, 1)
    for keys, values in cache.layers:
        assert torch.equal(keys[0, :, :, 16:20], keys[1, :, :, 16:20])
        assert torch.equal(values[0, :, 16:20], values[1, :, 16:20])
        assert not torch.equal(values[0, :, :16], values[1, :, :16])


def test_the_memory_is_bounded_and_the_oldest_goes_first() -> None:
    """A prompt that was used stays, its first chunk the longest; what is larger than all is not kept."""
    decoder = Decoder(make_model(context_length=64), compiled=False)
    cache, probe = decoder.make_slots(1), PrefixCache(10**9)
    probe.keep(cache, 0, [0] * CHUNK, start=0, logits=None)
    kept = probe.find([0] * CHUNK, is_whole=False)
    assert kept is not None
    size = kept.num_bytes + 4 * CHUNK  # with the ids under which it is kept
    prefixes, used, other = PrefixCache(3 * size), [1] * CHUNK, [2] * CHUNK
    prefixes.keep(cache, 0, used, start=0, logits=None)
    prefixes.keep(cache, 0, other, start=0, logits=None)
    prefixes.use(used, CHUNK)
    for first in (3, 4):
        prefixes.keep(cache, 0, [first] * CHUNK, start=0, logits=None)
    assert prefixes.find(other, is_whole=False) is None
    assert sum(prefixes.find([first] * CHUNK, is_whole=False) is not None for first in range(5)) == 3
    assert prefixes.find(used, is_whole=False) is not None
    for bound in (0, size - 1):
        small = PrefixCache(bound)
        small.keep(cache, 0, used, start=0, logits=None)
        assert small.find(used, is_whole=False) is None
