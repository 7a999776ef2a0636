"""A decoding step as one call of compiled loops, where numba is installed (extra `fast`): see `step_kernels`.

Threads share out the rows, not the products, so they need not wait for each other within a step.

Part of: decoder
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor

from transformerlm.inference.fast.cache import DecoderCache
from transformerlm.models.layers import feed_forward
from transformerlm.models.settings import ModelSettings

# A thread that is given less than so many products of a number with a weight costs more than it saves.
_LEAST_WORK = 40_000_000
_ROWS_TOGETHER = 4


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
        from transformerlm.inference.fast.step_kernels import Shape, Weights, step, strips

        *of_layers, head = [strips(each.numpy()) for each in matrices]
        qkv, output, up, down = (np.stack(of_layers[first::4]) for first in range(4))
        gains = [each.numpy() for each in head_gains if each is not None]
        nothing = np.empty((0, 0, 0), np.float32)
        self._weights = Weights(
            embedding=embedding.numpy(),
            qkv=qkv,
            output=output,
            up=up,
            down=down,
            head=head,
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
        self._step = step
        self._work = sum(each.numel() for each in matrices)  # products for one row

    def __call__(self, token_ids: list[int], slots: list[int], cache: DecoderCache) -> Tensor:
        """Return the logits `(rows, vocab_size)` after one more id in each of `slots`."""
        numbers = np.array([token_ids, slots, [cache.lengths[slot] for slot in slots]])  # (3, rows)
        count = len(token_ids)
        rows = count if count == 1 else -(-count // _ROWS_TOGETHER) * _ROWS_TOGETHER
        logits = torch.empty(rows, self._shape.vocab_size)
        assert cache.whole is not None, "made by make_slots"
        keys, values = (each.numpy() for each in cache.whole)
        groups = max(1, min(torch.get_num_threads(), rows // _ROWS_TOGETHER, rows * self._work // _LEAST_WORK))
        size = -(-rows // (groups * _ROWS_TOGETHER)) * _ROWS_TOGETHER if groups > 1 else rows
        out = logits.numpy()

        def compute(first: int) -> None:
            ids, own_slots, lengths = numbers[:, first : first + size]
            self._step(
                ids, own_slots, lengths, self._weights, self._shape, keys, values, out[first : first + size]
            )

        later = [_helpers(groups - 1).submit(compute, first) for first in range(size, rows, size)] if groups > 1 else []
        compute(0)
        for each in later:
            each.result()
        return logits[:count]


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
