"""From logits to the next token: how one is drawn, and the filters that come before the draw.

`sample` draws. It divides the logits by the temperature, lets top-k, top-p and min-p drop tokens, in this order, turns
what is left into probabilities, and draws with one uniform number a row. docs/sampling.md follows five tokens through
it. A filter takes logits `(..., vocab)`, sets those that it drops to -inf, and always keeps at least one token. Where
two tokens are equally likely, the lower id comes first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from transformerlm.inference.fast.choice import choose as fast_choose
from transformerlm.inference.row_sums import row_sums
from transformerlm.utils.dtypes import upcast
from transformerlm.utils.plain_forms import may_hand_over

NUM_AHEAD = 64
"""How many random numbers are drawn at once, and how many of them can be put back at most."""


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
                f"sampling: top_p = 0 keeps the most likely token alone, so top_k = {self.top_k} would do nothing; "
                "top_p = 1 keeps all, temperature = 0 takes the most likely token"
            )


class RandomNumbers:
    """The numbers of a generator in [0, 1), one at a time, as it gives them, but drawn 64 ahead.

    A call of torch takes longer than 64 numbers do. `generator` must be on `device`, which is that of the logits.
    """

    def __init__(self, generator: torch.Generator | None, device: torch.device) -> None:
        self._draw = partial(torch.rand, NUM_AHEAD, generator=generator, device=device, dtype=_sums_dtype(device))
        self._numbers: list[float] = []
        self._next = 0

    def take(self) -> float:
        """Return the next number."""
        if self._next == len(self._numbers):
            # Those before are kept for `put_back`.
            self._numbers, self._next = (
                [*self._numbers[-NUM_AHEAD:], *self._draw().tolist()],
                min(self._next, NUM_AHEAD),
            )
        self._next += 1
        return self._numbers[self._next - 1]

    def put_back(self, count: int) -> None:
        """Give the last `count` numbers, at most 64, again."""
        assert 0 <= count <= min(self._next, NUM_AHEAD), (count, self._next)
        self._next -= count


Generators = Sequence[torch.Generator | None] | Sequence[RandomNumbers]
"""Where numbers come from: one for each row, or one for all; None is torch's global generator."""


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
    shares = torch.zeros(len(rows), device=logits.device, dtype=_sums_dtype(logits.device))
    if drawn:
        own = generators if len(generators) == 1 else [generators[row] for row in drawn]
        shares[torch.tensor(drawn, device=logits.device)] = uniform(len(drawn), cast(Generators, own), logits.device)
    return choose(logits, rows, shares)


def choose(logits: Tensor, params: Sequence[SamplingParams], shares: Tensor) -> Tensor:
    """Return the id of each row that its share falls to, as `sample` does; `shares` `(batch)` are uniform in [0, 1)."""
    # hand-over: the same without sorting ids; None on a GPU
    ids = fast_choose(logits, params, shares) if may_hand_over() else None
    if ids is not None:
        return ids
    groups: dict[SamplingParams, list[int]] = {}
    for row, each in enumerate(params):
        groups.setdefault(each, []).append(row)
    ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for each, members in groups.items():
        rows = torch.tensor(members, device=logits.device)
        ids[rows] = _choose(logits[rows], each, shares[rows])
    return ids.masked_fill(~logits.amax(dim=-1).isfinite(), -1)


def _choose(logits: Tensor, params: SamplingParams, shares: Tensor) -> Tensor:
    """Return the ids of rows with the same settings."""
    if params.temperature == 0.0:
        return logits.argmax(dim=-1)
    kept = top_k_filter(apply_temperature(upcast(logits), params.temperature), params.top_k)
    weights = _weights(min_p_filter(top_p_filter(kept, params.top_p), params.min_p))
    if params.top_k is None and params.top_p == 1.0:
        return draw(weights, shares)
    # Most likely ids first: the order in which the fast form has them.
    ordered, ids = weights.sort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, draw(ordered, shares).unsqueeze(-1)).squeeze(-1)


def draw(weights: Tensor, shares: Tensor) -> Tensor:
    """Return where each row's cumulative sum of `weights` `(batch, n)` passes its share of their sum, as `(batch)`.

    This inverts the cumulative distribution: `shares` `(batch)`, uniform in [0, 1), give each index as often as its
    weight says. Weights are probabilities, or in proportion to them.
    """
    sums = weights.cumsum(dim=-1, dtype=shares.dtype)  # (batch, n)
    # right: the first sum that is greater, so never an id of weight 0.
    places = torch.searchsorted(sums, (shares * sums[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    return places.clamp_max(weights.shape[-1] - 1)  # which only a row with a NaN exceeds


def uniform(count: int, generators: Generators, device: torch.device) -> Tensor:
    """Return `count` numbers in [0, 1): all from the one generator, or each from its own."""
    dtype = _sums_dtype(device)
    if isinstance(generators[0], RandomNumbers):
        ahead = cast(Sequence[RandomNumbers], generators) if len(generators) > 1 else [generators[0]] * count
        return torch.tensor([each.take() for each in ahead], device=device, dtype=dtype)
    plain = cast(Sequence[torch.Generator | None], generators)
    if len(plain) == 1:
        return torch.rand(count, generator=plain[0], device=device, dtype=dtype)
    numbers = torch.empty(count, device=device, dtype=dtype)
    for number, generator in zip(numbers.unbind(), plain, strict=True):
        number.uniform_(generator=generator)
    return numbers


def _sums_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums of weights, and of the shares that are compared with them.

    In fp64 a number in [0, 1), of 53 bits, stays below the whole sum when it is multiplied by that.
    """
    return torch.float64 if device.type != "mps" else torch.float32


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
    return _keep(logits, _weights(logits).sort(dim=-1, descending=True, stable=True).indices[..., :top_k])


def top_p_filter(logits: Tensor, top_p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities sum to `top_p` or more (Holtzman et al. 2020).

    1 keeps all, 0 the most likely one. Raises ValueError outside [0, 1].
    """
    SamplingParams(top_p=top_p)
    if top_p == 1.0:
        return logits
    weights = _weights(logits)
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1, dtype=_sums_dtype(logits.device)) - ordered  # of all more likely tokens
    dropped = before >= top_p * row_sums(weights).unsqueeze(-1)
    dropped[..., 0] = False  # with top_p = 0 too, one token stays
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)  # scatter: back to the order of the ids


def min_p_filter(logits: Tensor, min_p: float) -> Tensor:
    """Drop tokens less likely than `min_p` times the most likely one (Nguyen et al. 2024); 0 keeps all.

    Raises ValueError outside [0, 1].
    """
    SamplingParams(min_p=min_p)
    if min_p == 0.0:
        return logits
    return logits.masked_fill(_weights(logits) < min_p, -math.inf)


def _weights(logits: Tensor) -> Tensor:
    """Return the probabilities, in at least fp32, divided by that of the most likely token."""
    wide = upcast(logits)
    return torch.exp(wide - wide.amax(dim=-1, keepdim=True))


def _keep(logits: Tensor, indices: Tensor) -> Tensor:
    """Return the logits with -inf at all but `indices` `(..., kept)`."""
    return torch.full_like(logits, -math.inf).scatter(-1, indices, logits.gather(-1, indices))
