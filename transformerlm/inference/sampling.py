"""From logits to the next token: the filters, and how one token is drawn from what they leave.

`sample` draws. It divides the logits by the temperature, lets top-k, top-p and min-p drop tokens, in this order, turns
what is left into probabilities, and draws with one uniform number a row. docs/sampling.md follows five tokens through
it. A filter takes logits `(..., vocab)`, sets those that it drops to -inf, and always keeps at least one token. Where
two tokens are equally likely, the lower id comes first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from transformerlm.inference.fast.choice import choose as fast_choose
from transformerlm.inference.random_numbers import Generators, uniform
from transformerlm.inference.row_sums import row_sums, sums_dtype
from transformerlm.inference.sampling_params import SamplingParams
from transformerlm.utils.dtypes import upcast
from transformerlm.utils.plain_forms import may_hand_over


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide the logits by `temperature`; at 0 only the most likely token (the first of equals) is left.

    Raises ValueError when it is negative.
    """
    SamplingParams(temperature=temperature)  # raises ValueError where it is out of range
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
    SamplingParams(top_k=top_k)  # raises ValueError where it is out of range
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    return _keep(logits, _weights(logits).sort(dim=-1, descending=True, stable=True).indices[..., :top_k])


def top_p_filter(logits: Tensor, top_p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities sum to `top_p` or more (Holtzman et al. 2020).

    1 keeps all, 0 the most likely one. Raises ValueError outside [0, 1].
    """
    SamplingParams(top_p=top_p)  # raises ValueError where it is out of range
    if top_p == 1.0:
        return logits
    weights = _weights(logits)
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1, dtype=sums_dtype(logits.device)) - ordered  # of all more likely tokens
    dropped = before >= top_p * row_sums(weights).unsqueeze(-1)
    dropped[..., 0] = False  # with top_p = 0 too, one token stays
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)  # scatter: back to the order of the ids


def min_p_filter(logits: Tensor, min_p: float) -> Tensor:
    """Drop tokens less likely than `min_p` times the most likely one (Nguyen et al. 2024); 0 keeps all.

    Raises ValueError outside [0, 1].
    """
    SamplingParams(min_p=min_p)  # raises ValueError where it is out of range
    if min_p == 0.0:
        return logits
    return logits.masked_fill(_weights(logits) < min_p, -math.inf)


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return where each row's cumulative sum of `weights` `(batch, n)` passes its part of their sum, as `(batch)`.

    This inverts the cumulative distribution: `uniforms` `(batch)`, uniform in [0, 1), give each index as often as its
    weight says. Weights are probabilities, or in proportion to them.
    """
    sums = weights.cumsum(dim=-1, dtype=uniforms.dtype)  # (batch, n)
    # right: the first sum that is greater, so never an id of weight 0.
    places = torch.searchsorted(sums, (uniforms * sums[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    return places.clamp_max(weights.shape[-1] - 1)  # which only a row with a NaN exceeds


def sample(logits: Tensor, params: SamplingParams | Sequence[SamplingParams], generators: Generators) -> Tensor:
    """Draw one id a row from logits `(batch, vocab)`; return int64 `(batch)`, -1 for a row that cannot be drawn from.

    `params` are those of all rows, or one for each. `generators[i]` gives row i its random number, so a row is drawn
    the same in any batch; a single generator serves all rows, and None is torch's global one. They must be on the
    logits' device. A row with temperature 0 takes no number. A row with a NaN or +inf, or with nothing but -inf, cannot
    be drawn from; the other rows do not notice.
    """
    rows = [params] * len(logits) if isinstance(params, SamplingParams) else list(params)
    drawn = [row for row, each in enumerate(rows) if each.temperature > 0.0]
    if len(drawn) == len(rows):
        return choose(logits, rows, uniform(len(rows), generators, logits.device))
    uniforms = torch.zeros(len(rows), device=logits.device, dtype=sums_dtype(logits.device))
    if drawn:
        own = generators if len(generators) == 1 else [generators[row] for row in drawn]
        uniforms[torch.tensor(drawn, device=logits.device)] = uniform(len(drawn), cast(Generators, own), logits.device)
    return choose(logits, rows, uniforms)


def choose(logits: Tensor, params: Sequence[SamplingParams], uniforms: Tensor) -> Tensor:
    """Return the id that each row's number falls to, as `sample` does; `uniforms` `(batch)` lie in [0, 1)."""
    # hand-over: the same without sorting ids; None on a GPU
    ids = fast_choose(logits, params, uniforms) if may_hand_over() else None
    if ids is not None:
        return ids
    groups: dict[SamplingParams, list[int]] = {}
    for row, each in enumerate(params):
        groups.setdefault(each, []).append(row)
    ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for each, members in groups.items():
        rows = torch.tensor(members, device=logits.device)
        ids[rows] = _choose(logits[rows], each, uniforms[rows])
    return ids.masked_fill(~logits.amax(dim=-1).isfinite(), -1)


def _choose(logits: Tensor, params: SamplingParams, uniforms: Tensor) -> Tensor:
    """Return the ids of rows with the same settings."""
    if params.temperature == 0.0:
        return logits.argmax(dim=-1)
    kept = top_k_filter(apply_temperature(upcast(logits), params.temperature), params.top_k)
    weights = _weights(min_p_filter(top_p_filter(kept, params.top_p), params.min_p))
    if params.top_k is None and params.top_p == 1.0:
        return draw(weights, uniforms)
    # Most likely ids first: the order in which the fast form has them.
    ordered, ids = weights.sort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, draw(ordered, uniforms).unsqueeze(-1)).squeeze(-1)


def _weights(logits: Tensor) -> Tensor:
    """Return the probabilities, in at least fp32, divided by that of the most likely token.

    Not `softmax`: to divide by their sum would round, and in a batch the sums must be those of `row_sums`.
    """
    wide = upcast(logits)
    return torch.exp(wide - wide.amax(dim=-1, keepdim=True))


def _keep(logits: Tensor, indices: Tensor) -> Tensor:
    """Return the logits with -inf at all but `indices` `(..., kept)`."""
    return torch.full_like(logits, -math.inf).scatter(-1, indices, logits.gather(-1, indices))
