"""Texts that are decoded together while others join and leave: continuous batching (Orca, Yu et al. 2022).

Each text has a slot, one row of a `Decoder`'s cache, from its first chunk to its last id. Between two steps of all
running rows at most one chunk of a prompt is read, so a long prompt delays nobody by more than that.

A prompt is read in chunks of `prefill_chunk` ids from position 0 on; the last is padded to the smallest of 16, 32, 64,
... that holds it. So a chunk's numbers depend on its ids and its place alone. Where a row's window is full, its last
half is read again from position 0, as in the plain loop.

Twin of `Batcher`: `transformerlm.inference.generate.decode_each`
Test: tests/inference/fast/test_batcher.py
Pays: 2.7x the tokens/s of eight prompts of 8 to 96 ids, in fp32 on one core, against one at a time (docs/LOG.md)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from transformerlm.inference.fast.decoder import Decoder
from transformerlm.inference.requests import (
    Drawn,
    Event,
    Finished,
    FinishReason,
    Request,
    TokenLogprobs,
)
from transformerlm.inference.sampling import SamplingParams, sample

SMALLEST_CHUNK = 16
"""What the last chunk of a prompt is padded to at least."""
# Log-probabilities of a prompt are computed for this many of its ids at a time, to bound their memory.
_SCORED_AT_ONCE = 128


@dataclass(eq=False)
class _Row:
    """A request on its way: `window` is what its slot reads from position 0 on, before the ids that follow it."""

    request: Request
    window: list[int]
    slot: int = -1
    length: int = 0
    drawn: list[int] = field(default_factory=list)
    num_reused: int = 0
    scored: list[TokenLogprobs] = field(default_factory=list)


class Batcher:
    """Generates the texts of many requests, up to `slots` at a time, by repeated calls of `step`.

    Only ids below `vocab_size` are drawn, by default the model's. A slot holds `max_length` ids, by default the
    context; no text may need more. With `reads_first` all waiting prompts are read before the next step, as suits
    those who wait for all texts; else at most one chunk is.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        slots: int,
        prefill_chunk: int = 128,
        prefix_cache_bytes: int = 0,
        vocab_size: int | None = None,
        max_length: int | None = None,
        reads_first: bool = False,
    ) -> None:
        if slots < 1:
            raise ValueError(f"batcher: slots must be at least 1, got {slots}")
        if prefill_chunk < SMALLEST_CHUNK or prefill_chunk & (prefill_chunk - 1):
            raise ValueError(f"batcher: prefill_chunk must be a power of two from 16 on, got {prefill_chunk}")
        self._decoder, self._chunk, self._reads_first = decoder, prefill_chunk, reads_first
        self._vocab_size = decoder.vocab_size if vocab_size is None else vocab_size
        self._context = decoder.context_length
        self._cache = decoder.make_slots(slots, max_length)
        self._free = list(range(slots - 1, -1, -1))
        self._waiting: deque[_Row] = deque()
        self._reading: deque[_Row] = deque()  # in slots, their windows not read whole
        self._running: list[_Row] = []
        self._cancelled: set[str] = set()

    @property
    def running(self) -> int:
        """The number of requests that have a slot."""
        return len(self._reading) + len(self._running)

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a slot."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._reading or self._running)

    def submit(self, request: Request) -> None:
        """Take a request; its first event comes from a later `step`.

        Raises:
            ValueError: the prompt is empty or has an id that the model does not have.
        """
        prompt = request.prompt
        if not prompt or min(prompt) < 0 or max(prompt) >= self._decoder.vocab_size:
            raise ValueError(
                f"batcher: expected a prompt of ids from 0 to {self._decoder.vocab_size - 1}, found "
                f"{f'ids from {min(prompt)} to {max(prompt)}' if prompt else 'none'}"
            )
        self._waiting.append(_Row(request, prompt[-self._context :]))

    def cancel(self, request_id: str) -> None:
        """End a request at the next `step`; nothing happens where it has ended."""
        self._cancelled.add(request_id)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Cancel, admit, read at most one chunk, let each running row read its last id, and draw an id for each."""
        events: list[Event] = []
        self._drop_cancelled(events)
        self._admit(events)
        rows, logits = self._read(events)
        stepping = [row for row in self._running if row not in rows]
        if stepping:
            slots = [row.slot for row in stepping]
            logits.append(self._decoder.step_slots([row.drawn[-1] for row in stepping], cache=self._cache, slots=slots))
            for row in stepping:
                row.length += 1
        if logits:
            self._choose(rows + stepping, torch.cat(logits)[:, : self._vocab_size], events)
        return events

    # --- joining and leaving ---------------------------------------------------------------------------------------

    def _drop_cancelled(self, events: list[Event]) -> None:
        if not self._cancelled:
            return
        for rows in (self._waiting, self._reading, self._running):
            for row in [each for each in rows if each.request.request_id in self._cancelled]:
                self._finish(row, "cancelled", events)
        self._cancelled.clear()

    def _admit(self, events: list[Event]) -> None:
        while self._waiting and self._free:
            row = self._waiting.popleft()
            row.slot = self._free.pop()
            self._cache.lengths[row.slot] = 0
            self._reading.append(row)

    def _finish(self, row: _Row, reason: FinishReason, events: list[Event]) -> None:
        for rows in (self._waiting, self._reading, self._running):
            if row in rows:
                rows.remove(row)
        if row.slot >= 0:
            self._cache.lengths[row.slot] = 0
            self._free.append(row.slot)
        events.append(Finished(row.request.request_id, reason, row.num_reused))

    # --- reading ---------------------------------------------------------------------------------------------------

    def _read(self, events: list[Event]) -> tuple[list[_Row], list[Tensor]]:
        """Read chunks; return the rows whose windows are read now, and the logits `(1, vocab_size)` after each."""
        rows: list[_Row] = []
        logits: list[Tensor] = []
        while self._reading:
            row = self._reading[0]
            last = self._read_chunk(row)
            if last is not None:
                self._reading.popleft()
                self._running.append(row)
                rows.append(row)
                logits.append(last)
            if not self._reads_first:
                break
        return rows, logits

    def _read_chunk(self, row: _Row) -> Tensor | None:
        """Read a row's next chunk; return the logits `(1, vocab_size)` after its window, or None if more is to come."""
        ids = row.window[row.length : row.length + self._chunk]
        size = min(self._padded(len(ids)), self._context - row.length)
        padded = torch.tensor([ids + [0] * (size - len(ids))], device=self._decoder.device)
        vectors = self._decoder.read_chunk(padded, cache=self._cache, slots=[row.slot], start=row.length)[0]
        row.length += len(ids)
        self._cache.lengths[row.slot] = row.length
        return self._decoder.head(vectors[len(ids) - 1 : len(ids)]) if row.length == len(row.window) else None

    def _padded(self, count: int) -> int:
        size = SMALLEST_CHUNK
        while size < count:
            size *= 2
        return size

    # --- choosing --------------------------------------------------------------------------------------------------

    def _choose(self, rows: list[_Row], logits: Tensor, events: list[Event]) -> None:
        """Draw an id for each row from the logits `(rows, vocab)`, and tell it."""
        finite = logits.sum(dim=-1).isfinite()  # one infinity or NaN makes the sum one
        if not bool(finite.all()):
            for row, is_finite in zip(rows, finite.tolist(), strict=True):
                if not is_finite:
                    self._finish(row, "error", events)
            rows = [row for row, is_finite in zip(rows, finite.tolist(), strict=True) if is_finite]
            logits = logits[finite]
        if not rows:
            return
        ids = _sample(logits, [row.request.sampling for row in rows], [row.request.generator for row in rows]).tolist()
        for row, token_id in zip(rows, ids, strict=True):
            self._tell(row, token_id, events)

    def _tell(self, row: _Row, token_id: int, events: list[Event]) -> None:
        request = row.request
        if token_id in request.ends:
            self._finish(row, "stop", events)
            return
        row.drawn.append(token_id)
        events.append(Drawn(request.request_id, token_id))
        if len(row.drawn) == request.max_new_tokens:
            self._finish(row, "length", events)
        elif row.length == self._context:
            self._slide(row)

    def _slide(self, row: _Row) -> None:
        """Let a row whose window is full read the last half of its text again."""
        half = max(1, self._context // 2)
        row.window = (row.request.prompt + row.drawn)[-half:]
        row.length = self._cache.lengths[row.slot] = 0
        self._running.remove(row)
        self._reading.append(row)


def _sample(logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator | None]) -> Tensor:
    each = zip(logits.split(1), params, generators, strict=True)
    return torch.cat([sample(one, settings, [generator]) for one, settings, generator in each])
