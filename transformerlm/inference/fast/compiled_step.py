"""A decoding step as one call of compiled loops, where numba is installed (extra `fast`): see `step_kernels`.

Threads share out the rows, not the products, so they need not wait for each other within a step.

Part of: decoder
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transformerlm.inference.fast.cache import DecoderCache
from transformerlm.inference.fast.uncompiled import reason_of
from transformerlm.models.layers import feed_forward
from transformerlm.models.settings import ModelSettings
from transformerlm.utils.helpers import Task, share
from transformerlm.utils.kernel import Packed, is_kept
from transformerlm.utils.machine_code import can_keep

# A thread that is given less than so many products of a number with a weight costs more than it saves.
_LEAST_WORK = 40_000_000
_ROWS_TOGETHER = 4
# So many ids of a prompt at least are worth a thread of their own, which begins a layer later.
_IDS_TOGETHER = 16
# The feed-forward layers whose activation `step_kernels` has.
_COMPILED_FFNS = ("swiglu", "silu")
Numbers = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float32]]


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
        from transformerlm.inference.fast.registers import TOGETHER
        from transformerlm.inference.fast.step_kernels import Shape, Weights, make_scratch, step, strips

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
            epsilons=np.array([settings.d_model * settings.norm_eps, settings.norm_eps]),
        )
        self._shape = Shape(
            num_heads=settings.num_heads,
            is_gated=int(len(feed_forward(settings.ffn).UP) > 1),
            has_norms=int(settings.norm_position != "none"),
        )
        self._kept = threading.local()
        # Taken apart once: a step of a small model takes as long as that.
        self._packed = Packed(self._weights), Packed(self._shape)
        self._num_layers, self._vocab_size, self._d_model = settings.num_layers, settings.vocab_size, settings.d_model
        self._step: Callable[..., Any] = step  # tuples may be `Packed`
        self._make_scratch = make_scratch
        self.keys_together = TOGETHER
        """How a `DecoderCache` has keys that these loops read."""
        sizes = settings.num_kv_heads, settings.d_head
        self._no_texts = (
            np.empty((1, 1, sizes[0], 1, sizes[1], TOGETHER), np.float32),
            np.empty((1, 1, sizes[0], TOGETHER, sizes[1]), np.float32),
        )
        self._work = sum(each.numel() for each in matrices)  # products for one row

    def __call__(self, token_ids: list[int], slots: list[int], cache: DecoderCache) -> Tensor:
        """Return the logits `(rows, vocab_size)` after one more id in each of `slots`.

        Raises:
            IndexError: an id that the model does not have, or a slot that is full. The loops check nothing.
        """
        self._check(token_ids, max(cache.lengths[slot] for slot in slots), cache)
        logits = self._empty_logits(len(slots))
        if len(slots) == 1:  # the same with less around it
            self._compute(np.array([token_ids, slots, [cache.lengths[slots[0]]]]), cache, logits.numpy())
            return logits
        threads = self._threads(len(slots))
        share(self._steps(token_ids, slots, cache, logits.numpy(), threads), threads)
        return logits[: len(slots)]

    def read(
        self,
        chunks: Sequence[Sequence[int]],
        slots: Sequence[int],
        starts: Sequence[int],
        cache: DecoderCache,
        *,
        running: tuple[list[int], list[int]] = ([], []),
    ) -> tuple[list[Tensor], Tensor]:
        """Read the next ids of some texts from `starts` on, and one more id in each slot of others, `running`.

        Return the vectors `(ids, d_model)` after the ids of each text, and the logits `(rows, vocab_size)` after those
        of the others. Parts of texts and of others are taken in turns.

        Raises:
            IndexError: as for a step.
        """
        for ids, start in zip(chunks, starts, strict=True):
            self._check(ids, start + len(ids) - 1, cache)
        if running[1]:
            self._check(running[0], max(cache.lengths[slot] for slot in running[1]), cache)
        numbers = np.concatenate(
            [
                np.array([ids, [slot] * len(ids), range(start, start + len(ids))])
                for ids, slot, start in zip(chunks, slots, starts, strict=True)
            ],
            axis=1,
        )  # (3, ids)
        count = numbers.shape[1]
        vectors = torch.empty(_filled_up(count), self._d_model)
        logits = self._empty_logits(len(running[1]))
        threads = self._threads(count + len(running[1]))
        reads = self._reads(numbers, cache, vectors.numpy(), min(threads, max(1, count // _IDS_TOGETHER)))
        steps = self._steps(*running, cache, logits.numpy(), threads) if running[1] else []
        # In turns, since a text's second part cannot begin with its first.
        share([task for pair in zip_longest(reads, steps) for task in pair if task is not None], threads)
        return list(torch.split(vectors[:count], [len(ids) for ids in chunks])), logits[: len(running[1])]

    def _check(self, ids: Sequence[int], last: int, cache: DecoderCache) -> None:
        if not (min(ids) >= 0 and max(ids) < self._vocab_size and last < cache.max_length):
            raise IndexError(
                f"expected ids from 0 to {self._vocab_size - 1} at places before {cache.max_length}, "
                f"found {min(ids)} to {max(ids)}, the last at {last}"
            )

    def _threads(self, count: int) -> int:
        """Return how many threads are worth their while for so many ids."""
        return max(1, min(torch.get_num_threads(), count // _ROWS_TOGETHER, count * self._work // _LEAST_WORK))

    def _empty_logits(self, count: int) -> Tensor:
        return torch.empty(_filled_up(count), self._vocab_size)

    def _steps(
        self, token_ids: list[int], slots: list[int], cache: DecoderCache, logits: Floats, parts: int
    ) -> list[Task]:
        """Return tasks that write the logits `(rows, vocab_size)` after one more id in each of `slots`."""
        numbers = np.array([token_ids, slots, [cache.lengths[slot] for slot in slots]])  # (3, rows)
        return [partial(self._compute, numbers[:, part], cache, logits[part]) for part in _parts(len(slots), parts)]

    def _reads(self, numbers: Numbers, cache: DecoderCache, vectors: Floats, parts: int) -> list[Task]:
        """Return tasks that write the vectors `(rows, d_model)` after ids in slots of lengths `(3, ids)`.

        One that begins within a text is a layer later than the one that has the ids before.
        """
        tasks: list[Task] = []
        before: list[Event] = []
        for part in _parts(numbers.shape[1], parts):
            first, after = part.start, [Event() for _ in range(self._num_layers)]
            is_same_text = first > 0 and numbers[1, first] == numbers[1, first - 1]
            order = before if is_same_text else [], after
            tasks.append(partial(self._read_part, numbers[:, part], cache, vectors[part], *order))
            before = after
        return tasks

    def _read_part(
        self, numbers: Numbers, cache: DecoderCache, vectors: Floats, before: list[Event], after: list[Event]
    ) -> None:
        """Read ids, slots and lengths `(3, ids)`, each layer when it is done `before`; set `after` as each is done.

        Write the vectors `(rows, d_model)`.
        """
        try:
            run = self._runner(numbers, cache.arrays, vectors, np.empty((0, self._vocab_size), np.float32))
            for layer, done in enumerate(after):
                if before:
                    before[layer].wait()
                run(layer, layer + 1)
                done.set()
        finally:  # who waits for it must not wait for ever
            for done in after:
                done.set()

    def head(self, vectors: Tensor) -> Tensor:
        """Return the logits `(rows, vocab_size)` of vectors `(rows, d_model)`."""
        count = len(vectors)
        padded = torch.nn.functional.pad(vectors, (0, 0, 0, _filled_up(count) - count))
        logits = self._empty_logits(count)
        nothing, threads = np.empty((3, 0), np.int64), self._threads(count)
        runners = [
            self._runner(nothing, self._no_texts, padded[part].numpy(), logits[part].numpy())
            for part in _parts(len(padded), threads)
        ]
        share([partial(run, 0, 0) for run in runners], threads)
        return logits[:count]

    def _compute(self, numbers: Numbers, cache: DecoderCache, logits: Floats) -> None:
        """Write the logits `(rows, vocab_size)` after ids in slots of lengths `(3, rows)`."""
        vectors = np.empty((len(logits), self._d_model), np.float32)
        self._runner(numbers, cache.arrays, vectors, logits)(0, self._num_layers)

    def _runner(
        self, numbers: Numbers, arrays: tuple[Floats, Floats], vectors: Floats, logits: Floats
    ) -> Callable[[int, int], None]:
        """Return what lets ids in slots of lengths `(3, rows)` pass the layers from one up to another."""
        ids, slots, lengths = numbers
        scratch = self._scratch_for(len(vectors), arrays[0])

        def run(first: int, end: int) -> None:
            new = ids if first == 0 else ids[:0]  # after that, `vectors` has what they became
            self._step(first, end, new, slots, lengths, *self._packed, *arrays, vectors, scratch, logits)

        return run

    def _scratch_for(self, rows: int, keys: Floats) -> Packed:
        """Return memory for rows of texts with such keys; that for one row is kept for its thread's next."""
        kept: Packed | None = getattr(self._kept, "scratch", None) if rows == 1 else None
        if kept is not None and kept.values.shares.shape[1] >= keys.shape[3] * keys.shape[5]:
            return kept
        made = Packed(self._make_scratch(rows, self._weights, self._shape, keys))
        if rows == 1:
            self._kept.scratch = made
        return made


def _parts(count: int, number: int) -> list[slice]:
    """Return so many rows in about so many parts, of whole groups of `_ROWS_TOGETHER`."""
    size = -(-count // (number * _ROWS_TOGETHER)) * _ROWS_TOGETHER
    return [slice(first, first + size) for first in range(0, count, size)]


def _filled_up(count: int) -> int:
    """Return how many rows are computed for so many: one alone, or four at a time."""
    return count if count == 1 else -(-count // _ROWS_TOGETHER) * _ROWS_TOGETHER


def why_not(settings: ModelSettings, *, device: torch.device, dtype: torch.dtype, always: bool = True) -> str:
    """Return why a model's steps cannot be compiled; nothing if they can.

    Unless `always`, they are not where each process would compile them again.
    """
    if device.type != "cpu" or dtype != torch.float32:
        return "only fp32 on a CPU"
    if settings.norm_position == "post":
        return 'not norm_position = "post"'
    if settings.ffn not in _COMPILED_FFNS:
        return f"not ffn = {settings.ffn!r}"
    return _missing() or "".join(_failures) or ("" if always or _stays() else "the machine code cannot be kept")


_failures: list[str] = []


def note_failure(reason: str) -> None:
    """Have no other decoder of this process try what could not be compiled."""
    _failures[:] = [reason]


@cache
def _missing() -> str:
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "NUMBA_DISABLE_JIT is set"
    try:
        from transformerlm.inference.fast import step_kernels  # noqa: F401
    except Exception as error:  # of many types: too new a Python or numpy, a broken llvmlite
        return reason_of(error)
    return ""


@cache
def _stays() -> bool:
    """Return whether the step's machine code is on the disk, or can be written there."""
    try:
        return can_keep() or is_kept(Path(__file__).parent, "step_kernels.step")
    except Exception:  # of many types; compiling says what is wrong
        return False
