"""A trained model prepared for generation: the same function as `TransformerLM`, with less between its products.

At one row a step, the model spends a third of its time between the matrix products and reads the weights in a layout
that is slow for one row. Here

- query, key and value are one matrix, and so are the two of SwiGLU, each in the layouts of `packed_linear`;
- the gain of a norm is multiplied into the matrix after it, but for int8, and residuals are added inside products;
- keys are stored transposed, as the scores read them, in memory allocated once; on a CPU embedding bags read them;
- each row of the cache has its own length, so that sequences of different lengths are decoded together;
- a step of a small model in fp32 on a CPU is one call of compiled loops (`compiled_step`), where numba is installed.

Twin of `Decoder`: `transformerlm.models.transformer.TransformerLM`
Test: tests/inference/fast/test_decoder.py
Pays: 1.35x the tokens/s of the model, fp32, one row, on a busy machine; compiled 1.2x to 6x of that (docs/LOG.md)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from transformerlm.inference.fast.cache import (
    ChunkPositions,
    DecoderCache,
    LayerKV,
    NewPositions,
    RaggedPositions,
    SlotPositions,
    check_room,
)
from transformerlm.inference.fast.compiled_step import CompiledStep, note_failure, why_not
from transformerlm.inference.fast.cuda_graph import CapturedStep
from transformerlm.inference.fast.decoder_layer import Layer, Norm, by_rows
from transformerlm.inference.fast.embedding_bag_matvec import KEY_BLOCK, has_fast_kernel
from transformerlm.inference.fast.packed_linear import MOST_EQUAL_ROWS, PackedLinear, pack
from transformerlm.inference.fast.uncompiled import reason_of, warn_once
from transformerlm.models.functional import soft_cap
from transformerlm.models.layers import RotaryEmbedding
from transformerlm.models.lora import plain_weights
from transformerlm.models.settings import SAME_FUNCTION, ModelSettings
from transformerlm.models.transformer import TransformerLM
from transformerlm.utils.dtypes import upcast
from transformerlm.utils.threads import at_most

# The settings that are computed here too, those with a few values with these; `check_known` refuses all others.
_CHOICES = {"norm_position": ("pre", "post", "none"), "position": ("rope", "none")}
_SETTINGS = {
    "context_length", "d_ff", "d_head", "d_model", "ffn", "logit_soft_cap", "norm_eps", "num_heads", "num_kv_heads",
    "num_layers", "qk_norm", "rope_scaling", "rope_theta", "tie_embeddings", "vocab_size",
}  # fmt: skip

# So many products of a number with a weight take about a millisecond.
_WORTH_THREADS = 40_000_000
# Above, oneDNN's products with many rows, by all threads, gain more than the compiled step does between them.
_MOST_COMPILED = 50_000_000
# And so they do in a prompt with so many products.
_LONG_PROMPT = 1_000_000_000


class Decoder:
    """A `TransformerLM` for generation alone; it has its own copy of the weights, as they were when it was made.

    The matrices keep the model's dtype, or with `int8` are kept in 8 bits (`packed_linear.Int8Linear`). On a CPU
    everything but their products is computed in fp32, which is faster there than bfloat16; elsewhere in the model's
    dtype. On CUDA single steps are captured as a CUDA graph, unless `cuda_graph` is False.

    Steps are compiled where they can be (`compiled_step`), unless `compiled` is False: once for an installation, in
    some seconds, when the first cache is made. With `reproducible` a text's bits do not depend on the texts that a
    `Batcher` decodes beside it. Where its steps are not compiled, one row is multiplied as several are, which takes
    longer. A test of this machine decides (`steps_all_slots`).
    """

    def __init__(
        self,
        model: TransformerLM,
        *,
        int8: bool = False,
        cuda_graph: bool = True,
        reproducible: bool = False,
        compiled: bool = True,
    ) -> None:
        check_known(model.hparams())
        settings, weights = model.settings, _group_by_layer(plain_weights(model))
        self.vocab_size, self.context_length = model.vocab_size, model.context_length
        embedding = weights[""]["token_embeddings"]
        self._embedding = embedding.clone(memory_format=torch.contiguous_format)  # (vocab_size, d_model)
        self.device, self.dtype = self._embedding.device, self._embedding.dtype
        if self.device.type == "cpu" and self.dtype == torch.bfloat16:
            self.dtype = torch.float32
        self._uses_bags = has_fast_kernel(self.device)
        self._captures = cuda_graph and self.device.type == "cuda"
        self._num_heads, self._kv_heads, self._d_head = settings.num_heads, settings.num_kv_heads, settings.d_head
        self._rope = _rotations(settings, self.device)
        self.is_reproducible = reproducible
        self._num_products = _count_products(weights)  # for each row
        compiled &= not int8 and self._num_products <= _MOST_COMPILED
        compiled = compiled and not why_not(
            settings, device=self.device, dtype=self._embedding.dtype, always=reproducible
        )
        fused: list[Tensor] = []  # in the order of their use
        # The same for all matrices; compiled steps have their own layout for single rows.
        stack = partial(_stack, fused, int8=int8, reproducible=reproducible or compiled)
        self._layers = [Layer(weights[str(i)], settings, stack) for i in range(settings.num_layers)]
        final = weights[""].get("ln_final")
        self._norm = None if final is None else Norm(final, settings.norm_eps)
        head = weights[""].get("lm_head", self._embedding)  # (vocab_size, d_model)
        self._head = stack([head], self._norm)
        self._soft_cap = settings.logit_soft_cap
        self._is_int8 = int8
        self._compiled: CompiledStep | None = None
        if compiled:
            self._compiled = CompiledStep(
                settings, self._embedding, fused, [layer.head_gains for layer in self._layers], self._rope
            )

    def make_cache(self, batch_size: int, max_length: int | None = None) -> DecoderCache:
        """Return an empty cache for `batch_size` sequences of at most `max_length` (default: context_length) tokens.

        Raises ValueError when max_length exceeds context_length.
        """
        length = self.context_length if max_length is None else max_length
        if length > self.context_length:
            raise ValueError(f"KV cache: max_length {length} exceeds the model's context_length {self.context_length}")
        if self._has_loops:
            return self._allocate(batch_size, length, torch.empty)
        # Zeros: what is masked is multiplied by 0, and 0 times the NaN of unset memory would be NaN.
        zeros = partial(torch.zeros, batch_size, self._kv_heads, device=self.device, dtype=self.dtype)
        whole_blocks = -(-length // KEY_BLOCK) * KEY_BLOCK
        layers = [LayerKV(zeros(self._d_head, whole_blocks), zeros(length, self._d_head)) for _ in self._layers]
        return DecoderCache(layers, self._num_heads)

    def make_slots(self, num_slots: int, max_length: int | None = None) -> DecoderCache:
        """Return a cache for texts of at most `max_length` ids (default: context_length), which come and go."""
        length = self.context_length if max_length is None else min(max_length, self.context_length)
        # Where not all slots are computed, what was written is read and nothing else: the memory may hold anything.
        return self._allocate(num_slots, length, torch.zeros if self.steps_all_slots else torch.empty)

    def _allocate(self, num_slots: int, length: int, make: Callable[..., Tensor]) -> DecoderCache:
        whole_blocks = -(-length // KEY_BLOCK) * KEY_BLOCK
        shape = partial(make, len(self._layers), num_slots, self._kv_heads, device=self.device, dtype=self.dtype)
        whole = LayerKV(shape(self._d_head, whole_blocks), shape(whole_blocks, self._d_head))
        layers = [LayerKV(*layer) for layer in zip(*whole, strict=True)]
        if self._compiled is None:
            return DecoderCache(layers, self._num_heads, whole)
        cache = DecoderCache(layers, self._num_heads, whole, self._compiled.keys_together)
        cache.max_length = length  # the memory is in whole blocks
        return cache

    def __call__(self, token_ids: Tensor, *, cache: DecoderCache, last_only: bool = False) -> Tensor:
        """Append ids `(batch, seq)` to the cache and return the logits after each, `(batch, seq, vocab_size)`.

        `last_only` gives those after the last id alone, `(batch, 1, vocab_size)`. Raises ValueError when the ids do not
        fit.
        """
        batch_size, seq_len = token_ids.shape
        check_room(cache, batch_size, seq_len)
        if cache.keys_together:
            logits = self._call_compiled(token_ids, cache, last_only=last_only)
        elif seq_len == 1 and self._captures:
            if cache.captured_step is None:
                cache.captured_step = CapturedStep(partial(self.step_at, cache=cache), cache.lengths, self.device)
            logits = cache.captured_step(token_ids, cache.lengths)  # (batch, vocab_size)
        else:
            bags = cache.attention_rows.up_to(cache.length + 1) if seq_len == 1 and self._uses_bags else None
            positions = NewPositions(cache.length, seq_len, self.device, self.dtype, bags)
            x = self._blocks(token_ids, positions, cache.layers)  # (batch * seq, d_model)
            if last_only and seq_len > 1:  # the head is the largest matrix: only the rows that are asked for
                x = x.view(batch_size, seq_len, -1)[:, -1].contiguous()  # (batch, d_model)
            logits = self._logits(x)
        cache.lengths = [length + seq_len for length in cache.lengths]
        return logits.view(batch_size, -1, self.vocab_size)

    def _call_compiled(self, token_ids: Tensor, cache: DecoderCache, *, last_only: bool) -> Tensor:
        assert self._compiled is not None, "the cache was made for it"
        batch_size, seq_len = token_ids.shape
        slots = list(range(batch_size))
        if seq_len == 1:
            return self._capped(self._compiled(token_ids[:, 0].tolist(), slots, cache))
        if cache.length == 0 and token_ids.numel() * self._num_products >= _LONG_PROMPT:
            layers = cache.layers_without_blocks(seq_len)
            positions = NewPositions(0, seq_len, self.device, self.dtype)
            x = self._blocks(token_ids, positions, layers).view(batch_size, seq_len, -1)
            cache.fill(layers, seq_len)
        else:
            x = torch.stack(self._compiled.read(token_ids.tolist(), slots, cache.lengths, cache)[0])
        return self._capped(self._compiled.head((x[:, -1] if last_only else x.flatten(0, 1)).contiguous()))

    def step_at(self, token_ids: Tensor, positions: Tensor, cache: DecoderCache) -> Tensor:
        """Return the logits `(batch, vocab_size)` after one id a row, `(batch, 1)`, at `positions` `(batch)`.

        All shapes depend on the cache's memory alone, and nothing is read back to the host.
        """
        assert not cache.keys_together, "compiled loops have a step of their own"
        positions_of = RaggedPositions(positions, cache.max_length, self.dtype)
        return self._logits(self._blocks(token_ids, positions_of, cache.layers))

    def read_chunk(self, token_ids: Tensor, *, cache: DecoderCache, slots: list[int], start: int) -> Tensor:
        """Read ids `(batch, seq)` into `slots` from position `start` on; return vectors `(batch, seq, d_model)`.

        Several slots must start at 0. `head` makes logits of the vectors. The caller counts `cache.lengths`.
        """
        batch_size, seq_len = token_ids.shape
        assert not cache.keys_together, "compiled loops read by `read_rows`"
        assert batch_size == 1 or start == 0, f"{batch_size} slots from position {start} on"
        if batch_size > 1:
            positions: NewPositions = ChunkPositions(slots, seq_len, self.device, self.dtype)
            layers = cache.layers
        else:
            positions = NewPositions(start, seq_len, self.device, self.dtype)
            layers = cache.layers_of(slots[0])
        with self._threads_for(batch_size * seq_len):
            return self._blocks(token_ids, positions, layers).view(batch_size, seq_len, -1)

    @property
    def reads_rows(self) -> bool:
        """Whether prompts are read by `read_rows`, which computes each id alone; else by `read_chunk`."""
        return self._has_loops

    def read_rows(
        self,
        chunks: list[list[int]],
        *,
        cache: DecoderCache,
        slots: list[int],
        starts: list[int],
        running: tuple[list[int], list[int]] = ([], []),
    ) -> tuple[list[Tensor], Tensor]:
        """Read the next ids of some texts, each in its slot from its start on, and one more id in slots of others.

        Those ids and slots are `running`. Return the vectors `(ids, d_model)` of each text, for which the caller counts
        `cache.lengths`, and what `step_slots` returns for the others.
        """
        assert self._compiled is not None, "`reads_rows` says so"
        vectors, logits = self._compiled.read(chunks, slots, starts, cache, running=running)
        for slot in running[1]:
            cache.lengths[slot] += 1
        return vectors, self._capped(logits)

    def head(self, vectors: Tensor) -> Tensor:
        """Return the logits `(rows, vocab_size)` of vectors `(rows, d_model)` after the last block."""
        if self._compiled is not None:
            return self._capped(self._compiled.head(vectors))
        with self._threads_for(len(vectors)):
            if self.is_reproducible and len(vectors) == 1:
                return self._logits(vectors.expand(2, -1).contiguous())[:1]
            return self._logits(vectors)

    def step_slots(self, token_ids: list[int], slots: list[int], *, cache: DecoderCache) -> Tensor:
        """Read one more id in each of `slots`; return the logits after them, `(len(slots), vocab_size)`.

        With embedding bags these rows alone are computed; else all slots of the cache are, in fixed shapes, and what
        the others get is overwritten by their next ids.
        """
        step = self._step_all if self.steps_all_slots else self._step_some
        logits = step(token_ids, cache, slots)
        for slot in slots:
            cache.lengths[slot] += 1
        return logits

    @cached_property
    def steps_all_slots(self) -> bool:
        """Whether a step computes all slots of a cache, as always without embedding bags.

        Equal shapes give equal bits, so a reproducible decoder does it too where this machine's products of some rows
        are found to depend on their number.
        """
        if self._has_loops:
            return False
        return not self._uses_bags or (self.is_reproducible and not self._rows_are_independent())

    def take_findings(self, earlier: Decoder) -> None:
        """Take over what an earlier decoder of the same sizes has found out about this machine."""
        self.steps_all_slots = earlier.steps_all_slots
        self._has_loops = earlier._has_loops and self._compiled is not None
        self._compiled = self._compiled if self._has_loops else None

    @cached_property
    def _has_loops(self) -> bool:
        """Whether compiled steps work on this machine; they are compiled here, if they were not before."""
        if self._compiled is None:
            return False
        try:
            if self.is_reproducible:
                works = self._rows_are_independent()
            else:
                self._compiled([0], [0], self._allocate(1, 1, torch.empty))
                works = True
        except Exception as error:  # of many types: LLVM's, a full disk, a folder that cannot be written
            warn_once("the step of the model", reason_of(error))
            note_failure(reason_of(error))
            works = False
        self._compiled = self._compiled if works else None
        return works

    @torch.inference_mode()
    def _rows_are_independent(self) -> bool:
        """Return whether the logits of 1, 2, 3, 5, 17 and 32 rows have the bits that each row has alone."""
        dice = torch.Generator().manual_seed(0)
        num_slots, length = 32, min(self.context_length, 2 * KEY_BLOCK)
        cache = self._allocate(num_slots, length, torch.empty)
        for keys, values in cache.layers:
            keys.normal_(generator=dice)
            values.normal_(generator=dice)
        ids = torch.randint(self.vocab_size, (num_slots,), generator=dice).tolist()
        cache.lengths = torch.randint(length, (num_slots,), generator=dice).tolist()
        # A step writes what it reads, so it can be repeated.
        alone = torch.cat([self._step_some([token_id], cache, [slot]) for slot, token_id in enumerate(ids)])
        groups = [slice(0, 32), slice(15, 32), slice(10, 15), slice(7, 10), slice(5, 7)]
        slots = list(range(num_slots))
        vectors = torch.randn(num_slots, self._embedding.shape[1], generator=dice)
        heads = torch.cat([self.head(vector) for vector in torch.split(vectors, 1)])
        if self._compiled is not None:
            read, _ = self._compiled.read([[token_id] for token_id in ids], slots, cache.lengths, cache)
            if not torch.equal(self.head(torch.cat(read)), alone):
                return False
        return all(
            torch.equal(self._step_some(ids[some], cache, slots[some]), alone[some])
            and torch.equal(self.head(vectors[some]), heads[some])
            for some in groups
        )

    def _step_some(self, token_ids: list[int], cache: DecoderCache, slots: list[int]) -> Tensor:
        if self._compiled is not None:
            return self._capped(self._compiled(token_ids, slots, cache))
        with self._threads_for(min(len(slots), MOST_EQUAL_ROWS) if self.is_reproducible else len(slots)):  # a group
            return self._step_equal(token_ids, cache, slots)

    def _threads_for(self, rows: int) -> AbstractContextManager[None]:
        """Let one thread do what is so little that two would wait for each other; in int8 their number changes bits."""
        return at_most(1) if rows * self._num_products < _WORTH_THREADS and not self._is_int8 else nullcontext()

    def _step_equal(self, token_ids: list[int], cache: DecoderCache, slots: list[int]) -> Tensor:
        if not self.is_reproducible:
            return self._step_rows(token_ids, cache, slots)
        if len(slots) == 1:  # One row is summed in another order than two: take it twice.
            return self._step_rows(token_ids * 2, cache, slots * 2)[:1]
        parts = [slice(first, first + MOST_EQUAL_ROWS) for first in range(0, len(slots), MOST_EQUAL_ROWS)]
        if len(parts) == 1:
            return self._step_rows(token_ids, cache, slots)
        return torch.cat([self._step_equal(token_ids[part], cache, slots[part]) for part in parts])

    def _step_rows(self, token_ids: list[int], cache: DecoderCache, slots: list[int]) -> Tensor:
        ids = torch.tensor(token_ids, device=self.device)  # (rows)
        return self._logits(self._blocks(ids, SlotPositions(cache, slots), cache.layers))

    def _step_all(self, token_ids: list[int], cache: DecoderCache, slots: list[int]) -> Tensor:
        ids = torch.zeros(len(cache.lengths), 1, dtype=torch.int64)
        ids[slots, 0] = torch.tensor(token_ids)
        # A full row gets no more ids in this text, so its last place may be overwritten.
        places = [min(length, cache.max_length - 1) for length in cache.lengths]
        if self._captures:
            if cache.captured_step is None:
                cache.captured_step = CapturedStep(partial(self.step_at, cache=cache), places, self.device)
            logits = cache.captured_step(ids.to(self.device), places)
        else:
            logits = self.step_at(ids.to(self.device), torch.tensor(places, device=self.device), cache)
        return logits[slots]  # (len(slots), vocab_size)

    def _blocks(self, token_ids: Tensor, positions: NewPositions, layers: list[LayerKV]) -> Tensor:
        """Return the vectors after the last block, `(batch * seq, d_model)`; keys and values go to the cache."""
        rotation = None if self._rope is None else positions.rotation(self._rope)  # the same in all layers
        x = self._embedding.index_select(0, token_ids.reshape(-1)).to(self.dtype)  # (batch * seq, d_model)
        for layer, memory in zip(self._layers, layers, strict=True):
            x = layer(x, rotation, positions, memory)
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return self._capped(self._head(x if self._norm is None else self._norm(x)))  # (rows, vocab_size)

    def _capped(self, logits: Tensor) -> Tensor:
        return logits if self._soft_cap is None else by_rows(partial(soft_cap, cap=self._soft_cap), logits)


def check_known(hparams: Mapping[str, Any]) -> None:
    """Refuse a model with a setting that this module has not been taught: it would silently generate another text.

    Raises:
        ValueError: names each setting.
    """
    problems = [f"model.{name}" for name in sorted(hparams.keys() - _SETTINGS - _CHOICES.keys() - SAME_FUNCTION)]
    problems += [
        f"model.{name} = {hparams[name]!r}" for name, values in _CHOICES.items() if hparams[name] not in values
    ]
    if problems:
        raise ValueError(f"decoder: {', '.join(problems)} is not computed here yet; generate with the model itself")


def _stack(
    fused: list[Tensor], weights: list[Tensor], norm: Norm | None, *, int8: bool, reproducible: bool
) -> PackedLinear:
    """Pack the stacked weights `(out, in)`, with the gain of the norm before them multiplied in, unless with `int8`.

    A gain makes some columns greater than others, which then have few of the 8 bits' levels. What is packed is added to
    `fused`.
    """
    weight = torch.cat(weights)  # (sum of out, in)
    if norm is not None and not int8:  # W (g * x) = (W g) x, a column of W for each feature.
        weight = (upcast(weight) * norm.take_gain()).to(weight.dtype)
    fused.append(weight)
    return pack(weight, int8=int8, reproducible=reproducible)


def _count_products(weights: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Return how many numbers of a row are multiplied with a weight; the embedding counts where it is the head."""
    numbers = sum(each.numel() for group in weights.values() for each in group.values() if each.ndim == 2)
    return numbers - ("lm_head" in weights[""]) * weights[""]["token_embeddings"].numel()


def _group_by_layer(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the weights of each layer, by number, and of the rest, under "", without their ending `.weight`."""
    groups: dict[str, dict[str, Tensor]] = {"": {}}
    for name, weight in state.items():
        name = name.removesuffix(".weight")
        _, number, rest = name.split(".", 2) if name.startswith("layers.") else ("", "", name)
        groups.setdefault(number, {})[rest] = weight
    return groups


def _rotations(settings: ModelSettings, device: torch.device) -> Tensor | None:
    """Return the rotary embedding as complex numbers `(context_length, 1, d_head / 2)`, or None for none."""
    if settings.position == "none":
        return None
    length, scaling = settings.context_length, settings.rope_scaling
    rope = RotaryEmbedding(settings.rope_theta, settings.d_head, length, scaling=scaling, device=device)
    return torch.complex(rope.cos, rope.sin).unsqueeze(1)
