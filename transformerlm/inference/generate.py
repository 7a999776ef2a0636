"""The decoding loop over a KV cache: ids in, ids out. It knows no tokenizer.

`decode` is the loop. The other functions check what they are given, call it, and end each text at its end token.

A model reads at most `context_length` ids. A longer prompt is cut to its last `context_length` ids. When the window is
full during generation, its older half is dropped: the model reads the last `context_length // 2` ids again, from
position 0, and decoding goes on from there. Each such re-reading pays for half a window of further tokens.

Any `LanguageModel` will do: `TransformerLM` itself, or a `Decoder`, which computes the same faster, from
a copy of the weights. Import `Decoder` from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor

from transformerlm.inference.arguments import Ends, check_prompts, end_ids, generators_of
from transformerlm.inference.fast.batcher import Batcher
from transformerlm.inference.fast.decoder import Decoder
from transformerlm.inference.fast.prompt_lookup import decode as decode_speculatively
from transformerlm.inference.fast.ragged_rows import decode as decode_ragged_rows
from transformerlm.inference.sampling import SamplingParams, sample

__all__ = [
    "Batcher",
    "Decoder",
    "LanguageModel",
    "TokenIds",
    "decode",
    "generate",
    "generate_batch",
    "generate_prompts",
    "stream",
]

# To see whether all rows have ended, the host waits for the device: on a GPU it looks only every 16 steps.
_STEPS_BETWEEN_LOOKS = 16


class Cache(Protocol):
    """The keys and values of the ids that a model has read."""

    @property
    def length(self) -> int:
        """The number of ids read."""

    def reset(self) -> None:
        """Forget all ids; the memory is kept."""


CacheT = TypeVar("CacheT", bound=Cache)


class LanguageModel(Protocol[CacheT]):
    """What the loop needs of a model; `TransformerLM` and `Decoder` have it, each with its own kind of cache."""

    @property
    def vocab_size(self) -> int:
        """The number of ids."""

    @property
    def context_length(self) -> int:
        """The number of ids that the model can read at most."""

    @property
    def device(self) -> torch.device:
        """Where ids and generators must be."""

    def make_cache(self, batch_size: int, max_length: int | None = None) -> CacheT:
        """Return an empty cache for `batch_size` rows of at most `max_length` ids."""

    def __call__(self, token_ids: Tensor, *, cache: CacheT, last_only: bool = False) -> Tensor:
        """Read ids `(batch, seq)` after those in the cache; return the logits after each, `(batch, seq, vocab_size)`.

        `last_only` gives those after the last id alone, `(batch, 1, vocab_size)`.
        """


@torch.inference_mode()
def decode(
    model: LanguageModel[CacheT],
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    params: SamplingParams,
    generators: Sequence[torch.Generator | None],
    vocab_size: int | None = None,
) -> Iterator[Tensor]:
    """Yield the next ids `(batch)` of prompts of one length, `max_new_tokens` times.

    Only ids below `vocab_size` are drawn, by default the model's. `params` and `generators` are those of `sample`.
    """
    context_length, half = model.context_length, max(1, model.context_length // 2)
    # The last token drawn is never read, so it needs no room.
    cache = model.make_cache(len(prompts), min(context_length, len(prompts[0]) + max(0, max_new_tokens - 1)))
    window = torch.tensor([prompt[-context_length:] for prompt in prompts], device=model.device)  # (batch, seq)
    unread, drawn = window, []
    for _ in range(max_new_tokens):
        logits = model(unread, cache=cache, last_only=True)[:, -1]  # (batch, vocab)
        drawn.append(sample(logits[:, :vocab_size], params, generators))  # (batch)
        yield drawn[-1]
        if cache.length < context_length:
            unread = drawn[-1].unsqueeze(-1)  # (batch, 1): the cache has the rest
        else:  # the window is full: the last half of the text is read again, from position 0
            cache.reset()
            unread = torch.cat((window, torch.stack(drawn[-half:], dim=1)), dim=1)[:, -half:]  # (batch, half)


def decode_each(
    model: LanguageModel[CacheT],
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    params: SamplingParams,
    generators: Sequence[torch.Generator | None],
    vocab_size: int | None = None,
) -> Iterator[Tensor]:
    """Yield the next ids `(batch)` of prompts of any lengths, each decoded by itself; else as `decode`."""
    # hand-over: rows of different lengths side by side; None where the model is not one that fast/ knows
    together = decode_ragged_rows(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        params=params,
        generators=generators,
        vocab_size=vocab_size,
    )
    if together is not None:
        yield from together
        return
    one_row = partial(decode, model, max_new_tokens=max_new_tokens, params=params, vocab_size=vocab_size)
    each = list(generators) * (len(prompts) if len(generators) == 1 else 1)
    rows = [one_row([prompt], generators=[one]) for prompt, one in zip(prompts, each, strict=True)]
    for ids in zip(*rows, strict=True):  # a tensor (1) from each row
        yield torch.cat(ids)


def stream(
    model: LanguageModel[CacheT],
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    eos_token_id: Ends = None,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
    speculative: int = 0,
) -> Iterator[int]:
    """Yield the ids that follow `prompt_ids`, at most `max_new_tokens`, as they are drawn.

    Ends before `eos_token_id`, or the first of several, which is not yielded. Only ids below `vocab_size` are drawn, by
    default the model's (a model may have more ids than its tokenizer). `temperature` to `min_p` are those of
    `SamplingParams`; `generator` must be on the model's device. `speculative` drafts that many ids a step from the text
    so far and needs a `Decoder`; the ids have the same distribution, and with temperature 0 they are the same. Raises
    ValueError, at once, for an empty prompt, several rows of ids, or an id the model does not have.

    Eleven parameters: those who stream see each setting by its name.
    """
    prompts = check_prompts([prompt_ids], max_new_tokens=max_new_tokens, vocab_size=model.vocab_size)
    ends = end_ids(eos_token_id)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    # hand-over: several ids a step
    loop = partial(decode_speculatively, num_drafted=speculative) if speculative else decode
    steps = loop(
        model, prompts, max_new_tokens=max_new_tokens, params=params, generators=[generator], vocab_size=vocab_size
    )
    return _until(ends, (int(ids.item()) for ids in steps))


class SamplingKeywords(TypedDict, total=False):
    """The fields of `SamplingParams`, as keywords."""

    temperature: float
    top_k: int | None
    top_p: float
    min_p: float


class BatchKeywords(SamplingKeywords, total=False):
    """The keywords of `generate_prompts` beside the prompts and their number of tokens."""

    eos_token_id: Ends
    vocab_size: int | None
    generator: torch.Generator | Sequence[torch.Generator] | None


class StreamKeywords(SamplingKeywords, total=False):
    """The keywords of `stream` beside the prompt and its number of tokens."""

    eos_token_id: Ends
    vocab_size: int | None
    generator: torch.Generator | None
    speculative: int


class TokenIds(list[int]):
    """Ids as a list, with the `tolist` of a tensor or an array."""

    def tolist(self) -> list[int]:
        """Return the ids as a plain list."""
        return list(self)


def generate(
    model: LanguageModel[CacheT], prompt_ids: Sequence[int], *, max_new_tokens: int, **settings: Unpack[StreamKeywords]
) -> TokenIds:
    """Return the new ids, without the prompt; `settings` are the keywords of `stream`."""
    return TokenIds(stream(model, prompt_ids, max_new_tokens=max_new_tokens, **settings))


def generate_batch(
    model: LanguageModel[CacheT],
    prompt_ids: Sequence[int],
    *,
    num_samples: int,
    max_new_tokens: int,
    **settings: Unpack[BatchKeywords],
) -> list[list[int]]:
    """Return `num_samples` independent continuations of one prompt, decoded together; each ends before its own EOS.

    `settings` are the keywords of `generate_prompts`.
    """
    if num_samples < 1:
        raise ValueError(f"generate: num_samples must be at least 1, got {num_samples}")
    return generate_prompts(model, [prompt_ids] * num_samples, max_new_tokens=max_new_tokens, **settings)


def generate_prompts(
    model: LanguageModel[CacheT],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_id: Ends = None,
    vocab_size: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    **settings: Unpack[SamplingKeywords],
) -> list[list[int]]:
    """Return a continuation of each prompt, decoded together; each ends before its own EOS.

    Prompts may have different lengths; each continuation is the one that its prompt has alone. A generator for each
    prompt makes the draws of a row independent of the others too. `settings` are the fields of `SamplingParams`. Raises
    ValueError as `stream` does.
    """
    checked = check_prompts(prompts, max_new_tokens=max_new_tokens, vocab_size=model.vocab_size)
    ends, generators = end_ids(eos_token_id), generators_of(generator, len(checked))
    params = SamplingParams(**settings)
    loop = decode if len({len(prompt) for prompt in checked}) == 1 else decode_each
    columns: list[Tensor] = []
    ended = torch.zeros(len(checked), dtype=torch.bool, device=model.device)
    every = 1 if ended.device.type == "cpu" else _STEPS_BETWEEN_LOOKS
    for ids in loop(
        model, checked, max_new_tokens=max_new_tokens, params=params, generators=generators, vocab_size=vocab_size
    ):
        columns.append(ids)
        for end in ends:
            ended |= ids == end
        if ends and len(columns) % every == 0 and ended.all():
            break
    rows = torch.stack(columns, dim=1).tolist() if columns else [[] for _ in checked]
    return [list(_until(ends, iter(row))) for row in rows]


def _until(ends: frozenset[int], ids: Iterator[int]) -> Iterator[int]:
    """Yield the ids before the first of `ends`."""
    for token_id in ids:
        if token_id in ends:
            return
        yield token_id
