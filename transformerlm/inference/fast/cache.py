"""The keys and values of a `Decoder`, and where in them the next ids go.

It holds what `transformerlm.models.kv_cache.KVCache` holds, with two differences: keys are transposed, and each row has
its own length.

Part of: decoder, prefix_cache, prompt_lookup
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from transformerlm.inference.fast.embedding_bag_matvec import AttentionBags, AttentionRows, SlotBags
from transformerlm.models.functional import causal_mask

Array = np.ndarray[Any, np.dtype[np.float32]]


class LayerKV(NamedTuple):
    """One layer's memory; keys are transposed, as the scores read them, and fill whole blocks of embedding bags."""

    keys: Tensor
    """`(batch, num_kv_heads, d_head, at least max_length)`"""
    values: Tensor
    """`(batch, num_kv_heads, max_length, d_head)`"""


class DecoderCache:
    """Keys and values of all layers.

    Row i is filled up to `lengths[i]`. What is in the memory after that changes nothing as long as it is finite.
    """

    def __init__(
        self, layers: list[LayerKV], num_heads: int, whole: LayerKV | None = None, keys_together: int = 0
    ) -> None:
        self.layers, self._num_heads = layers, num_heads
        self.whole = whole
        """The memory of all layers where it is one, with the layers first."""
        self.keys_together = keys_together
        """Of how many keys each feature lies together, in memory of the same size, for compiled loops; 0: of all."""
        self.max_length = layers[0].values.shape[2]
        self.lengths = [0] * len(layers[0].values)
        # On CUDA: the step captured for this memory; it takes ids `(batch, 1)` and the lengths before them.
        self.captured_step: Callable[[Tensor, list[int]], Tensor] | None = None

    @property
    def length(self) -> int:
        """The number of positions filled in the longest row."""
        return max(self.lengths)

    @cached_property
    def arrays(self) -> tuple[Array, Array]:
        """The keys and values of all layers for compiled loops, as those have them."""
        assert self.whole is not None, "made for compiled loops, or by `make_slots`"
        return _in_blocks(self.whole.keys, self.keys_together).numpy(), self.whole.values.numpy()

    @cached_property
    def attention_rows(self) -> AttentionRows:
        """The rows that single queries read by embedding bags, on a CPU."""
        return AttentionRows(*self.layers[0], self._num_heads)

    def layers_of(self, index: int) -> list[LayerKV]:
        """Return the memory of one row, with a batch of 1."""
        part = slice(index, index + 1)
        return [LayerKV(keys[part], values[part]) for keys, values in self.layers]

    def part_of(self, index: int, start: int, end: int) -> list[LayerKV]:
        """Return the memory of one row from position `start` on, where a block begins, to `end`, or a little more."""
        together = self.keys_together
        if not together:
            return [LayerKV(keys[index, ..., start:end], values[index, :, start:end]) for keys, values in self.layers]
        blocks = slice(start // together, -(-end // together))
        return [
            LayerKV(_in_blocks(keys[index], together)[:, blocks], values[index, :, start:end])
            for keys, values in self.layers
        ]

    def layers_without_blocks(self, length: int) -> list[LayerKV]:
        """Return other memory for the first `length` positions of all rows, as it is where loops are not compiled."""
        whole = -(-length // self.keys_together) * self.keys_together
        return [
            LayerKV(torch.zeros_like(keys[..., :whole]), torch.zeros_like(values[:, :, :whole]))
            for keys, values in self.layers
        ]

    def fill(self, layers: list[LayerKV], length: int) -> None:
        """Copy the first `length` positions of all rows from such memory."""
        for own, (keys, values) in zip(self.layers, layers, strict=True):
            in_blocks = keys.view(*keys.shape[:3], -1, self.keys_together).transpose(2, 3)
            _in_blocks(own.keys, self.keys_together)[:, :, : in_blocks.shape[2]] = in_blocks
            own.values[:, :, :length] = values[:, :, :length]

    def slot_bags(self, slots: list[int], lengths: list[int]) -> SlotBags:
        """Return the bags by which one query in each of `slots` reads its first `lengths[i]` positions."""
        return SlotBags(*self.layers[0], self._num_heads, slots=slots, lengths=lengths)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` positions; raise ValueError when a row has fewer."""
        if not 0 <= length <= min(self.lengths):
            raise ValueError(f"KV cache: cannot keep {length} positions, it holds {min(self.lengths)}")
        self.lengths = [length] * len(self.lengths)

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        self.truncate(0)


def _in_blocks(keys: Tensor, together: int) -> Tensor:
    """Return keys `(..., d_head, max_length)` as `(..., max_length / together, d_head, together)`, in their memory."""
    *rest, d_head, max_length = keys.shape
    return keys.view(*rest, max_length // together, d_head, together)


class NewPositions:
    """Where the new ids of a forward pass go in the cache; this class: from `start` on, in all rows."""

    slot_bags: SlotBags | None = None

    def __init__(
        self, start: int, seq_len: int, device: torch.device, dtype: torch.dtype, bags: AttentionBags | None = None
    ) -> None:
        self.seq_len, self.start, self.end, self.bags = seq_len, start, start + seq_len, bags
        self.bias: Tensor | None = None
        # One id may see all positions up to its own; a prompt in an empty cache is left to the causal kernel.
        if seq_len > 1 and start:
            self.bias = _bias(causal_mask(seq_len, self.end, device).logical_not_(), dtype)  # (seq, end)

    def rotation(self, table: Tensor) -> Tensor:
        """Return the rotations of the new ids, in a shape that broadcasts to `(batch, seq, heads, d_head / 2)`."""
        return table[self.start : self.end]  # (seq, 1, d_head / 2)

    def write(self, layer: LayerKV, new: Tensor) -> None:
        """Store new keys and values `(batch, seq, 2, kv_heads, d_head)`."""
        keys, values = new.unbind(2)  # (batch, seq, kv_heads, d_head) each
        if self.seq_len == 1:  # the same with fewer views
            layer.keys.select(3, self.start).copy_(keys.squeeze(1))
            layer.values.select(2, self.start).copy_(values.squeeze(1))
        else:
            layer.keys[..., self.start : self.end] = keys.permute(0, 2, 3, 1)  # (batch, kv_heads, d_head, seq)
            layer.values[:, :, self.start : self.end] = values.transpose(1, 2)  # (batch, kv_heads, seq, d_head)


class RaggedPositions(NewPositions):
    """One new id for each row, after rows of different lengths; the shapes depend on the cache's memory alone."""

    def __init__(self, positions: Tensor, end: int, dtype: torch.dtype) -> None:
        self.seq_len, self.end, self.bags, self._positions = 1, end, None, positions
        self._rows = torch.arange(len(positions), device=positions.device)  # (batch)
        # A short row must not see the memory between its own end and the longest row's.
        hidden = torch.arange(end, device=positions.device) > positions.unsqueeze(1)  # (batch, end)
        self.bias = _bias(hidden, dtype).view(len(positions), 1, 1, end)

    def rotation(self, table: Tensor) -> Tensor:
        return table.index_select(0, self._positions).unsqueeze(1)  # (batch, 1, 1, d_head / 2)

    def write(self, layer: LayerKV, new: Tensor) -> None:
        keys, values = new.squeeze(1).unbind(1)  # (batch, kv_heads, d_head) each
        # Row i goes to positions[i]: one index a row.
        layer.keys[self._rows, :, :, self._positions] = keys
        layer.values[self._rows, :, self._positions] = values


class ChunkPositions(NewPositions):
    """The first ids of several texts, from position 0 on, each in a slot of its own."""

    def __init__(self, slots: list[int], seq_len: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(0, seq_len, device, dtype)
        self._slots = torch.tensor(slots, device=device)  # (batch)

    def write(self, layer: LayerKV, new: Tensor) -> None:
        keys, values = new.unbind(2)  # (batch, seq, kv_heads, d_head) each
        layer.keys[self._slots, :, :, : self.end] = keys.permute(0, 2, 3, 1)  # (batch, kv_heads, d_head, seq)
        layer.values[self._slots, :, : self.end] = values.transpose(1, 2)  # (batch, kv_heads, seq, d_head)


class SlotPositions(RaggedPositions):
    """One new id in each of some slots, which read by embedding bags."""

    def __init__(self, cache: DecoderCache, slots: list[int]) -> None:
        lengths = [cache.lengths[slot] for slot in slots]
        self.seq_len, self.end, self.bias, self.bags = 1, max(lengths) + 1, None, None
        self.slot_bags = cache.slot_bags(slots, [length + 1 for length in lengths])
        self._positions, self._rows = torch.tensor(lengths), torch.tensor(slots)


def _bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what hides scores when it is added to them: -inf where `hidden`, else 0."""
    return torch.zeros(hidden.shape, device=hidden.device, dtype=dtype).masked_fill_(hidden, -torch.inf)


def check_room(cache: DecoderCache, batch_size: int, seq_len: int) -> None:
    """Raise ValueError unless `seq_len` more ids in each of `batch_size` rows fit."""
    if batch_size != len(cache.lengths):
        raise ValueError(f"KV cache: made for a batch of {len(cache.lengths)}, got a batch of {batch_size}")
    if cache.length + seq_len > cache.max_length:
        raise ValueError(
            f"KV cache: {cache.length} + {seq_len} positions exceed its max_length of {cache.max_length}; "
            "make a longer cache, or keep only the last part of the sequence"
        )
