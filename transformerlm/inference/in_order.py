"""Many requests to texts in their order, with as many under way as there are slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from transformerlm.inference.generate import NOT_FINITE, Batcher
from transformerlm.inference.requests import Drawn, Finished, Request
from transformerlm.inference.texts import Pieces


@dataclass(eq=False)
class _Text:
    pieces: Pieces
    parts: list[str] = field(default_factory=list)
    is_whole: bool = False


def texts_in_order(
    batcher: Batcher, requests: Iterable[Request], *, most: int, make_pieces: Callable[[], Pieces]
) -> Iterator[str]:
    """Yield the text of each request, in order; `most` are under way at a time.

    A text that has ended is replaced at once by that of the next request, which is asked for only then. Raises
    ValueError where the model's logits are not finite.
    """
    source, under_way = iter(requests), 0
    texts: dict[str, _Text] = {}
    order: deque[_Text] = deque()
    while True:
        while under_way < most and (request := next(source, None)) is not None:
            batcher.submit(request)
            texts[request.request_id] = _Text(make_pieces())
            order.append(texts[request.request_id])
            under_way += 1
        if not order:
            return
        for event in batcher.step():
            text = texts[event.request_id]
            if isinstance(event, Drawn) and text.pieces.stopped_by is None:
                text.parts.append(text.pieces.push(event.token_id))
                if text.pieces.stopped_by is not None:
                    batcher.cancel(event.request_id)
            elif isinstance(event, Finished):
                if event.reason == "error":
                    raise ValueError(NOT_FINITE)
                text.parts.append(text.pieces.finish())
                text.is_whole = True
                del texts[event.request_id]
                under_way -= 1
        while order and order[0].is_whole:
            yield "".join(order.popleft().parts)


def drawn_ids(batcher: Batcher, request: Request) -> Iterator[int]:
    """Yield the ids of one request as they are drawn, by a batcher that has no other; raises as `texts_in_order`."""
    batcher.submit(request)
    while not batcher.is_idle:
        for event in batcher.step():
            if isinstance(event, Drawn):
                yield event.token_id
            elif isinstance(event, Finished) and event.reason == "error":
                raise ValueError(NOT_FINITE)
