"""A decoding step as one call of compiled loops, where numba is installed (extra `fast`): see `step_kernels`.

Threads share out the rows, not the products, so they need not wait for each other within a step.

Part of: decoder
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transformerlm.inference.fast.cache import DecoderCache
from transformerlm.inference.fast.uncompiled import reason_of
from transformerlm.models.layers import feed_forward
from transformerlm.models.settings import ModelSettings
from transformerlm.utils.interrupts import ctrl_c_held_back

# A thread that is given less than so many products of a number with a weight costs more than it saves.
_LEAST_WORK = 40_000_000
_ROWS_TOGETHER = 4
# So many ids of a prompt at least are worth a thread of their own, which begins a layer later.
_IDS_TOGETHER = 16
# The feed-forward layers whose activation `step_kernels` has.
_COMPILED_FFNS = ("swiglu", "silu")
Numbers = np.ndarray[Any, np.dtype[np.int64]]


class CompiledStep:
    """The step of a model in fp32 on a CPU; it has its own copy of the weights.

    `matrices` are `(out_features, in_features)`, with the gains of the norms before them, in the order of their use:
    four of each layer and the head. `head_gains` are those of each layer. Ask `why_not` first.
    """

    def __init__(
        self,
        settings: ModelSettings,
        embedding: Tensor,
        matrices: Sequence[Tensor],
        head_gains: Sequence[Tensor | None],
        rotations: Tensor | None,
    ) -> None:
        from transformerlm.inference.fast.step_kernels import (
            TOGETHER,
            Shape,
            Weights,
            embed,
            head,
            layers,
            step,
            strips,
        )

        *of_layers, last = [strips(each.numpy()) for each in matrices]
        qkv, output, up, down = (np.stack(of_layers[first::4]) for first in range(4))
        gains = [each.numpy() for each in head_gains if each is not None]
        nothing = np.empty((0, 0, 0), np.float32)
        self._weights = Weights(
            embedding=embedding.numpy(),
            qkv=qkv,
            output=output,
            up=up,
            down=down,
            head=last,
            head_gains=np.stack(gains) if gains else nothing,
            rotations=nothing if rotations is None else torch.view_as_real(rotations.squeeze(1)).contiguous().numpy(),
        )
        self._shape = Shape(
            num_heads=settings.num_heads,
            d_ff=settings.d_ff,
            vocab_size=settings.vocab_size,
            is_gated=len(feed_forward(settings.ffn).UP) > 1,
            has_norms=settings.norm_position != "none",
            norm_floor=(settings.d_model * settings.norm_eps) ** 0.5,
            norm_eps=settings.norm_eps,
        )
        self._step, self._head, self._embed, self._layers = step, head, embed, layers
        self.keys_together = TOGETHER
        """How a `DecoderCache` has keys that these loops read."""
        self._work = sum(each.numel() for each in matrices)  # products for one row

    def __call__(self, token_ids: list[int], slots: list[int], cache: DecoderCache) -> Tensor:
        """Return the logits `(rows, vocab_size)` after one more id in each of `slots`."""
        numbers = np.array([token_ids, slots, [cache.lengths[slot] for slot in slots]])  # (3, rows)
        count = len(slots)
        groups = max(1, min(torch.get_num_threads(), count // _ROWS_TOGETHER, count * self._work // _LEAST_WORK))
        size = -(-count // (groups * _ROWS_TOGETHER)) * _ROWS_TOGETHER
        parts = [numbers[:, first : first + size] for first in range(0, count, size)]
        logits = _by_threads([partial(self._compute, part, cache) for part in parts])
        return logits[0] if len(parts) == 1 else torch.cat(logits)

    def read(
        self, chunks: Sequence[Sequence[int]], slots: Sequence[int], starts: Sequence[int], cache: DecoderCache
    ) -> list[Tensor]:
        """Read the next ids of some texts from `starts` on; return the vectors `(ids, d_model)` after them.

        Threads share out the ids. One that begins within a text is a layer later than the one that has the ids before.
        """
        numbers = np.concatenate(
            [
                np.array([ids, [slot] * len(ids), range(start, start + len(ids))])
                for ids, slot, start in zip(chunks, slots, starts, strict=True)
            ],
            axis=1,
        )  # (3, ids)
        count = numbers.shape[1]
        groups = max(1, min(torch.get_num_threads(), count // _IDS_TOGETHER, count * self._work // _LEAST_WORK))
        size = -(-count // (groups * _ROWS_TOGETHER)) * _ROWS_TOGETHER
        tasks: list[Callable[[], Tensor]] = []
        before: list[Event] = []
        for first in range(0, count, size):
            after = [Event() for _ in self._weights.qkv]
            is_same_text = first > 0 and numbers[1, first] == numbers[1, first - 1]
            part = numbers[:, first : first + size]
            tasks.append(partial(self._read_part, part, cache, before if is_same_text else [], after))
            before = after
        return list(torch.split(torch.cat(_by_threads(tasks)), [len(ids) for ids in chunks]))

    def _read_part(self, numbers: Numbers, cache: DecoderCache, before: list[Event], after: list[Event]) -> Tensor:
        """Read ids, slots and lengths `(3, ids)`, each layer when it is done `before`; set `after` as each is done."""
        ids, slots, lengths = numbers
        vectors = torch.empty(_filled_up(len(ids)), self._weights.embedding.shape[1])
        try:
            self._embed(ids, self._weights, vectors.numpy())
            for layer, done in enumerate(after):
                if before:
                    before[layer].wait()
                rest = self._weights, self._shape, *cache.arrays, vectors.numpy()
                self._layers(layer, layer + 1, slots, lengths, *rest)
                done.set()
        finally:  # who waits for it must not wait for ever
            for done in after:
                done.set()
        return vectors[: len(ids)]

    def head(self, vectors: Tensor) -> Tensor:
        """Return the logits `(rows, vocab_size)` of vectors `(rows, d_model)`."""
        count = len(vectors)
        padded = torch.nn.functional.pad(vectors, (0, 0, 0, _filled_up(count) - count))
        logits = torch.empty(len(padded), self._shape.vocab_size)
        self._head(padded.numpy(), self._weights, self._shape, logits.numpy())
        return logits[:count]

    def _compute(self, numbers: Numbers, cache: DecoderCache) -> Tensor:
        """Return the logits `(rows, vocab_size)` after ids in slots of lengths `(3, rows)`."""
        ids, slots, lengths = numbers
        rows = _filled_up(len(ids))
        vectors = torch.empty(rows, self._weights.embedding.shape[1])
        logits = torch.empty(rows, self._shape.vocab_size)
        self._step(ids, slots, lengths, self._weights, self._shape, *cache.arrays, vectors.numpy(), logits.numpy())
        return logits[: len(ids)]


def _by_threads(tasks: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """Do each task in a thread of its own; return their results."""
    with ctrl_c_held_back():
        later = [_helpers(len(tasks) - 1).submit(task) for task in tasks[1:]]
        return [tasks[0](), *(each.result() for each in later)]


def _filled_up(count: int) -> int:
    """Return how many rows are computed for so many: one alone, or four at a time."""
    return count if count == 1 else -(-count // _ROWS_TOGETHER) * _ROWS_TOGETHER


def why_not(settings: ModelSettings, *, device: torch.device, dtype: torch.dtype) -> str:
    """Return why a model's steps cannot be compiled; nothing if they can."""
    if device.type != "cpu" or dtype != torch.float32:
        return "only fp32 on a CPU"
    if settings.norm_position == "post":
        return 'not norm_position = "post"'
    if settings.ffn not in _COMPILED_FFNS:
        return f"not ffn = {settings.ffn!r}"
    return _missing()


@cache
def _missing() -> str:
    try:
        from transformerlm.inference.fast import step_kernels  # noqa: F401
    except Exception as error:  # numba raises many types: too new a Python or numpy, a broken llvmlite
        return reason_of(error)
    return ""


@cache
def _helpers(count: int) -> ThreadPoolExecutor:
    _forget_helpers_in_children()
    return ThreadPoolExecutor(count, thread_name_prefix="decoder")


@cache
def _forget_helpers_in_children() -> None:
    """See to it that a forked child begins helpers of its own: the threads of its parent do not live in it."""
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(after_in_child=_helpers.cache_clear)
