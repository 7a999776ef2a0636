"""Keys and values of prompts that were read before, so that the same beginning is not read again.

A prompt is read in chunks on a fixed grid, so the numbers of a chunk depend only on all ids up to its end. They are
kept under exactly these ids, and so a prompt gets the same bits whether its chunks are read or copied. What was not
used for the longest time goes first.

Part of: batcher
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from transformerlm.inference.fast.cache import DecoderCache, LayerKV


@dataclass(frozen=True)
class Kept:
    """One chunk of a prompt: positions `start` to `end`, and after a prompt's last chunk its logits `(1, vocab)`."""

    start: int
    end: int
    layers: list[LayerKV]
    logits: Tensor | None

    @property
    def num_bytes(self) -> int:
        """The memory of its tensors."""
        tensors = [*(tensor for layer in self.layers for tensor in layer)]
        tensors += [] if self.logits is None else [self.logits]
        return sum(tensor.nbytes for tensor in tensors)


class PrefixCache:
    """Chunks of prompts, at most `max_bytes` of them; 0 keeps none."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._kept: OrderedDict[tuple[bool, bytes], Kept] = OrderedDict()  # the least recently used first

    def find(self, ids: list[int], *, is_whole: bool) -> Kept | None:
        """Return the last chunk of `ids`: of a prompt that is these ids with `is_whole`, else of any beginning."""
        return self._kept.get(_key(ids, is_whole)) if self._kept else None

    def keep(self, cache: DecoderCache, slot: int, ids: list[int], *, start: int, logits: Tensor | None) -> None:
        """Keep a copy of a slot's last chunk of `ids`, from `start` on; with logits if they are a whole prompt."""
        key, end = _key(ids, logits is not None), len(ids)
        if self._max_bytes <= 0 or key in self._kept:
            return
        layers = [LayerKV(keys.clone(), values.clone()) for keys, values in cache.part_of(slot, start, end)]
        kept = Kept(start, end, layers, None if logits is None else logits.clone())  # its own row, no view of many
        if kept.num_bytes + len(key[1]) > self._max_bytes:
            return
        self._kept[key] = kept
        self._num_bytes += kept.num_bytes + len(key[1])
        while self._num_bytes > self._max_bytes:
            (_, old_ids), old = self._kept.popitem(last=False)
            self._num_bytes -= old.num_bytes + len(old_ids)

    def use(self, prompt: list[int], chunk: int) -> None:
        """Let a prompt's chunks be the last to go, its first one last of all: the others are of no use without it."""
        keys = [_key(prompt, True)]
        keys += [_key(prompt[:end], False) for end in range(len(prompt) // chunk * chunk, 0, -chunk)]
        for key in keys:
            if key in self._kept:
                self._kept.move_to_end(key)


def put_back(kept: Kept, cache: DecoderCache, slot: int) -> None:
    """Copy a chunk into a slot."""
    for (keys, values), layer in zip(cache.part_of(slot, kept.start, kept.end), kept.layers, strict=True):
        keys.copy_(layer.keys)
        values.copy_(layer.values)


def _key(ids: list[int], is_whole: bool) -> tuple[bool, bytes]:
    return is_whole, array("i", ids).tobytes()
