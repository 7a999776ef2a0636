"""The next token as `sampling.sample` chooses it, with less work: the filters on the few likeliest tokens alone.

Sorting 10,000 logits takes longer than a layer of a small model. Nearly always a few hundred of the likeliest tokens
hold the probability that top-p asks for; they are selected without sorting the rest, and only they are filtered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transformerlm.inference import sampling
from transformerlm.models.functional import softmax
from transformerlm.utils.dtypes import upcast

_FEW = (256, 2048)
_ROUNDING = 2e-6


@dataclass(frozen=True)
class Settings:
    """How the next token is chosen; raises ValueError for a parameter out of range."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        sampling.check_settings(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)


def distribution(logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor | None]:
    """Return the probabilities `(batch, kept)` that the settings leave, and the ids they belong to, likeliest first.

    With neither top-k nor top-p that is None: all ids in order. A temperature of 0 gives the likeliest id the
    probability 1. `logits` are `(batch, vocab)`.
    """
    logits = upcast(logits)
    if settings.temperature == 0.0:
        ids = logits.argmax(dim=-1, keepdim=True)
        return torch.ones_like(ids, dtype=torch.float32), ids
    scaled = sampling.apply_temperature(logits, settings.temperature)
    few = _few(scaled, settings)
    if few is not None:
        return few
    kept = sampling.top_p_filter(sampling.top_k_filter(scaled, settings.top_k), settings.top_p)
    probabilities = softmax(sampling.min_p_filter(kept, settings.min_p), dim=-1)
    if settings.top_k is None and settings.top_p == 1.0:
        return probabilities, None
    # In the order in which `_few` gives them: a row's draw must not depend on what its neighbours needed.
    return probabilities.sort(dim=-1, descending=True, stable=True)


def choose(logits: Tensor, settings: Settings, generators: Sequence[torch.Generator | None]) -> Tensor:
    """Draw one id a row from logits `(batch, vocab)`; returns int64 `(batch)`.

    Row i is drawn with `generators[i]` by one uniform number, so that it is the same in any batch; a single generator
    serves all rows. Temperature 0 draws nothing.
    """
    if settings.temperature == 0.0:
        return logits.argmax(dim=-1)
    probabilities, ids = distribution(logits, settings)
    drawn = pick(probabilities, uniform(len(logits), generators, logits.device))
    return drawn if ids is None else ids.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)


def pick(probabilities: Tensor, shares: Tensor) -> Tensor:
    """Return the index at which each row's sum of `probabilities` `(batch, n)` passes `shares` `(batch)`, in [0, 1)."""
    sums = probabilities.cumsum(dim=-1, dtype=shares.dtype)
    # right: the first index whose sum is greater, so never one whose probability is 0.
    return torch.searchsorted(sums, (shares * sums[:, -1]).unsqueeze(-1), right=True).squeeze(-1)


def uniform(count: int, generators: Sequence[torch.Generator | None], device: torch.device) -> Tensor:
    """Return `count` numbers in [0, 1): all from the one generator, or each from its own."""
    # fp64, as a number in [0, 1) of 53 bits stays below the whole sum when multiplied by it.
    place = {"device": device, "dtype": torch.float64 if device.type != "mps" else torch.float32}
    if len(generators) == 1:
        return torch.rand(count, generator=generators[0], **place)  # type: ignore[call-overload, no-any-return]
    return torch.cat([torch.rand(1, generator=each, **place) for each in generators])  # type: ignore[call-overload]


def _few(scaled: Tensor, settings: Settings) -> tuple[Tensor, Tensor | None] | None:
    """Return what `distribution` does from the likeliest tokens alone, or None where it takes all of them.

    It takes all where few of them are not enough, and where equal logits or rounding could decide which are kept.
    """
    top_k = settings.top_k
    if scaled.device.type != "cpu" or (top_k is None and settings.top_p == 1.0):
        return None  # Elsewhere a sort is quick, but to look at its result would wait for the device.
    for num_few in _FEW if top_k is None else (top_k,):
        if num_few >= scaled.shape[-1]:
            return None
        ids = scaled.topk(num_few, dim=-1).indices.sort(dim=-1).values
        # Equals in the order of their ids, as a stable sort of all has them.
        values, order = scaled.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(-1, order)
        if settings.top_p < 1.0:
            total = (scaled if top_k is None else values).logsumexp(dim=-1, keepdim=True)
            probabilities = torch.exp(values - total)
            before = probabilities.cumsum(dim=-1) - probabilities
            dropped = before >= settings.top_p
            dropped[:, 0] = False
            if top_k is None and not dropped[:, -1].all():
                continue
            equal = (dropped[:, 1:] != dropped[:, :-1]) & (values[:, 1:] == values[:, :-1])
            if bool((equal.any() | ((before - settings.top_p).abs() < _ROUNDING).any()).item()):
                return None
            values = values.masked_fill(dropped, -math.inf)
        return softmax(sampling.min_p_filter(values, settings.min_p), dim=-1), ids
    return None
