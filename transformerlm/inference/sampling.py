"""From logits to the next token: pure functions that compose, each on logits `(..., vocab)`.

A filter sets the logits of the tokens it drops to -inf and always keeps at least one. `sample` applies them in this
order: temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transformerlm.models.functional import softmax
from transformerlm.utils.dtypes import upcast


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide the logits by `temperature`; at 0 only the likeliest token (the first of equals) is left.

    Raises ValueError when it is negative.
    """
    check_settings(temperature=temperature)
    if temperature == 1.0:
        return logits
    if temperature == 0.0:
        return _keep(logits, logits.argmax(dim=-1, keepdim=True))
    # Differences to the maximum cannot overflow towards +inf, however small the temperature; 0 / 0 is kept away.
    return (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, torch.finfo(torch.float32).tiny)


def top_k_filter(logits: Tensor, top_k: int | None) -> Tensor:
    """Keep the `top_k` likeliest tokens (Fan et al. 2018); None, or at least the vocabulary's size, keeps all.

    Exactly `top_k` are kept where several are equal. Raises ValueError when it is below 1.
    """
    check_settings(top_k=top_k)
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    return _keep(logits, logits.topk(top_k, dim=-1).indices)


def top_p_filter(logits: Tensor, top_p: float) -> Tensor:
    """Keep the fewest likeliest tokens whose probabilities sum to `top_p` or more (Holtzman et al. 2020).

    1 keeps all, 0 the likeliest one. Raises ValueError outside [0, 1].
    """
    check_settings(top_p=top_p)
    if top_p == 1.0:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = softmax(upcast(ordered), dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # the probability of all likelier tokens
    dropped = before >= top_p
    dropped[..., 0] = False
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)


def min_p_filter(logits: Tensor, min_p: float) -> Tensor:
    """Drop tokens less likely than `min_p` times the likeliest one (Nguyen et al. 2024); 0 keeps all.

    Raises ValueError outside [0, 1].
    """
    check_settings(min_p=min_p)
    if min_p == 0.0:
        return logits
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(min_p), -math.inf)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one id a row from logits `(batch, vocab)`; returns int64 `(batch)`.

    `generator` must be on the logits' device; None uses torch's global one, and temperature 0 draws nothing. Raises
    ValueError as `check_settings` does.
    """
    check_settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = apply_temperature(upcast(logits), temperature)
    logits = min_p_filter(top_p_filter(top_k_filter(logits, top_k), top_p), min_p)
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    return torch.multinomial(softmax(logits, dim=-1), num_samples=1, generator=generator).squeeze(-1)


def check_settings(
    *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0
) -> None:
    """Raise ValueError when a parameter is out of range, or `top_p` leaves nothing for `top_k` to choose."""
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"sampling: temperature must be at least 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"sampling: top_k must be at least 1, got {top_k}")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"sampling: {name} must lie between 0 and 1, got {value}")
    if top_p == 0.0 and top_k is not None:
        raise ValueError(
            f"sampling: top_p = 0 keeps the likeliest token alone, so top_k = {top_k} would do nothing; top_p = 1 "
            "keeps all, temperature = 0 takes the likeliest token"
        )


def _keep(logits: Tensor, indices: Tensor) -> Tensor:
    return torch.full_like(logits, -math.inf).scatter(-1, indices, logits.gather(-1, indices))
