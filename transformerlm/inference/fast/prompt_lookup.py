"""Speculative decoding without a second model: ids that followed the same words before are proposed again.

Leviathan et al. (2023) check several proposed ids in one pass of the model, which reads the weights once for all of
them. The proposal is prompt lookup: where the last few ids stood earlier in the text, what came after them is likely
now. It is deterministic, so the rule of acceptance is short: take the proposed id with its probability p; where it is
refused, draw from the other ids, whose probabilities are divided by 1 - p. An id x that was not proposed has the
chance (1 - p) * p(x) / (1 - p) = p(x): the distribution is that of plain sampling.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from transformerlm.inference.fast.cache import DecoderCache
from transformerlm.inference.fast.decoder import Decoder
from transformerlm.inference.fast.top_candidates import Settings, distribution, pick, uniform

_LONGEST, _SHORTEST = 4, 2


class Lookup:
    """Finds where the last ids of a text stood before; longer matches are tried first, and the latest one wins."""

    def __init__(self, ids: list[int]) -> None:
        self.ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        for token_id in ids:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """Add one id behind the text."""
        # The n-grams that end before this id: those that end the text now would only find themselves.
        end = len(self.ids)
        for size in range(_SHORTEST, min(_LONGEST, end) + 1):
            self._ends[tuple(self.ids[end - size :])] = end
        self.ids.append(token_id)

    def propose(self, count: int) -> list[int]:
        """Return at most `count` ids that followed the same ids before."""
        for size in range(min(_LONGEST, len(self.ids)), _SHORTEST - 1, -1):
            end = self._ends.get(tuple(self.ids[-size:]))
            if end is not None:
                return self.ids[end : end + count]
        return []


@torch.inference_mode()
def decode_speculatively(
    decoder: Decoder,
    prompt: list[int],
    max_new_tokens: int,
    num_drafted: int,
    settings: Settings,
    generator: torch.Generator | None,
    *,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Yield `max_new_tokens` ids after `prompt`, checking up to `num_drafted` proposed ids in one pass."""
    context_length, half = decoder.context_length, max(1, decoder.context_length // 2)
    cache = decoder.make_cache(1, min(context_length, len(prompt) + max_new_tokens + num_drafted))
    lookup, unread = Lookup(prompt), prompt[-context_length:]
    remaining = max_new_tokens
    while remaining > 0:
        room = cache.max_length - cache.length - len(unread)
        draft = lookup.propose(min(num_drafted, remaining - 1, room))
        draft = draft[: next((i for i, each in enumerate(draft) if each >= (vocab_size or decoder.vocab_size)), None)]
        logits = _read(decoder, unread, draft, cache)[:, :vocab_size]
        accepted = _check_draft(logits, draft, settings, generator)
        # The refused ids are in the cache; the next pass writes over them.
        cache.truncate(cache.length - (len(draft) - len(accepted) + 1))
        for token_id in accepted:
            lookup.append(token_id)
            yield token_id
        remaining -= len(accepted)
        unread = accepted[-1:]
        if cache.length == context_length:
            cache.reset()
            unread = lookup.ids[-half:]


def _read(decoder: Decoder, unread: list[int], draft: list[int], cache: DecoderCache) -> Tensor:
    """Read the ids and return the logits `(len(draft) + 1, vocab_size)` after the last of `unread` and each drafted."""
    if draft and len(unread) > 1:
        decoder(torch.tensor([unread[:-1]], device=decoder.device), cache=cache, last_only=True)
        unread = unread[-1:]
    return decoder(torch.tensor([unread + draft], device=decoder.device), cache=cache, last_only=not draft)[0]


def _check_draft(logits: Tensor, draft: list[int], settings: Settings, generator: torch.Generator | None) -> list[int]:
    """Return the drafted ids that are taken and one more: at the first refusal another, or one behind them all."""
    if settings.temperature == 0.0:
        likeliest: list[int] = logits.argmax(dim=-1).tolist()
        agreed = next(
            (i for i, (ours, theirs) in enumerate(zip(likeliest, draft, strict=False)) if ours != theirs), len(draft)
        )
        return likeliest[: agreed + 1]
    probabilities, ids = distribution(logits, settings)
    shares = uniform(2 * len(draft) + 2, [generator], logits.device).view(-1, 2)
    for index, token_id in enumerate(draft):
        row, row_ids = probabilities[index], None if ids is None else ids[index]
        place = (
            torch.tensor([token_id], device=row.device) if row_ids is None else (row_ids == token_id).nonzero()[:, 0]
        )
        chance = float(row[place].sum())
        row[place] = 0.0
        # With no other id left, only rounding keeps the chance below 1.
        if float(shares[index, 0]) >= chance and bool(row.any()):
            return [*draft[:index], _pick_id(row, row_ids, shares[index, 1])]
    last = len(draft)
    return [*draft, _pick_id(probabilities[last], None if ids is None else ids[last], shares[last, 1])]


def _pick_id(probabilities: Tensor, ids: Tensor | None, share: Tensor) -> int:
    drawn = pick(probabilities.unsqueeze(0), share.unsqueeze(0))
    return int(drawn) if ids is None else int(ids[drawn])
