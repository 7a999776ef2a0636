"""Dropout (Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting").

    dropout(x) = x / (1 - p) where a number is kept, and 0 where it is dropped, with probability p

What is dropped is a hash of a key and of a number's place, and no generator is drawn from. A sequence has one key for
each place in the model that drops numbers, so its masks are the same in any batch, on any rank or device, and when
activations are recomputed. Without keys, as in evaluation, nothing is dropped.

The hash is two rounds of "multiply, and fold the high half onto the low one", as in the finalizer of MurmurHash3
(Appleby), with the multipliers of Wellons' "lowbias32".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

PLACES = ("embedding", "attention", "residual")
"""What a model may drop: of the embedded tokens, of attention's probabilities, of what sub-layers add to the stream."""
KEYS_OF_LAYER = 3
"""A layer's keys: for attention's probabilities, for attention's output, for the feed-forward layer's output."""
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)  # int32, which wraps around


def check_probabilities(probabilities: Mapping[str, float]) -> None:
    """Raise ValueError for a place that does not exist, and for a probability outside [0, 1)."""
    for place, probability in probabilities.items():
        if place not in PLACES:
            raise ValueError(f"model.dropout: expected {', '.join(PLACES)}, got {place}")
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"model.dropout.{place}: expected at least 0 and below 1, got {probability}")


def num_keys(num_layers: int) -> int:
    """Return how many keys a sequence needs: one for the embedding, and those of the layers."""
    return 1 + KEYS_OF_LAYER * num_layers


def dropout(x: Tensor, probability: float, key: Tensor | None) -> Tensor:
    """Return `x` `(batch, ...)` with numbers dropped and the others scaled by `1 / (1 - probability)`.

    `key` is `(batch, 2)`, int32; None drops nothing, and neither does a probability of 0.
    """
    if key is None or probability == 0.0:
        return x
    return (x * (1.0 / (1.0 - probability))).masked_fill(dropped(key, x.shape[1:], probability), 0.0)


def dropped(key: Tensor, shape: Sequence[int], probability: float) -> Tensor:
    """Return which numbers of `(batch, *shape)` are dropped, bool, by the keys `(batch, 2)`, int32."""
    first, second = key.unsqueeze(-1).unbind(dim=-2)  # (batch, 1)
    words = torch.arange(math.prod(shape), dtype=torch.int32, device=key.device) ^ first  # (batch, numbers)
    words = _fold(words * _MULTIPLIERS[0], 15) ^ second
    words = _fold(words * _MULTIPLIERS[1], 16)
    # A word is equally likely to be any int32.
    threshold = min(round(probability * 2**32), 2**32 - 1) - 2**31
    return (words < threshold).view(len(key), *shape)


def _fold(words: Tensor, bits: int) -> Tensor:
    """Return `words ^ (words >> bits)`, with zeros shifted in: torch's shift repeats the sign."""
    return words.bitwise_xor((words >> bits) & (2 ** (32 - bits) - 1))
