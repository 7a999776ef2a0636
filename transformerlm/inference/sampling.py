"""From logits to the next token: how one is drawn, and the filters that come before the draw.

`sample` draws. It divides the logits by the temperature, lets top-k, top-p and min-p drop tokens, in this order, turns
what is left into probabilities, and draws with one uniform number a row. docs/sampling.md follows five tokens through
it. A filter takes logits `(..., vocab)`, sets those that it drops to -inf, and always keeps at least one token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transformerlm.models.functional import softmax
from transformerlm.utils.dtypes import upcast


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; raises ValueError when a parameter is out of range.

    A `temperature` of 0 takes the most likely token. `top_k` = None, `top_p` = 1 and `min_p` = 0 drop nothing.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"sampling: temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"sampling: top_k must be at least 1, got {self.top_k}")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"sampling: {name} must lie between 0 and 1, got {value}")
        if self.top_p == 0.0 and self.top_k is not None:
            raise ValueError(
                f"sampling: top_p = 0 keeps the likeliest token alone, so top_k = {self.top_k} would do nothing; "
                "top_p = 1 keeps all, temperature = 0 takes the likeliest token"
            )


def sample(
    logits: Tensor, params: SamplingParams | Sequence[SamplingParams], generators: Sequence[torch.Generator | None]
) -> Tensor:
    """Draw one id a row from logits `(batch, vocab)`; return int64 `(batch)`, -1 for a row that cannot be drawn from.

    `params` are those of all rows, or one for each. `generators[i]` gives row i its random number, so a row is drawn
    the same in any batch; a single generator serves all rows, and None is torch's global one. They must be on the
    logits' device. A row with temperature 0 takes no number. A row cannot be drawn from when it has a NaN or +inf, or
    nothing but -inf; the other rows do not notice.
    """
    rows = [params] * len(logits) if isinstance(params, SamplingParams) else list(params)
    probabilities = distribution(logits, rows)  # (batch, vocab)
    chosen = draw(probabilities, _shares(rows, generators, logits.device))
    return chosen.masked_fill(~logits.amax(dim=-1).isfinite(), -1)


def distribution(logits: Tensor, params: SamplingParams | Sequence[SamplingParams]) -> Tensor:
    """Return the probabilities `(batch, vocab)` that `sample` draws from, 0 where a filter dropped the id."""
    if isinstance(params, SamplingParams):
        return _filtered(upcast(logits), params)
    groups: dict[SamplingParams, list[int]] = {}
    for row, each in enumerate(params):
        groups.setdefault(each, []).append(row)
    if len(groups) == 1:
        return _filtered(upcast(logits), params[0])
    probabilities = torch.empty_like(upcast(logits))
    for each, rows in groups.items():
        indices = torch.tensor(rows, device=logits.device)
        probabilities[indices] = _filtered(upcast(logits[indices]), each)
    return probabilities


def _filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return the probabilities `(batch, vocab)` after the temperature and the three filters."""
    kept = top_k_filter(apply_temperature(logits, params.temperature), params.top_k)
    return softmax(min_p_filter(top_p_filter(kept, params.top_p), params.min_p), dim=-1)


def draw(probabilities: Tensor, shares: Tensor) -> Tensor:
    """Return where each row's cumulative sum of `probabilities` `(batch, n)` passes its share, as indices `(batch)`.

    This inverts the cumulative distribution: `shares` `(batch)`, uniform in [0, 1), give each index as often as its
    probability says.
    """
    sums = probabilities.cumsum(dim=-1, dtype=shares.dtype)  # (batch, n)
    # The last sum may miss 1 by rounding. right: the first sum that is greater, so never an id of probability 0.
    return torch.searchsorted(sums, (shares * sums[:, -1]).unsqueeze(-1), right=True).squeeze(-1)


def uniform(count: int, generators: Sequence[torch.Generator | None], device: torch.device) -> Tensor:
    """Return `count` numbers in [0, 1): all from the one generator, or each from its own."""
    # fp64: a number in [0, 1) of 53 bits stays below the whole sum when it is multiplied by that.
    dtype = torch.float64 if device.type != "mps" else torch.float32
    if len(generators) == 1:
        return torch.rand(count, generator=generators[0], device=device, dtype=dtype)
    return torch.cat([torch.rand(1, generator=each, device=device, dtype=dtype) for each in generators])


def _shares(
    params: Sequence[SamplingParams], generators: Sequence[torch.Generator | None], device: torch.device
) -> Tensor:
    """Return a number in [0, 1) for each row, 0 for those with temperature 0, which have one id to draw."""
    drawn = [row for row, each in enumerate(params) if each.temperature > 0.0]
    shares = torch.zeros(len(params), device=device, dtype=torch.float64 if device.type != "mps" else torch.float32)
    if drawn:
        own = generators if len(generators) == 1 else [generators[row] for row in drawn]
        shares[torch.tensor(drawn, device=device)] = uniform(len(drawn), own, device)
    return shares


# --- the filters -------------------------------------------------------------------------------------------------


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide the logits by `temperature`; at 0 only the most likely token (the first of equals) is left.

    Raises ValueError when it is negative.
    """
    SamplingParams(temperature=temperature)
    if temperature == 1.0:
        return logits
    if temperature == 0.0:
        return _keep(logits, logits.argmax(dim=-1, keepdim=True))
    # Differences to the maximum are at most 0, so they cannot overflow to +inf, however small the temperature is.
    # `tiny` prevents 0 / 0 where the temperature is 0 in fp32.
    return (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, torch.finfo(torch.float32).tiny)


def top_k_filter(logits: Tensor, top_k: int | None) -> Tensor:
    """Keep the `top_k` most likely tokens (Fan et al. 2018); None, or at least the vocabulary's size, keeps all.

    Exactly `top_k` are kept: of equals, the lower ids. Raises ValueError when it is below 1.
    """
    SamplingParams(top_k=top_k)
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    return _keep(logits, logits.sort(dim=-1, descending=True, stable=True).indices[..., :top_k])


def top_p_filter(logits: Tensor, top_p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities sum to `top_p` or more (Holtzman et al. 2020).

    1 keeps all, 0 the most likely one. Raises ValueError outside [0, 1].
    """
    SamplingParams(top_p=top_p)
    if top_p == 1.0:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = softmax(upcast(ordered), dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # the probability of all more likely tokens
    dropped = before >= top_p
    dropped[..., 0] = False  # with top_p = 0 too, one token stays
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)  # scatter: back to the order of the ids


def min_p_filter(logits: Tensor, min_p: float) -> Tensor:
    """Drop tokens less likely than `min_p` times the most likely one (Nguyen et al. 2024); 0 keeps all.

    Raises ValueError outside [0, 1].
    """
    SamplingParams(min_p=min_p)
    if min_p == 0.0:
        return logits
    # p < min_p * p_max, as logits: both probabilities have the same denominator, so it cancels.
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(min_p), -math.inf)


def _keep(logits: Tensor, indices: Tensor) -> Tensor:
    """Return the logits with -inf at all but `indices` `(..., kept)`."""
    return torch.full_like(logits, -math.inf).scatter(-1, indices, logits.gather(-1, indices))
