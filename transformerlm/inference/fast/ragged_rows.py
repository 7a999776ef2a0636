"""Decoding prompts of different lengths together, each row as if it were alone.

A `Decoder`'s cache has a length for each row. A row whose window is full re-reads its last half by itself, and then
joins the others' next step.

Twin of `decode`: `transformerlm.inference.generate.decode_each`
Test: tests/inference/fast/test_ragged_rows.py
Pays: 2.7x the tokens/s of eight prompts of 8 to 96 ids, in fp32 on one core, against one at a time (docs/LOG.md)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from transformerlm.inference.fast.cache import DecoderCache
from transformerlm.inference.fast.decoder import Decoder
from transformerlm.inference.sampling import SamplingParams, sample
from transformerlm.models.transformer import TransformerLM


def decode(
    model: object,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    params: SamplingParams,
    generators: Sequence[torch.Generator | None],
    vocab_size: int | None = None,
) -> Iterator[Tensor] | None:
    """Return an iterator over the next ids `(batch)` of the prompts, `max_new_tokens` times; None for another model.

    `model` is a `Decoder`, or a `TransformerLM`, of which a `Decoder` is made for this call.
    """
    if not isinstance(model, Decoder | TransformerLM):
        return None
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    return _decode(decoder, prompts, max_new_tokens, params, generators, vocab_size)


@torch.inference_mode()
def _decode(
    decoder: Decoder,
    prompts: list[list[int]],
    max_new_tokens: int,
    params: SamplingParams,
    generators: Sequence[torch.Generator | None],
    vocab_size: int | None,
) -> Iterator[Tensor]:
    context_length, longest = decoder.context_length, max(len(prompt) for prompt in prompts)
    # The last token drawn is never read, so it needs no room.
    cache = decoder.make_cache(len(prompts), min(context_length, longest + max(0, max_new_tokens - 1)))
    drawn: list[Tensor] = []
    for step in range(max_new_tokens):
        if step == 0:
            logits = _read(decoder, [prompt[-context_length:] for prompt in prompts], cache)
        elif cache.length < context_length:
            logits = decoder(drawn[-1].unsqueeze(-1), cache=cache, last_only=True)[:, -1]  # (batch, vocab)
        else:
            logits = _slide(decoder, prompts, drawn, cache)
        drawn.append(sample(logits[:, :vocab_size], params, generators))  # (batch)
        yield drawn[-1]


def _read(decoder: Decoder, windows: list[list[int]], cache: DecoderCache) -> Tensor:
    """Return the logits `(batch, vocab_size)` after each window, read into an empty cache."""
    counts = [len(window) for window in windows]
    longest = max(counts)
    padded = [window + [0] * (longest - len(window)) for window in windows]
    ids = torch.tensor(padded, dtype=torch.int64, device=decoder.device)  # (batch, longest)
    return decoder(ids, cache=cache, last_only=True, counts=counts)[:, -1]


def _slide(decoder: Decoder, prompts: list[list[int]], drawn: list[Tensor], cache: DecoderCache) -> Tensor:
    """Read the last half window of the rows that are full again; return the logits `(batch, vocab_size)`."""
    half = max(1, decoder.context_length // 2)
    new = torch.stack(drawn[-half:], dim=1).tolist()  # a list a row
    windows = [(prompt + row)[-half:] for prompt, row in zip(prompts, new, strict=True)]
    if cache.is_even:  # all rows are full
        cache.reset()
        return _read(decoder, windows, cache)
    for row, length in enumerate(cache.lengths):
        if length == decoder.context_length:
            # All but the last id, which this row reads together with the others.
            if half > 1:
                _read(decoder, [windows[row][:-1]], cache.row(row))
            cache.lengths[row] = half - 1
    return decoder(drawn[-1].unsqueeze(-1), cache=cache, last_only=True)[:, -1]
