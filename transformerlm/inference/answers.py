"""The most likely answers to many prompts, as they end: what an evaluation of answers asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformerlm.inference.generate import NOT_FINITE, Batcher
from transformerlm.inference.requests import Drawn, Finished, Request
from transformerlm.inference.sampling_params import SamplingParams
from transformerlm.inference.texts import Pieces
from transformerlm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer:
    """The answer to prompt `number`; `is_whole` if the model ended it, not the limit of its tokens."""

    number: int
    text: str
    is_whole: bool


@dataclass(eq=False)
class _Unfinished:
    pieces: Pieces
    text: str = ""


def answers(
    batcher: Batcher,
    prompts: Sequence[list[int]],
    *,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    ends: frozenset[int] = frozenset(),
    stop: Sequence[str] = (),
    start_id: int | None = None,
) -> Iterator[Answer]:
    """Yield the answer to each prompt's ids, always taking the most likely id, in the order in which they end.

    One of `ends`, or the first of the strings `stop`, ends an answer and is no part of it. `start_id` is that of
    `requests.last_window`.

    Raises:
        ValueError: an empty prompt, or logits that are not finite.
    """
    unfinished: dict[str, _Unfinished] = {}
    for number, ids in enumerate(prompts):
        request = Request(
            request_id=str(number),
            prompt=ids,
            max_new_tokens=max_new_tokens,
            sampling=SamplingParams(temperature=0.0),
            ends=ends,
            start_id=start_id,
        )
        unfinished[request.request_id] = _Unfinished(Pieces(tokenizer.decode_bytes, stop=stop))
        batcher.submit(request)
    while not batcher.is_idle:
        for event in batcher.step():
            answer = unfinished[event.request_id]
            if isinstance(event, Drawn) and answer.pieces.stopped_by is None:
                answer.text += answer.pieces.push(event.token_id)
                if answer.pieces.stopped_by is not None:
                    batcher.cancel(event.request_id)
            elif isinstance(event, Finished):
                if event.reason == "error":
                    raise ValueError(NOT_FINITE)
                text = answer.text + answer.pieces.finish()
                is_whole = event.reason == "stop" or answer.pieces.stopped_by is not None
                yield Answer(int(event.request_id), text, is_whole)
