"""The decoding loop over a KV cache: ids in, ids out. It knows no tokenizer.

The model sees at most `context_length` ids. A longer prompt is cut to its last `context_length` ids. When the window is
full during generation, its older half is dropped: the last `context_length // 2` ids are read again, from position 0,
and decoding goes on from there. Each such re-reading pays for half a window of further tokens.

Everything here takes a `TransformerLM` or a `Decoder`, which is the same function made ready to generate: several times
as fast, but a copy of the weights as they were.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transformerlm.inference.fast.cache import DecoderCache
from transformerlm.inference.fast.decoder import Decoder
from transformerlm.inference.fast.prompt_lookup import decode_speculatively
from transformerlm.inference.fast.top_candidates import Settings, choose
from transformerlm.models.transformer import TransformerLM

Model = TransformerLM | Decoder
Choose = Callable[[Tensor], Tensor]
Ends = int | Collection[int] | None
"""The ids of which each ends a text; None: none does."""

# To see whether all rows have ended, the host waits for the device; on a GPU it asks this seldom.
_STEPS_BETWEEN_LOOKS = {"cpu": 1}
_FEW_LOOKS = 16


def stream(
    model: Model,
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
    default the model's (a model may have more ids than its tokenizer). The other parameters are those of
    `sampling.sample`; `generator` must be on the model's device. `speculative` drafts that many ids a step from the
    text so far and needs a `Decoder`; the ids have the same distribution, with temperature 0 they are the same. Raises
    ValueError, at once, for an empty prompt, several rows of ids, or an id the model does not have.
    """
    (prompt,) = _checked(model, [prompt_ids], max_new_tokens)
    ends = _ends(eos_token_id)
    settings = Settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if speculative:
        if not isinstance(model, Decoder):
            raise ValueError("generate: speculative decoding needs a Decoder, not the model itself: Decoder(model)")
        ids = decode_speculatively(
            model, prompt, max_new_tokens, speculative, settings, generator, vocab_size=vocab_size
        )
        return _until(ends, ids)
    pick = partial(_choose, vocab_size=vocab_size, settings=settings, generators=[generator])
    steps = _decode(model, [prompt], max_new_tokens, pick)
    return _until(ends, (int(ids.item()) for ids in steps))


class TokenIds(list[int]):
    """Ids as a list that is asked for its numbers as a tensor or an array is."""

    def tolist(self) -> list[int]:
        """Return the ids as a plain list."""
        return list(self)


def generate(model: Model, prompt_ids: Sequence[int], *, max_new_tokens: int, **settings: Any) -> TokenIds:
    """Return the new ids, without the prompt; `settings` are the keywords of `stream`."""
    return TokenIds(stream(model, prompt_ids, max_new_tokens=max_new_tokens, **settings))


def generate_batch(
    model: Model, prompt_ids: Sequence[int], *, num_samples: int, max_new_tokens: int, **settings: Any
) -> list[list[int]]:
    """Return `num_samples` independent continuations of one prompt, decoded together; each ends before its own EOS.

    `settings` are the keywords of `generate_prompts`.
    """
    if num_samples < 1:
        raise ValueError(f"generate: num_samples must be at least 1, got {num_samples}")
    return generate_prompts(model, [prompt_ids] * num_samples, max_new_tokens=max_new_tokens, **settings)


def generate_prompts(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_id: Ends = None,
    vocab_size: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    **settings: Any,
) -> list[list[int]]:
    """Return a continuation of each prompt, decoded together; each ends before its own EOS.

    Prompts may have different lengths; each continuation is the one its prompt has alone. A generator for each prompt
    makes the draws of a row independent of the others too. `settings` are the fields of `choice.Settings`. Raises
    ValueError as `stream` does.
    """
    checked, ends = _checked(model, prompts, max_new_tokens), _ends(eos_token_id)
    generators = list(generator) if isinstance(generator, Sequence) else [generator]
    if len(generators) not in (1, len(checked)):
        raise ValueError(f"generate: expected a generator for each of {len(checked)} prompts, got {len(generators)}")
    if isinstance(model, TransformerLM) and len({len(prompt) for prompt in checked}) > 1:
        model = Decoder(model)
    pick = partial(_choose, vocab_size=vocab_size, settings=Settings(**settings), generators=generators)
    columns: list[Tensor] = []
    ended = torch.zeros(len(checked), dtype=torch.bool, device=_device_of(model))
    every = _STEPS_BETWEEN_LOOKS.get(ended.device.type, _FEW_LOOKS)
    for ids in _decode(model, checked, max_new_tokens, pick):
        columns.append(ids)
        for end in ends:
            ended |= ids == end
        if ends and len(columns) % every == 0 and ended.all():
            break
    rows = torch.stack(columns, dim=1).tolist() if columns else [[] for _ in checked]
    return [list(_until(ends, iter(row))) for row in rows]


@torch.inference_mode()
def _decode(model: Model, prompts: list[list[int]], max_new_tokens: int, choose: Choose) -> Iterator[Tensor]:
    """Yield the next ids `(batch)` of the prompts, `max_new_tokens` times."""
    if not max_new_tokens:
        return
    context_length = model.context_length
    longest = max(len(prompt) for prompt in prompts)
    # The last token drawn is never read, so it needs no room.
    cache: Any = model.make_cache(len(prompts), min(context_length, longest + max_new_tokens - 1))
    logits = _read(model, [prompt[-context_length:] for prompt in prompts], cache)
    columns: list[Tensor] = []
    for _ in range(max_new_tokens - 1):
        columns.append(choose(logits))
        yield columns[-1]
        if cache.length < context_length:
            logits = model(columns[-1].unsqueeze(-1), cache=cache, last_only=True)[:, -1]
        else:
            logits = _slide(model, prompts, columns, cache)
    yield choose(logits)


def _read(model: Model, windows: list[list[int]], cache: Any) -> Tensor:
    """Return the logits `(batch, vocab_size)` after each window, read into an empty cache."""
    counts = [len(window) for window in windows]
    longest = max(counts)
    padded = [window + [0] * (longest - len(window)) for window in windows]
    ids = torch.tensor(padded, dtype=torch.int64, device=_device_of(model))
    if min(counts) == longest:
        logits: Tensor = model(ids, cache=cache, last_only=True)
    else:
        assert isinstance(model, Decoder), "the caller made one for prompts of different lengths"
        logits = model(ids, cache=cache, last_only=True, counts=counts)
    return logits[:, -1]


def _slide(model: Model, prompts: list[list[int]], columns: list[Tensor], cache: Any) -> Tensor:
    """Read the last half window of the rows that are full again; return the logits `(batch, vocab_size)`."""
    half = max(1, model.context_length // 2)
    new = torch.stack(columns[-half:], dim=1).tolist()
    windows = [(prompt + row)[-half:] for prompt, row in zip(prompts, new, strict=True)]
    if not isinstance(cache, DecoderCache) or cache.is_even:
        cache.reset()
        return _read(model, windows, cache)
    assert isinstance(model, Decoder), "only its cache has rows of different lengths"
    for row, length in enumerate(cache.lengths):
        if length == model.context_length:
            # All but the last id, which this row reads together with the others.
            if half > 1:
                _read(model, [windows[row][:-1]], cache.row(row))
            cache.lengths[row] = half - 1
    return model(columns[-1].unsqueeze(-1), cache=cache, last_only=True)[:, -1]


def _ends(eos_token_id: Ends) -> frozenset[int]:
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)


def _until(ends: frozenset[int], ids: Iterator[int]) -> Iterator[int]:
    for token_id in ids:
        if token_id in ends:
            return
        yield token_id


def _choose(logits: Tensor, *, vocab_size: int | None, settings: Settings, generators: list[Any]) -> Tensor:
    return choose(logits[:, :vocab_size], settings, generators)


def _device_of(model: Model) -> torch.device:
    return model.device if isinstance(model, Decoder) else model.token_embeddings.weight.device


def _checked(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """Return the prompts as plain lists; refuse a request that cannot be answered."""
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be at least 0, got {max_new_tokens}")
    if not len(prompts):
        raise ValueError("generate: expected at least one prompt, got none")
    checked = [_plain(prompt) for prompt in prompts]
    for prompt in checked:
        if not prompt:
            raise ValueError("generate: the prompt is empty; to start a new document pass the end-of-text token's id")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= model.vocab_size:
            found = low if low < 0 else high
            raise ValueError(f"generate: prompt id {found} is outside the model's vocab_size of {model.vocab_size}")
    return checked


def _whole(token_id: Any) -> int:
    if isinstance(token_id, bool) or not hasattr(token_id, "__index__"):
        raise TypeError(f"generate: expected ids, which are whole numbers, got {type(token_id).__name__} {token_id!r}")
    return operator.index(token_id)


def _plain(prompt: Any) -> list[int]:
    """Return one prompt's ids, from a list, an array or a tensor, as a list of numbers."""
    if isinstance(prompt, str | bytes):
        found = f"a {type(prompt).__name__}"
        raise TypeError(f"generate: expected ids, got {found}; encode it first, or use a Predictor, which takes text")
    if getattr(prompt, "ndim", 1) == 1:
        ids = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
        if not any(hasattr(one, "__len__") for one in ids):
            return [_whole(one) for one in ids]
    found = f"an array of shape {tuple(prompt.shape)}" if hasattr(prompt, "shape") else "lists in a list"
    raise ValueError(f"generate: expected a prompt in one row, got {found}; pass one row, or all to generate_prompts")
