"""Keys and values of the tokens seen so far, so that decoding one more token costs one token's work."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """One layer's keys and values, `(batch, num_kv_heads, max_length, d_head)` each; the first `length` are filled."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store `(batch, num_kv_heads, seq, d_head)` after what is there, and return views of all filled positions.

        Raises ValueError when they do not fit.
        """
        check_room(self.length, keys.shape[2], self.keys.shape[2])
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """The caches of all layers, allocated once at their full length.

    `TransformerLM.make_cache` builds one. `forward(ids, cache=cache)` appends `ids` to what the cache holds.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        max_length: int,
        d_head: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (batch_size, num_kv_heads, max_length, d_head)
        self.batch_size, self.max_length = batch_size, max_length
        self.layers = [
            LayerCache(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))
            for _ in range(num_layers)
        ]

    @property
    def length(self) -> int:
        """The number of positions that are filled."""
        return self.layers[0].length

    def check(self, batch_size: int, num_new: int) -> None:
        """Raise ValueError unless `num_new` more positions for `batch_size` sequences fit."""
        if batch_size != self.batch_size:
            raise ValueError(f"KV cache: made for a batch of {self.batch_size}, got a batch of {batch_size}")
        check_room(self.length, num_new, self.max_length)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` positions; raise ValueError when there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"KV cache: cannot keep {length} positions, it holds {self.length}")
        for layer in self.layers:
            layer.length = length

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        self.truncate(0)


def check_room(length: int, num_new: int, max_length: int) -> None:
    """Raise ValueError when `length + num_new` positions exceed `max_length`."""
    if length + num_new > max_length:
        raise ValueError(
            f"KV cache: {length} + {num_new} positions exceed its max_length of {max_length}; "
            "make a longer cache, or keep only the last part of the sequence"
        )
