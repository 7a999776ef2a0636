"""Many texts in order, with full slots."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from tests.inference.helpers import make_model
from transformerlm.inference.generate import NOT_FINITE, Batcher, Decoder, answer
from transformerlm.inference.in_order import drawn_ids, texts_in_order
from transformerlm.inference.requests import Request
from transformerlm.inference.sampling_params import SamplingParams
from transformerlm.inference.texts import Pieces


def as_letters(ids: list[int]) -> bytes:
    return bytes(97 + token_id % 26 for token_id in ids)


def make_requests(counts: list[int]) -> list[Request]:
    greedy = SamplingParams(temperature=0.0)
    return [
        Request(request_id=str(number), prompt=[number + 1], max_new_tokens=count, sampling=greedy)
        for number, count in enumerate(counts)
    ]


def test_texts_come_in_order_and_a_slot_is_never_empty() -> None:
    """The first text is the longest: the others finish before it, come after it, and are asked for one by one."""
    decoder, requests = Decoder(make_model(context_length=64), compiled=False), make_requests([30, 3, 3, 3, 3, 3])
    asked: list[str] = []

    def source() -> Iterator[Request]:
        for request in requests:
            asked.append(request.request_id)
            yield request

    batcher = Batcher(decoder, slots=2)
    texts = texts_in_order(batcher, source(), most=2, make_pieces=partial(Pieces, as_letters))
    first = next(texts)
    assert len(asked) == 6, "a finished text was not replaced while the first one ran"
    assert [first, *texts] == [as_letters(answer(decoder, request)).decode() for request in requests]


def test_a_stop_string_ends_a_text_and_frees_its_slot() -> None:
    """Text and slot end there; the next text takes the slot."""
    decoder, requests = Decoder(make_model(context_length=64), compiled=False), make_requests([40, 40])
    whole = [as_letters(answer(decoder, request)).decode() for request in requests]
    stop = whole[0][4:6]
    batcher = Batcher(decoder, slots=1)
    texts = list(texts_in_order(batcher, iter(requests), most=1, make_pieces=partial(Pieces, as_letters, stop=[stop])))
    assert texts == [text.partition(stop)[0] for text in whole]
    assert batcher.is_idle


def test_logits_that_are_not_finite_are_an_error() -> None:
    """In many texts as in one."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    decoder, requests = Decoder(model, compiled=False), make_requests([5])
    with pytest.raises(ValueError, match=NOT_FINITE):
        list(texts_in_order(Batcher(decoder, slots=1), requests, most=1, make_pieces=partial(Pieces, as_letters)))
    with pytest.raises(ValueError, match=NOT_FINITE):
        list(drawn_ids(Batcher(decoder, slots=1), requests[0]))
    with pytest.raises(ValueError, match=NOT_FINITE):
        answer(decoder, requests[0])
