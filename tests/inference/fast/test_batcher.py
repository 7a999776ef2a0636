"""The batcher: texts that join and leave get the ids that each gets alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.inference.helpers import greedy_without_cache, make_model
from transformerlm.inference.generate import Batcher, Decoder
from transformerlm.inference.requests import Drawn, Finished, Request
from transformerlm.inference.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


def run(batcher: Batcher, requests: list[Request]) -> tuple[dict[str, list[int]], dict[str, Finished]]:
    """Return the ids and the last event of each request."""
    ids: dict[str, list[int]] = {request.request_id: [] for request in requests}
    ends: dict[str, Finished] = {}
    for request in requests:
        batcher.submit(request)
    while not batcher.is_idle:
        for event in batcher.step():
            assert event.request_id not in ends, f"{event} after the last event"
            if isinstance(event, Drawn):
                ids[event.request_id].append(event.token_id)
            if isinstance(event, Finished):
                ends[event.request_id] = event
    return ids, ends


def make_request(name: object, prompt: list[int], count: int = 30, **settings: Any) -> Request:
    return Request(request_id=str(name), prompt=prompt, max_new_tokens=count, **{"sampling": GREEDY, **settings})


@pytest.mark.parametrize("context_length", [200, 16, 6, 5, 2, 1])
def test_texts_that_share_slots_are_as_alone(context_length: int) -> None:
    """Seven prompts in three slots, shorter and longer than the context and than a chunk: the plain model's ids."""
    model = make_model(context_length=context_length, num_kv_heads=2)
    prompts = [torch.randint(0, 257, (length,)).tolist() for length in (1, 4, 9, 15, 16, 30, 150)]
    batcher = Batcher(Decoder(model), slots=3)
    ids, ends = run(batcher, [make_request(number, prompt) for number, prompt in enumerate(prompts)])
    assert list(ids.values()) == [greedy_without_cache(model, prompt, 30) for prompt in prompts]
    assert {end.reason for end in ends.values()} == {"length"}
