"""What changes the logits of single ids before one is drawn: penalties for ids that occurred, and biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """How much less likely ids become that the text has already; the values here change nothing.

    `presence` is subtracted from the logit of each id that was drawn, `frequency` once for each time it was drawn
    (OpenAI's definitions). `repetition` divides the positive logits of all ids of prompt and text, and multiplies the
    negative ones (Keskar et al. 2019, CTRL). `logit_bias` is added to the logits of the ids that it names.
    """

    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
