"""A decoding step as one call of compiled loops, where numba is installed (extra `fast`): see `step_kernels`.

Threads share out the rows, not the products, so they need not wait for each other within a step.

Part of: decoder
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transformerlm.inference.fast.cache import DecoderCache
from transformerlm.models.layers import feed_forward
from transformerlm.models.settings import ModelSettings

# A thread that is given less than so many products of a number with a weight costs more than it saves.
_LEAST_WORK = 40_000_000
_ROWS_TOGETHER = 4
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
        from transformerlm.inference.fast.step_kernels import Shape, Weights, head, step, strips

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
        self._step, self._head = step, head
        self._work = sum(each.numel() for each in matrices)  # products for one row

    def __call__(self, token_ids: list[int], slots: list[int], cache: DecoderCache) -> Tensor:
        """Return the logits `(rows, vocab_size)` after one more id in each of `slots`."""
        numbers = np.array([token_ids, slots, [cache.lengths[slot] for slot in slots]])  # (3, rows)
        count = len(slots)
        groups = max(1, min(torch.get_num_threads(), count // _ROWS_TOGETHER, count * self._work // _LEAST_WORK))
        size = -(-count // (groups * _ROWS_TOGETHER)) * _ROWS_TOGETHER
        parts = self._by_threads([numbers[:, first : first + size] for first in range(0, count, size)], cache)
        return parts[0][1] if len(parts) == 1 else torch.cat([logits for _, logits in parts])

    def read(
        self, chunks: Sequence[Sequence[int]], slots: Sequence[int], starts: Sequence[int], cache: DecoderCache
    ) -> list[Tensor]:
        """Read the next ids of some texts from `starts` on; return the vectors `(ids, d_model)` after them."""
        numbers = [
            np.array([ids, [slot] * len(ids), range(start, start + len(ids))])
            for ids, slot, start in zip(chunks, slots, starts, strict=True)
        ]
        is_much = sum(map(len, chunks)) * self._work > _LEAST_WORK
        groups = min(torch.get_num_threads(), len(chunks)) if is_much else 1
        # A thread takes whole texts, the longest ones first, each where there is the least so far.
        shares: list[list[int]] = [[] for _ in range(groups)]
        for text in sorted(range(len(chunks)), key=lambda text: -len(chunks[text])):
            min(shares, key=lambda share: sum(len(chunks[one]) for one in share)).append(text)
        together = [np.concatenate([numbers[text] for text in share], axis=1) for share in shares]
        vectors: dict[int, Tensor] = {}
        for share, (read, _) in zip(shares, self._by_threads(together, cache, is_read=True), strict=True):
            vectors |= zip(share, torch.split(read, [len(chunks[text]) for text in share]), strict=True)
        return [vectors[text] for text in range(len(chunks))]

    def head(self, vectors: Tensor) -> Tensor:
        """Return the logits `(rows, vocab_size)` of vectors `(rows, d_model)`."""
        count = len(vectors)
        padded = torch.nn.functional.pad(vectors, (0, 0, 0, _filled_up(count) - count))
        logits = torch.empty(len(padded), self._shape.vocab_size)
        self._head(padded.numpy(), self._weights, self._shape, logits.numpy())
        return logits[:count]

    def _by_threads(
        self, parts: list[Numbers], cache: DecoderCache, *, is_read: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """Read ids, slots and lengths `(3, rows)` of each part in a thread of its own; return vectors and logits."""
        later = [_helpers(len(parts) - 1).submit(self._compute, part, cache, is_read) for part in parts[1:]]
        first = self._compute(parts[0], cache, is_read)
        return [first, *(each.result() for each in later)]

    def _compute(self, numbers: Numbers, cache: DecoderCache, is_read: bool) -> tuple[Tensor, Tensor]:
        ids, slots, lengths = numbers
        count, rows = len(ids), _filled_up(len(ids))
        vectors = torch.empty(rows, self._weights.embedding.shape[1])
        logits = torch.empty(0 if is_read else rows, self._shape.vocab_size)
        self._step(ids, slots, lengths, self._weights, self._shape, *cache.arrays, vectors.numpy(), logits.numpy())
        return vectors[:count], logits[:count]


def _filled_up(count: int) -> int:
    """Return how many rows are computed for so many: one alone, or four at a time."""
    return count if count == 1 else -(-count // _ROWS_TOGETHER) * _ROWS_TOGETHER


def why_not(settings: ModelSettings, *, device: torch.device, dtype: torch.dtype) -> str:
    """Return why a model's steps cannot be compiled; nothing if they can."""
    if device.type != "cpu" or dtype != torch.float32:
        return "only fp32 on a CPU"
    if settings.norm_position == "post":
        return 'not norm_position = "post"'
    return _missing()


@cache
def _missing() -> str:
    try:
        from transformerlm.inference.fast import step_kernels  # noqa: F401
    except Exception as error:  # numba raises many types: too new a Python or numpy, a broken llvmlite
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


@cache
def _helpers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="decoder")
