"""What the batcher is asked for and what it tells: plain data, ids only; and which ids of a text a model reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from transformerlm.inference.penalties import Penalties
from transformerlm.inference.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""Why a text ended: at an end id (or a stop string), at its limit, by a cancel, or by logits that are not finite."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to generate: `max_new_tokens` ids after `prompt`, or fewer where one of `ends` is drawn.

    The draws come from `generator`, on the model's device; None is torch's global one. `min_tokens` ids are drawn
    before one of `ends` may be. `num_logprobs` asks for the log-probability of each drawn id and of that many of the
    most likely ones; None asks for none. `num_prompt_logprobs` asks the same of the prompt's ids. Where the
    prompt begins with `start_id`, so does what is read of a text that the context cannot hold (`last_window`).
    """

    request_id: str
    prompt: list[int]
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    penalties: Penalties = field(default_factory=Penalties)
    generator: torch.Generator | None = None
    ends: frozenset[int] = frozenset()
    min_tokens: int = 0
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    start_id: int | None = None


def last_window(ids: list[int], size: int, start_id: int | None = None) -> list[int]:
    """Return what a model that reads `size` ids reads of a text: its last ones, from position 0 on.

    Where the text begins with `start_id`, they follow that id, as in all that the model was trained on; None: there is
    no such id. A single id is the last one in any case.
    """
    if start_id is None or ids[0] != start_id or not 1 < size < len(ids):
        return ids[-size:]
    return [start_id, *ids[1 - size :]]


@dataclass(frozen=True)
class TokenLogprobs:
    """The model's own log-probabilities at one place of a text, before temperature, penalties and filters."""

    token_id: int
    logprob: float | None
    """Of `token_id`; None for the first id of a prompt, which nothing precedes."""
    top: list[tuple[int, float]]
    """The most likely ids, in descending order, each with its log-probability."""


@dataclass(frozen=True)
class PromptScored:
    """The prompt of a request was read, and these are its log-probabilities, one entry for each id."""

    request_id: str
    logprobs: list[TokenLogprobs]


@dataclass(frozen=True)
class Drawn:
    """One more id of a request's text; an id of `ends` is not told, it finishes the text."""

    request_id: str
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class Finished:
    """A request's last event."""

    request_id: str
    reason: FinishReason
    num_prompt_reused: int = 0
    """How many ids of the prompt were not read, since the prefix cache had them."""
    end: TokenLogprobs | None = None
    """The end id that was drawn, where `num_logprobs` asked for its log-probability."""


Event = PromptScored | Drawn | Finished
