"""The decoding loop over a KV cache: ids in, ids out. It knows no tokenizer.

`decode` is the loop. The other functions check what they are given, call it, and end each text at its end token.

A model reads at most `context_length` ids. A longer prompt is cut to its last `context_length` ids. When the window is
full during generation, its older half is dropped: the model reads the last `context_length // 2` ids again, from
position 0, and decoding goes on from there. Each such re-reading pays for half a window of further tokens.
Where the text begins with `start_id`, so does each window, in the place of one id (`requests.last_window`).

Any `LanguageModel` will do: `TransformerLM` itself, or a `Decoder`, which computes the same faster, from
a copy of the weights. Import `Decoder` from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Generic, Protocol, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor

from transformerlm.inference.arguments import Ends, check_prompts, end_ids, generators_of
from transformerlm.inference.fast.batcher import Batcher
from transformerlm.inference.fast.decoder import Decoder
from transformerlm.inference.fast.prompt_lookup import decode as decode_speculatively
from transformerlm.inference.penalties import Occurrences, Penalties, adjust
from transformerlm.inference.random_numbers import NUM_AHEAD, RandomNumbers
from transformerlm.inference.requests import Drawn, Finished, Request, last_window
from transformerlm.inference.sampling import sample
from transformerlm.inference.sampling_params import SamplingParams
from transformerlm.models.transformer import TransformerLM
from transformerlm.utils.plain_forms import may_hand_over

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

NOT_FINITE = "generate: expected finite logits from the model, found NaN or infinity; its weights may be damaged"
"""The error where no id can be drawn."""
PREFIX_BYTES = 64 * 2**20
"""What several samples of one prompt may take for its keys and values, so that it is read once."""


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
    start_id: int | None = None,
) -> Iterator[Tensor]:
    """Yield the next ids `(batch)` of prompts of one length, `max_new_tokens` times.

    Only ids below `vocab_size` are drawn, by default the model's. `params` and `generators` are those of `sample`,
    `start_id` is that of `last_window`. Numbers are drawn ahead, as a `Batcher` draws them: on a GPU, those drawn one
    by one would be others.
    """
    numbers = [RandomNumbers(generator, model.device) for generator in generators]
    context_length, half = model.context_length, max(1, model.context_length // 2)
    # The last token drawn is never read, so it needs no room.
    cache = model.make_cache(len(prompts), min(context_length, len(prompts[0]) + max(0, max_new_tokens - 1)))
    windows = [last_window(prompt, context_length, start_id) for prompt in prompts]
    unread, drawn = torch.tensor(windows, device=model.device), []  # (batch, seq)
    for _ in range(max_new_tokens):
        logits = model(unread, cache=cache, last_only=True)[:, -1]  # (batch, vocab)
        drawn.append(sample(logits[:, :vocab_size], params, numbers))  # (batch)
        yield drawn[-1]
        if cache.length < context_length:
            unread = drawn[-1].unsqueeze(-1)  # (batch, 1): the cache has the rest
        else:  # the window is full: the last half of the text is read again, from position 0
            cache.reset()
            latest = torch.stack(drawn[-half:], dim=1).tolist()
            texts = [[*prompt, *new] for prompt, new in zip(prompts, latest, strict=True)]  # without what is long past
            unread = torch.tensor([last_window(text, half, start_id) for text in texts], device=model.device)


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
    penalties: Penalties | None = None,
    min_tokens: int = 0,
    start_id: int | None = None,
) -> Iterator[int]:
    """Yield the ids that follow `prompt_ids`, at most `max_new_tokens`, as they are drawn.

    Ends before `eos_token_id`, or the first of several, which is not yielded, nor drawn before `min_tokens` others.
    Only ids below `vocab_size` are drawn, by default the model's (a model may have more ids than its tokenizer).
    `temperature` to `min_p` are those of `SamplingParams`; `generator` must be on the model's device. `speculative`
    drafts that many ids a step, at most 64, from the text so far and needs a `Decoder`; the ids have the same
    distribution, and with temperature 0 they are the same. Raises ValueError, at once, for an empty prompt, several
    rows of ids, an id the model does not have, more drafts, or drafts with penalties.

    A model that never saw text without an id before it has that as `start_id`: where the prompt begins with it, so does
    what is read again of a text that is longer than the context.

    Fourteen parameters: those who stream see each setting by its name.
    """
    prompts = check_prompts([prompt_ids], max_new_tokens=max_new_tokens, vocab_size=model.vocab_size)
    ends = end_ids(eos_token_id)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    settings: DecodeKeywords = {
        "max_new_tokens": max_new_tokens, "params": params, "generators": [generator], "vocab_size": vocab_size,
        "start_id": start_id,
    }  # fmt: skip
    if not 0 <= speculative <= NUM_AHEAD:  # the numbers of refused drafts are put back
        raise ValueError(f"generate: speculative must lie between 0 and {NUM_AHEAD}, got {speculative}")
    penalties = Penalties() if penalties is None else penalties
    if Occurrences.needed(penalties, min_tokens=min_tokens):
        if speculative:
            raise ValueError(
                "generate: speculative decoding knows no penalties and no min_tokens; use one or the other"
            )
        occurrences = Occurrences(prompts[0], penalties, ends=ends, min_tokens=min_tokens)
        changed = _Changed(model, occurrences)
        return _until(ends, changed.told(int(ids.item()) for ids in decode(changed, prompts, **settings)))
    # hand-over: several ids a step
    loop = partial(decode_speculatively, num_drafted=speculative) if speculative else decode
    return _until(ends, (int(ids.item()) for ids in loop(model, prompts, **settings)))


class _Changed(Generic[CacheT]):
    """A model of which the logits of one text's next id are changed by what occurred in it."""

    def __init__(self, model: LanguageModel[CacheT], occurrences: Occurrences) -> None:
        self._model, self._occurrences = model, occurrences
        self.vocab_size, self.context_length, self.device = model.vocab_size, model.context_length, model.device
        self.make_cache = model.make_cache

    def __call__(self, token_ids: Tensor, *, cache: CacheT, last_only: bool = False) -> Tensor:
        """Return the changed logits after the last id, `(1, 1, vocab_size)`."""
        logits = self._model(token_ids, cache=cache, last_only=True)[:, -1]  # (1, vocab)
        return adjust(logits, [self._occurrences]).unsqueeze(1)

    def told(self, ids: Iterator[int]) -> Iterator[int]:
        """Yield the ids, each counted before the next is drawn."""
        for token_id in ids:
            self._occurrences.add(token_id)
            yield token_id


class SamplingKeywords(TypedDict, total=False):
    """The fields of `SamplingParams`, as keywords."""

    temperature: float
    top_k: int | None
    top_p: float
    min_p: float


class DecodeKeywords(TypedDict):
    """The keywords of `decode`."""

    max_new_tokens: int
    params: SamplingParams
    generators: Sequence[torch.Generator | None]
    vocab_size: int | None
    start_id: int | None


class BatchKeywords(SamplingKeywords, total=False):
    """The keywords of `generate_prompts` beside the prompts and their number of tokens."""

    penalties: Penalties | None
    min_tokens: int
    eos_token_id: Ends
    vocab_size: int | None
    generator: torch.Generator | Sequence[torch.Generator] | None
    start_id: int | None


class StreamKeywords(SamplingKeywords, total=False):
    """The keywords of `stream` beside the prompt and its number of tokens."""

    eos_token_id: Ends
    vocab_size: int | None
    generator: torch.Generator | None
    speculative: int
    penalties: Penalties | None
    min_tokens: int
    start_id: int | None


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

    `settings` are the keywords of `generate_prompts`, which copies the weights of a `TransformerLM` at each call.
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
    penalties: Penalties | None = None,
    min_tokens: int = 0,
    start_id: int | None = None,
    **settings: Unpack[SamplingKeywords],
) -> list[list[int]]:
    """Return a continuation of each prompt, decoded together; each ends before its own EOS.

    Prompts may have different lengths; each continuation is the one that its prompt has alone. A generator for each
    prompt makes the draws of a row independent of the others too. `start_id` is that of `stream`, and `settings` are
    the fields of `SamplingParams`.

    The weights of a `TransformerLM` are copied into a `Decoder` at each call, since they may have changed: that takes
    their memory once more, and time. Who calls more than once makes the `Decoder`, and passes that. Raises ValueError
    as `stream` does.
    """
    checked = check_prompts(prompts, max_new_tokens=max_new_tokens, vocab_size=model.vocab_size)
    generators = generators_of(generator, len(checked), model.device)
    requests = [
        Request(
            request_id=str(number),
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            sampling=SamplingParams(**settings),
            penalties=Penalties() if penalties is None else penalties,
            generator=generators[number],
            ends=end_ids(eos_token_id),
            min_tokens=min_tokens,
            start_id=start_id,
        )
        for number, prompt in enumerate(checked)
    ]
    if isinstance(model, Decoder):
        return _generate_together(model, requests, vocab_size)
    if isinstance(model, TransformerLM) and may_hand_over():
        # hand-over: texts side by side, by a copy of the weights
        return _generate_together(Decoder(model), requests, vocab_size)
    return [answer(model, request, vocab_size=vocab_size) for request in requests]


def answer(model: LanguageModel[CacheT], request: Request, *, vocab_size: int | None = None) -> list[int]:
    """Return the ids of one request by the plain loop: what a `Batcher` gives it beside others."""
    sampling = request.sampling
    ids = stream(
        model,
        request.prompt,
        max_new_tokens=request.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        eos_token_id=request.ends,
        vocab_size=vocab_size,
        generator=request.generator,
        penalties=request.penalties,
        min_tokens=request.min_tokens,
        start_id=request.start_id,
    )
    return list(ids)


def _generate_together(decoder: Decoder, requests: list[Request], vocab_size: int | None) -> list[list[int]]:
    longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
    # A reproducible text must not depend on the cache's shape, which the longest of its neighbours would choose.
    max_length = None if decoder.is_reproducible else longest
    batcher = Batcher(
        decoder,
        slots=len(requests),
        prefix_cache_bytes=PREFIX_BYTES,
        vocab_size=vocab_size,
        max_length=max_length,
        reads_first=True,
    )
    rows: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        batcher.submit(request)
    while not batcher.is_idle:
        for event in batcher.step():
            if isinstance(event, Drawn):
                rows[event.request_id].append(event.token_id)
            if isinstance(event, Finished) and event.reason == "error":
                raise ValueError(NOT_FINITE)
    return list(rows.values())


def _until(ends: frozenset[int], ids: Iterator[int]) -> Iterator[int]:
    """Yield the ids before the first of `ends`."""
    for token_id in ids:
        if token_id in ends:
            return
        if token_id < 0:
            raise ValueError(NOT_FINITE)
        yield token_id
