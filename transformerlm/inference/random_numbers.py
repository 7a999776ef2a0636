"""The uniform random numbers with which tokens are drawn, from PyTorch's generators."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from transformerlm.inference.row_sums import sums_dtype

NUM_AHEAD = 64
"""How many random numbers are drawn at once, and how many of them can be put back at most."""


class RandomNumbers:
    """A generator's numbers in [0, 1), one at a time and in order, drawn 64 at once.

    A call of torch takes longer than 64 numbers do. `generator` must be on `device`, which is that of the logits.
    """

    def __init__(self, generator: torch.Generator | None, device: torch.device) -> None:
        self._draw = partial(torch.rand, NUM_AHEAD, generator=generator, device=device, dtype=sums_dtype(device))
        self._numbers: list[float] = []
        self._next = 0

    def take(self) -> float:
        """Return the next number."""
        if self._next == len(self._numbers):
            self._numbers = [*self._numbers[-NUM_AHEAD:], *self._draw().tolist()]  # those before: for `put_back`
            self._next = min(self._next, NUM_AHEAD)
        self._next += 1
        return self._numbers[self._next - 1]

    def put_back(self, count: int) -> None:
        """Give the last `count` numbers, at most 64, again."""
        assert 0 <= count <= min(self._next, NUM_AHEAD), (count, self._next)
        self._next -= count


Generators = Sequence[torch.Generator | None] | Sequence[RandomNumbers]
"""Where numbers come from: one for each row, or one for all; None is torch's global generator."""


def uniform(count: int, generators: Generators, device: torch.device) -> Tensor:
    """Return `count` numbers in [0, 1): all from the one generator, or each from its own."""
    dtype = sums_dtype(device)
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
