"""What callers of `generate` hand over, checked and in one form: prompts, ids that end a text, generators."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch

Ends = int | Collection[int] | None
"""The ids of which each ends a text; None: none does."""


def check_prompts(prompts: Sequence[Sequence[int]], *, max_new_tokens: int, vocab_size: int) -> list[list[int]]:
    """Return the prompts as plain lists.

    Raises ValueError for a request that cannot be answered, and TypeError for what is not an id.
    """
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be at least 0, got {max_new_tokens}")
    if not len(prompts):
        raise ValueError("generate: expected at least one prompt, got none")
    checked = [_as_list(prompt) for prompt in prompts]
    for prompt in checked:
        if not prompt:
            raise ValueError("generate: the prompt is empty; to start a new document pass the end-of-text token's id")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= vocab_size:
            found = low if low < 0 else high
            raise ValueError(f"generate: prompt id {found} is outside the model's vocab_size of {vocab_size}")
    return checked


def end_ids(eos_token_id: Ends) -> frozenset[int]:
    """Return the ids that end a text as a set."""
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)


def generators_of(
    generator: torch.Generator | Sequence[torch.Generator] | None, num_prompts: int, device: torch.device
) -> list[torch.Generator | None]:
    """Return a generator for each prompt, on `device`; raise ValueError for any other number than one or one for each.

    One generator for several prompts gives each a seed for one of its own, so that no text depends on when the others
    end. None is torch's global one.
    """
    if isinstance(generator, Sequence):
        if len(generator) not in (1, num_prompts):
            raise ValueError(f"generate: expected a generator for each of {num_prompts} prompts, got {len(generator)}")
        if len(generator) == num_prompts:
            return list(generator)
        (generator,) = generator
    if num_prompts == 1:
        return [generator]
    seeds = torch.randint(2**63 - 1, (num_prompts,), generator=generator, device=device).tolist()
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


# What a caller may pass by mistake has any type, hence Any.


def _as_list(prompt: Any) -> list[int]:
    """Return one prompt's ids, from a list, an array or a tensor, as a list of numbers."""
    if isinstance(prompt, str | bytes):
        found = f"a {type(prompt).__name__}"
        raise TypeError(f"generate: expected ids, got {found}; encode it first, or use a Predictor, which takes text")
    if getattr(prompt, "ndim", 1) == 1:
        ids = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
        if not any(hasattr(one, "__len__") for one in ids):
            return [_as_int(one) for one in ids]
    found = f"an array of shape {tuple(prompt.shape)}" if hasattr(prompt, "shape") else "lists in a list"
    raise ValueError(f"generate: expected a prompt in one row, got {found}; pass one row, or all to generate_prompts")


def _as_int(token_id: Any) -> int:
    if isinstance(token_id, bool) or not hasattr(token_id, "__index__"):
        raise TypeError(f"generate: expected ids, which are whole numbers, got {type(token_id).__name__} {token_id!r}")
    return operator.index(token_id)
