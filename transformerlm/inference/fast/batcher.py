"""Texts that are decoded together while others join and leave: continuous batching (Orca, Yu et al. 2022).

Each text has a slot, one row of a `Decoder`'s cache, from its first chunk to its last id. For each step of all running
rows at most a chunk's ids of prompts are read. Short prompts come first, but no prompt lets others pass without end.

A prompt is read in chunks of `prefill_chunk` ids from position 0 on. A decoder with compiled steps computes each id
alone, so parts of several prompts are read together, in one pass with the running rows' last ids (Sarathi-Serve,
Agrawal et al. 2024). Without them, a prompt that was read whole has its first id before the running rows go on. With a
reproducible decoder, a chunk is then read alone, and the last is padded to the smallest of 16, 32, 64, ... that holds
it: so a chunk's numbers depend on its ids and its place alone. With another, short prompts are read together. Where a
row's window is full, its last half is read again from position 0, as in the plain loop.

Twin of `Batcher`: `transformerlm.inference.generate.answer`
Test: tests/inference/fast/test_batcher.py
Pays: 3.8 s of CPU to 1.5 for 192 texts in 32 slots, with the faster choice of ids (docs/batching.md)
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from transformerlm.inference.fast.batch_rows import Part, Row, last_ids, one_longer
from transformerlm.inference.fast.decoder import Decoder
from transformerlm.inference.fast.prefix_cache import PrefixCache, put_back
from transformerlm.inference.logprobs import log_probabilities
from transformerlm.inference.penalties import Occurrences, adjust
from transformerlm.inference.random_numbers import RandomNumbers
from transformerlm.inference.requests import (
    Drawn,
    Event,
    Finished,
    FinishReason,
    PromptScored,
    Request,
    TokenLogprobs,
    last_window,
)
from transformerlm.inference.sampling import sample
from transformerlm.utils.threads import at_most

SMALLEST_CHUNK = 16
"""What the last chunk of a prompt is padded to at least."""
# Who waits for all texts has short prompts read together, as many as fill so many chunks.
_MOST_READ_TOGETHER = 4
# A pass through the layers takes as long as if it had this many ids more: with 16 ids a third of its time with 128.
_IDS_OF_A_PASS = 40
# A prompt of n ids lets others pass that come before so many times n ids were read.
_PATIENCE = 2
# Log-probabilities of a prompt are computed for this many of its ids at a time, to bound their memory.
_SCORED_AT_ONCE = 128


class Batcher:
    """Generates the texts of many requests, up to `slots` at a time, by repeated calls of `step`.

    Only ids below `vocab_size` are drawn, by default the model's. A slot holds `max_length` ids, by default the
    context; no text may need more. `prefix_cache_bytes` keeps the keys and values of prompts for the next one that
    begins alike. With `reads_first` a call of `step` reads all waiting prompts, as suits those who wait for all texts.
    Raises ValueError for a number that cannot be.
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
            raise ValueError(
                f"batcher: prefill_chunk must be a power of two from {SMALLEST_CHUNK} on, got {prefill_chunk}"
            )
        self._decoder, self._chunk, self._reads_first = decoder, prefill_chunk, reads_first
        self._vocab_size = decoder.vocab_size if vocab_size is None else vocab_size
        self._context = decoder.context_length
        length = (
            self._context if max_length is None else -(-max_length // prefill_chunk) * prefill_chunk
        )  # whole chunks
        self._cache = decoder.make_slots(slots, length)
        self._prefixes = PrefixCache(prefix_cache_bytes)
        self._free = list(range(slots - 1, -1, -1))
        self._waiting: deque[Row] = deque()
        # In slots: prompts that are not read whole; rows that read a half window again; rows that have drawn an id.
        self._reading: deque[Row] = deque()
        self._sliding: deque[Row] = deque()
        self._running: list[Row] = []
        self._slides_next = True
        self._has_read = False  # the call before has drawn first ids, and let no row read
        self._cancelled: set[str] = set()
        self.num_read = 0
        """How many ids of prompts were read so far; those of the prefix cache were not."""
        self.num_read_again = 0
        """How many ids of texts that had filled their windows were read again so far."""
        self.choice_seconds = 0.0
        """The time that drawing took so far; on a GPU, with that of the logits, for which it waits."""

    @property
    def running(self) -> int:
        """The number of requests that have a slot."""
        return len(self._reading) + len(self._sliding) + len(self._running)

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a slot."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self.running)

    def forget_prefixes(self) -> None:
        """Free what is kept for prompts that begin alike, and keep nothing from now on."""
        self._prefixes = PrefixCache(0)

    def submit(self, request: Request) -> None:
        """Take a request; its first event comes from a later `step`. Its `request_id` must be new.

        Raises:
            ValueError: the prompt is empty or has an id that the model does not have, or that it cannot draw and whose
                log-probability is asked for; or `max_new_tokens` is negative.
        """
        prompt = request.prompt
        bound = self._decoder.vocab_size if request.num_prompt_logprobs is None else self._vocab_size
        if not prompt or min(prompt) < 0 or max(prompt) >= bound:
            found = f"ids from {min(prompt)} to {max(prompt)}" if prompt else "none"
            raise ValueError(f"batcher: expected a prompt of ids from 0 to {bound - 1}, found {found}")
        if request.max_new_tokens < 0:
            raise ValueError(f"batcher: max_new_tokens must be at least 0, got {request.max_new_tokens}")
        numbers = RandomNumbers(request.generator, self._decoder.device)
        window = last_window(prompt, self._context, request.start_id)
        self._waiting.append(Row(request, window, self._occurrences_of(request), numbers))

    def _occurrences_of(self, request: Request) -> Occurrences | None:
        penalties, min_tokens = request.penalties, request.min_tokens
        if not Occurrences.needed(penalties, min_tokens=min_tokens):
            return None
        return Occurrences(request.prompt, penalties, ends=request.ends, min_tokens=min_tokens)

    def cancel(self, request_id: str) -> None:
        """End a request at the next `step`; nothing happens where it has ended."""
        self._cancelled.add(request_id)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Cancel, admit, read some ids of prompts and the last id of each running row; draw an id for each.

        Without compiled steps, where prompts were read to their ends, the running rows wait for the next call, so that
        nobody waits for them.
        """
        events: list[Event] = []
        if self._cancelled:
            self._drop_cancelled(events)
        self._admit(events)
        rows: list[Row] = []
        logits: list[Tensor] = []
        running = list(self._running)
        if not (self._has_read and running):
            rows, logits, running = self._read(events, running)
        self._has_read = bool(rows) and not self._decoder.reads_rows
        if running and not self._has_read:
            logits.append(self._decoder.step_slots(*last_ids(running), cache=self._cache))
            rows += one_longer(running)
        if logits:
            with at_most(1):  # small things, for which threads would wait longer than they work
                together = logits[0] if len(logits) == 1 else torch.cat(logits)
                self._choose(rows, together[:, : self._vocab_size], events)
        return events

    # --- joining and leaving ---------------------------------------------------------------------------------------

    def _drop_cancelled(self, events: list[Event]) -> None:
        for rows in (self._waiting, self._reading, self._sliding, self._running):
            for row in [each for each in rows if each.request.request_id in self._cancelled]:
                self._finish(row, "cancelled", events)
        self._cancelled.clear()

    def _admit(self, events: list[Event]) -> None:
        while self._waiting and self._free:
            row = self._waiting.popleft()
            if row.request.max_new_tokens == 0 and row.request.num_prompt_logprobs is None:
                self._finish(row, "length", events)
                continue
            row.slot = self._free.pop()
            self._cache.lengths[row.slot] = 0
            row.due = 0 if self._reads_first else self.num_read + self.num_read_again + _PATIENCE * len(row.window)
            self._reading.append(row)

    def _finish(self, row: Row, reason: FinishReason, events: list[Event], end: TokenLogprobs | None = None) -> None:
        for rows in (self._waiting, self._reading, self._sliding, self._running):
            if row in rows:
                rows.remove(row)
        if row.slot >= 0:
            self._cache.lengths[row.slot] = 0
            self._free.append(row.slot)
        # A NaN that is left in the memory would spoil masked sums: 0 times NaN is NaN.
        if row.slot >= 0 and (reason == "error" or self._decoder.steps_all_slots):
            for tensor in (each for layer in self._cache.layers_of(row.slot) for each in layer):
                tensor.zero_()
        events.append(Finished(row.request.request_id, reason, row.num_reused, end))

    # --- reading ---------------------------------------------------------------------------------------------------

    def _read(self, events: list[Event], running: list[Row]) -> tuple[list[Row], list[Tensor], list[Row]]:
        """Read prompts, and where their decoder can, the last ids of the `running` rows in the same pass.

        Return the rows of which logits are known now, these logits, one below the other, and who still has to run.
        """
        rows: list[Row] = []
        logits: list[Tensor] = []
        budget, spent = self._budget(), 0.0  # in ids that would take as long
        while self._reading or self._sliding:
            row = self._next_row()
            known = self._reuse(row)
            parts = [] if known is not None else self._parts_to_read(row, budget - spent)
            cost = self._cost(parts)
            if (spent and spent + cost > budget) or (known is None and not parts):
                break
            spent += cost
            self._slides_next = not row.drawn
            done = [(row, known)] if known is not None else []
            if known is None:
                done, stepped = self._read_parts(parts, running)
                if len(stepped):
                    rows += one_longer(running)
                    logits.append(stepped)
                    running = []
            for each, last in done:
                self._sliding.remove(each) if each.drawn else self._reading.remove(each)
                self._running.append(each)
                if self._goes_on(each, events):
                    rows.append(each)
                    logits.append(last)
        return rows, logits, running

    def _budget(self) -> float:
        """Return how many ids may be read now, for which the running rows wait."""
        if self._reads_first:
            return math.inf
        return self._chunk + (0 if self._decoder.reads_rows else _IDS_OF_A_PASS)

    def _next_row(self) -> Row:
        """Return whose chunk is read next: prompts as they are due, rows that slide in their order, in turns."""
        if self._sliding and (self._slides_next or not self._reading):
            return self._sliding[0]
        return min(self._reading, key=lambda row: row.due)

    def _reuse(self, row: Row) -> Tensor | None:
        """Copy the chunks of a prompt that are known; return the logits `(1, vocab_size)` after it, if they are too."""
        if row.drawn or row.request.num_prompt_logprobs is not None:
            return None
        while row.length % self._chunk == 0:
            end = min(row.length + self._chunk, len(row.window))
            kept = self._prefixes.find(row.window[:end], is_whole=end == len(row.window))
            if kept is None:
                return None
            put_back(kept, self._cache, row.slot)
            row.num_reused += end - row.length
            row.length = self._cache.lengths[row.slot] = end
            if kept.logits is not None:
                self._prefixes.use(row.window, self._chunk)
                return kept.logits
        return None

    def _parts_to_read(self, row: Row, budget: float) -> list[Part]:
        """Return a part of the row's window, and of others that are read in one pass with it.

        Where bits must not depend on the others, each is read alone, unless the decoder computes each id alone.
        """
        if self._decoder.reads_rows:
            return self._parts_by_ids(row, budget)
        parts, longest = [self._whole_chunk(row)], len(row.window)
        if self._decoder.is_reproducible or not self._can_be_read_with_others(row):
            return parts
        windows = {tuple(row.window)}
        for other in (*self._reading, *self._sliding):
            if other is row or self._is_known(other, windows) or not self._can_be_read_with_others(other):
                continue
            longest = max(longest, len(other.window))
            if (len(parts) + 1) * longest > self._most_together:
                break
            parts.append(self._whole_chunk(other))
            windows.add(tuple(other.window))
        return parts

    def _parts_by_ids(self, row: Row, budget: float) -> list[Part]:
        """Return as many ids as the budget allows, the row's first."""
        parts: list[Part] = []
        room = int(min(budget, self._most_together))
        windows: set[tuple[int, ...]] = set()
        for other in (row, *sorted(self._reading, key=lambda one: one.due), *self._sliding):
            if (other is row and parts) or (other is not row and self._is_known(other, windows)):
                continue
            part = self._whole_chunk(other)
            part = part._replace(ids=part.ids[:room])
            if not part.ids:
                break
            room -= len(part.ids)
            parts.append(part)
            windows.add(tuple(other.window))
        return parts

    @property
    def _most_together(self) -> int:
        """The most ids that are read in one pass."""
        return _MOST_READ_TOGETHER * self._chunk if self._reads_first else self._chunk

    def _is_known(self, row: Row, windows: set[tuple[int, ...]]) -> bool:
        """Return whether a row's next chunk is in the prefix cache, or will be: its window is one that is read now."""
        end = min(len(row.window), (row.length // self._chunk + 1) * self._chunk)
        is_kept = row.length % self._chunk == 0 and not row.drawn
        is_kept = is_kept and self._prefixes.find(row.window[:end], is_whole=end == len(row.window)) is not None
        return is_kept or tuple(row.window) in windows

    def _whole_chunk(self, row: Row) -> Part:
        """Return what is left of the chunk in which a row is."""
        return Part(row, row.length, row.window[row.length : (row.length // self._chunk + 1) * self._chunk])

    def _cost(self, parts: list[Part]) -> int:
        """Return how many ids would take as long as the next pass does."""
        if not parts:
            return 0
        if self._decoder.reads_rows:
            return sum(len(part.ids) for part in parts)
        return len(parts) * self._size(parts) + _IDS_OF_A_PASS

    def _can_be_read_with_others(self, row: Row) -> bool:
        is_scored = row.request.num_prompt_logprobs is not None and not row.drawn
        return not (row.length or is_scored) and 1 < len(row.window) <= self._chunk

    def _size(self, parts: list[Part]) -> int:
        """Return how many ids of each row a pass reads, with those that fill it up."""
        size = max(len(part.ids) for part in parts)
        return min(_padded(size), self._context - parts[0].start) if self._decoder.is_reproducible else size

    def _read_parts(self, parts: list[Part], running: list[Row]) -> tuple[list[tuple[Row, Tensor]], Tensor]:
        """Read a part of each row's window; return the rows whose windows are read now, with the logits after them.

        The logits of the `running` rows come beside them, or none.
        """
        read: list[Row] = []
        last: list[Tensor] = []  # (d_model) of each row that is read
        vectors, stepped = self._vectors(parts, running)
        for (row, start, ids), own in zip(parts, vectors, strict=True):
            self.num_read += 0 if row.drawn else len(ids)
            self.num_read_again += len(ids) if row.drawn else 0
            row.length = self._cache.lengths[row.slot] = start + len(ids)
            if row.request.num_prompt_logprobs is not None and not row.drawn:
                self._score(row, own, start)
            if row.is_read:
                read.append(row)
                last.append(own[-1])
            else:
                self._keep(row, None)
        logits = torch.split(self._decoder.head(torch.stack(last)), 1) if last else ()
        for row, own in zip(read, logits, strict=True):
            self._keep(row, own)
        return list(zip(read, logits, strict=True)), stepped

    def _vectors(self, parts: list[Part], running: list[Row]) -> tuple[Sequence[Tensor], Tensor]:
        """Read a part of each row's window; return the vectors `(ids, d_model)` after it.

        The logits of the `running` rows come beside them, or none.
        """
        slots, starts = [part.row.slot for part in parts], [part.start for part in parts]
        if self._decoder.reads_rows:
            return self._decoder.read_rows(
                [part.ids for part in parts],
                cache=self._cache,
                slots=slots,
                starts=starts,
                running=last_ids(running),
            )
        size = self._size(parts)
        padded = torch.tensor(
            # Filled up with an id of its own: another's vector may not be finite, and 0 times that is NaN.
            [[*part.ids, *[part.ids[-1]] * (size - len(part.ids))] for part in parts],
            device=self._decoder.device,
        )
        vectors = self._decoder.read_chunk(padded, cache=self._cache, slots=slots, start=starts[0])
        return [own[: len(part.ids)] for part, own in zip(parts, vectors, strict=True)], vectors[:0, 0]

    def _keep(self, row: Row, logits: Tensor | None) -> None:
        """Keep the chunk of a prompt that was read whole; with the logits after it, if it ends the prompt."""
        if row.drawn:
            return
        ids, start = row.window[: row.length], (row.length - 1) // self._chunk * self._chunk
        if row.length - start == self._chunk:
            self._prefixes.keep(self._cache, row.slot, ids, start=start, logits=None)
        if logits is not None:
            self._prefixes.keep(self._cache, row.slot, ids, start=start, logits=logits)
            self._prefixes.use(row.window, self._chunk)

    def _score(self, row: Row, vectors: Tensor, start: int) -> None:
        """Add the log-probabilities of the prompt's ids that follow the vectors `(ids, d_model)` from `start` on."""
        num_top = row.request.num_prompt_logprobs or 0
        following = row.window[start + 1 : start + 1 + len(vectors)]
        for place in range(0, len(following), _SCORED_AT_ONCE):
            ids = following[place : place + _SCORED_AT_ONCE]
            logits = self._decoder.head(vectors[place : place + len(ids)])[:, : self._vocab_size]
            row.scored += log_probabilities(logits, ids, num_top=num_top)

    def _goes_on(self, row: Row, events: list[Event]) -> bool:
        """Tell what is known when a window was read; return whether an id is to be drawn."""
        request = row.request
        if request.num_prompt_logprobs is not None and not row.drawn:
            if not all(math.isfinite(one.logprob or 0.0) for one in row.scored):
                self._finish(row, "error", events)
                return False
            # Nothing precedes the first id that was read; those before a prompt's last window were not.
            before = request.prompt[: len(request.prompt) - len(row.scored)]
            unknown = [TokenLogprobs(token_id, None, []) for token_id in before]
            events.append(PromptScored(request.request_id, unknown + row.scored))
            row.scored = []
        if request.max_new_tokens == 0:
            self._finish(row, "length", events)
        return request.max_new_tokens > 0

    # --- choosing --------------------------------------------------------------------------------------------------

    def _choose(self, rows: list[Row], logits: Tensor, events: list[Event]) -> None:
        """Draw an id for each row from the logits `(rows, vocab)`, and tell it."""
        began = time.perf_counter()
        changed = adjust(logits, [row.occurrences for row in rows])
        ids = sample(changed, [row.request.sampling for row in rows], [row.numbers for row in rows]).tolist()
        asked = [index for index, row in enumerate(rows) if row.request.num_logprobs is not None and ids[index] >= 0]
        scores: dict[int, TokenLogprobs] = {}
        # Each number by itself: where logits are equal, the first few of many are not those of a few.
        for num_top in {rows[index].request.num_logprobs or 0 for index in asked}:
            same = [index for index in asked if rows[index].request.num_logprobs == num_top]
            found = log_probabilities(logits[same], [ids[index] for index in same], num_top=num_top)
            scores |= dict(zip(same, found, strict=True))
        self.choice_seconds += time.perf_counter() - began
        for index, (row, token_id) in enumerate(zip(rows, ids, strict=True)):
            self._tell(row, token_id, scores.get(index), events)

    def _tell(self, row: Row, token_id: int, scores: TokenLogprobs | None, events: list[Event]) -> None:
        request = row.request
        if token_id < 0 or token_id in request.ends:
            self._finish(row, "error" if token_id < 0 else "stop", events, scores)
            return
        row.drawn.append(token_id)
        if row.occurrences is not None:
            row.occurrences.add(token_id)
        events.append(Drawn(request.request_id, token_id, scores))
        if len(row.drawn) == request.max_new_tokens:
            self._finish(row, "length", events)
        elif row.length == self._context:
            self._slide(row)

    def _slide(self, row: Row) -> None:
        """Let a row whose window is full read the last half of its text again."""
        half = max(1, self._context // 2)
        row.window = last_window(row.request.prompt + row.drawn, half, row.request.start_id)
        row.length = self._cache.lengths[row.slot] = 0
        self._running.remove(row)
        self._sliding.append(row)


def _padded(count: int) -> int:
    """Return the smallest size of the grid that holds `count` ids."""
    return max(SMALLEST_CHUNK, 1 << (count - 1).bit_length())
