"""The decoding loop over a KV cache: ids in, ids out. It knows no tokenizer.

The model sees at most `context_length` ids. A longer prompt is cut to its last `context_length` ids. When the window is
full during generation, its older half is dropped: the last `context_length // 2` ids are read again, from position 0,
and decoding goes on from there. Each such re-reading pays for half a window of further tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transformerlm.inference.sampling import check_settings, sample
from transformerlm.models.transformer import TransformerLM

Choose = Callable[[Tensor], Tensor]


def stream(
    model: TransformerLM,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    eos_token_id: int | None = None,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield the ids that follow `prompt_ids`, at most `max_new_tokens`, as they are drawn.

    Ends before `eos_token_id`, which is not yielded. Only ids below `vocab_size` are drawn, by default the model's (a
    model may have more ids than its tokenizer). The other parameters are those of `sampling.sample`; `generator` must
    be on the model's device. Raises ValueError, at once, for an empty prompt or an id the model does not have.
    """
    prompt = _prompt_tensor(model, prompt_ids, max_new_tokens, num_samples=1)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "generator": generator}
    check_settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    steps = _decode(model, prompt, max_new_tokens, partial(_choose, vocab_size=vocab_size, settings=settings))
    return _until(eos_token_id, (int(ids.item()) for ids in steps))


def generate(model: TransformerLM, prompt_ids: Sequence[int], *, max_new_tokens: int, **settings: Any) -> list[int]:
    """Return the new ids, without the prompt; `settings` are the keywords of `stream`."""
    return list(stream(model, prompt_ids, max_new_tokens=max_new_tokens, **settings))


def generate_batch(
    model: TransformerLM,
    prompt_ids: Sequence[int],
    *,
    num_samples: int,
    max_new_tokens: int,
    eos_token_id: int | None = None,
    vocab_size: int | None = None,
    **settings: Any,
) -> list[list[int]]:
    """Return `num_samples` independent continuations of one prompt, decoded together; each ends before its own EOS.

    `settings` are the keywords of `sampling.sample`. Raises ValueError as `stream` does.
    """
    prompt = _prompt_tensor(model, prompt_ids, max_new_tokens, num_samples=num_samples)
    columns: list[list[int]] = []
    running = set(range(num_samples))
    for ids in _decode(model, prompt, max_new_tokens, partial(_choose, vocab_size=vocab_size, settings=settings)):
        columns.append(ids.tolist())
        running -= {row for row in running if columns[-1][row] == eos_token_id}
        if not running:
            break
    return [list(_until(eos_token_id, (column[row] for column in columns))) for row in range(num_samples)]


@torch.inference_mode()
def _decode(model: TransformerLM, prompt: Tensor, max_new_tokens: int, choose: Choose) -> Iterator[Tensor]:
    """Yield the next ids `(batch)` of each row of `prompt` `(batch, seq)`, `max_new_tokens` times."""
    context_length = model.context_length
    batch_size, prompt_length = prompt.shape
    # The last token drawn is never read, so it needs no room.
    cache = model.make_cache(batch_size, min(context_length, max(1, prompt_length + max_new_tokens - 1)))
    ids, unread = prompt, prompt[:, -context_length:]
    for index in range(max_new_tokens):
        logits = model(unread, cache=cache, last_only=True)[:, -1]
        unread = choose(logits).unsqueeze(-1)  # (batch, 1)
        yield unread.squeeze(-1)
        ids = torch.cat((ids, unread), dim=1)[:, -context_length:]
        if cache.length == context_length and index + 1 < max_new_tokens:
            cache.reset()
            unread = ids[:, -max(1, context_length // 2) :]


def _until(eos_token_id: int | None, ids: Iterator[int]) -> Iterator[int]:
    for token_id in ids:
        if token_id == eos_token_id:
            return
        yield token_id


def _choose(logits: Tensor, *, vocab_size: int | None, settings: dict[str, Any]) -> Tensor:
    return sample(logits[:, :vocab_size], **settings)


def _prompt_tensor(model: TransformerLM, prompt_ids: Sequence[int], max_new_tokens: int, *, num_samples: int) -> Tensor:
    """Check the request and return the prompt, `(num_samples, seq)`."""
    for name, value, least in (("max_new_tokens", max_new_tokens, 0), ("num_samples", num_samples, 1)):
        if value < least:
            raise ValueError(f"generate: {name} must be at least {least}, got {value}")
    if not len(prompt_ids):
        raise ValueError("generate: the prompt is empty; to start a new document pass the end-of-text token's id")
    low, high = min(prompt_ids), max(prompt_ids)
    if low < 0 or high >= model.vocab_size:
        found = low if low < 0 else high
        raise ValueError(f"generate: prompt id {found} is outside the model's vocab_size of {model.vocab_size}")
    device = model.token_embeddings.weight.device
    return torch.tensor([list(prompt_ids)], dtype=torch.int64, device=device).repeat(num_samples, 1)
