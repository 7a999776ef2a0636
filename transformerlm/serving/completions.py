"""POST /v1/completions: texts of the engine as OpenAI's completions, whole or as a stream of events.

`answer` does the work for chats, too, which are told in another `Shape`.

Both kinds of answer watch the client all the time, while its texts wait for a slot too: when it leaves, its places in
the queue and its slots are free at once.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from config.schemas import duration_seconds
from transformerlm.serving.api_schema import LONG_BODY, CompletionRequest, StreamOptions, parsed
from transformerlm.serving.choices import COMPLETION, ChoiceWriter, Shape, best, joined
from transformerlm.serving.engine import TEXT_ERRORS, Piece, TextStream
from transformerlm.serving.errors import ApiError, JsonAnswer, of_engine, timed_out
from transformerlm.serving.served import Served
from transformerlm.serving.texts_plan import Plan, plan_texts

_DONE = b"data: [DONE]\n\n"
_JSON = json.JSONEncoder(separators=(",", ":"))
Result = TypeVar("Result")


class ClientLeft(Exception):
    """The client closed its connection before it had its answer."""


async def completions(request: Request) -> Response:
    """Answer one request for completions."""
    served: Served = request.app.state.served
    body = await request.body()
    asked = await parsed(CompletionRequest, body)
    return await answer(request, await planned(body, partial(plan_texts, served, asked)), COMPLETION)


async def planned(body: bytes, make_plan: Callable[[], Plan]) -> Plan:
    """Return the plan of a request, made in a thread where the body is so long that others would wait for it."""
    return await asyncio.to_thread(make_plan) if len(body) > LONG_BODY else make_plan()


async def answer(request: Request, plan: Plan, shape: Shape) -> Response:
    """Answer a request whose texts are planned, whole or as a stream; its body has been read.

    Raises:
        ApiError: as the engine says.
    """
    job = _Job(request.app.state.served, plan, shape)
    if plan.asked.stream:
        return _EventStream(job)
    try:
        return JsonAnswer(await unless_client_leaves(job.whole(), request.receive))
    except ClientLeft:
        return Response(status_code=499)  # nobody reads it
    except ApiError as error:
        error.was_taken = True
        raise
    finally:
        job.cancel()


class _Job:
    """The texts of one request on their way."""

    def __init__(self, served: Served, plan: Plan, shape: Shape) -> None:
        self.plan, self._served, self._shape = plan, served, shape
        self._options = plan.asked.stream_options or StreamOptions()
        self._began = time.monotonic()
        self._seconds = duration_seconds(served.config.timeouts.request)
        tokenizer = served.tokens()
        self.writers = [
            shape.writer(plan, number, plan.prompts[number // plan.best_of], tokenizer)
            for number in range(len(plan.requests))
        ]
        self._seen: dict[int, tuple[int, float]] = {}  # how many tokens of a text have come, and when the last did
        self._streams = served.submit(plan.requests)

    def cancel(self) -> None:
        """Free what the texts hold; nothing happens where they have ended."""
        for stream in self._streams:
            stream.cancel()

    async def whole(self) -> dict[str, Any]:
        """Return the whole answer.

        Raises:
            ApiError: 503 the engine died, 504 it took too long, 400 and 404 it refuses the request, 500 the model's
                logits are not finite, or something else went wrong with a text.
        """
        parts: list[list[dict[str, Any]]] = [[] for _ in self.writers]
        async with aclosing(self.steps()) as steps:
            async for pieces in steps:
                for number, piece in pieces:
                    parts[number].append(self.writers[number].part(piece))
        plan, chosen = self.plan, [joined(one) for one in parts]
        if plan.best_of > plan.n:
            scored = list(zip((writer.mean_logprob for writer in self.writers), chosen, strict=True))
            groups = [scored[first : first + plan.best_of] for first in range(0, len(scored), plan.best_of)]
            ranked = [choice for group in groups for choice in best(group, plan.n)]
            chosen = [{**choice, "index": index} for index, choice in enumerate(ranked)]
        chosen = [self._shape.whole_choice(choice) for choice in chosen]
        return self.envelope(self._shape.whole_name, chosen) | {"usage": self.usage(), **plan.told}

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of a streamed answer, those of one step of the engine together; errors are events, too."""
        try:
            async with aclosing(self.steps()) as steps:
                opening = self._shape.opening(len(self.writers))
                async for pieces in steps:
                    parts = [self.writers[number].part(piece) for number, piece in pieces]
                    told = [self._shape.part(part) for part in parts if _says_something(part)]
                    yield b"".join(map(_event, (self._chunk(one) for one in (*opening, *told))))
                    opening = []
            if self._options.include_usage:
                yield _event(self.envelope(self._shape.part_name, []) | {"usage": self.usage()})
        except ApiError as error:
            yield _event(error.body())
        yield _DONE

    def _chunk(self, part: dict[str, Any]) -> dict[str, Any]:
        chunk = self.envelope(self._shape.part_name, [part], self.writers[part["index"]])
        if "step" in part:
            chunk |= self.plan.told
        if self._options.continuous_usage_stats:
            chunk["usage"] = self.usage()
        elif self._options.include_usage:
            chunk["usage"] = None
        return chunk

    def envelope(self, name: str, choices: list[dict[str, Any]], *writers: ChoiceWriter) -> dict[str, Any]:
        """Return the object that an answer, or one event of it, is; `writers` are those of its choices, by default all.

        It names the weights if there is one name for them: a run may be taken over while texts wait for a slot.
        """
        fingerprints = {one.fingerprint for one in writers or self.writers}
        return {
            "id": self.plan.request_id,
            "object": name,
            "created": self.plan.created,
            "model": self.plan.model,
            "system_fingerprint": (fingerprints.pop() or None) if len(fingerprints) == 1 else None,
            "choices": choices,
        }

    def usage(self) -> dict[str, Any]:
        """Return how many tokens were read and drawn so far; each prompt counts once."""
        firsts = self.writers[:: self.plan.best_of]
        prompt = sum(len(one.prompt.ids) for one in firsts)
        drawn = sum(one.num_tokens for one in self.writers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": drawn,
            "total_tokens": prompt + drawn,
            "prompt_tokens_details": {"cached_tokens": sum(one.num_reused for one in firsts)},
        }

    async def steps(self) -> AsyncGenerator[list[tuple[int, Piece]], None]:
        """Yield the pieces that came together, each with the number of its text, until all texts have ended.

        Raises:
            ApiError: as `whole`.
        """
        finish = dict.fromkeys(range(len(self._streams)), "cancelled")
        try:
            clock = asyncio.get_running_loop().time
            async with asyncio.timeout(self._seconds) as limit, aclosing(read_together(self._streams)) as together:
                deadline = clock() + self._seconds
                async for pieces in together:
                    self._observe(pieces)
                    finish |= {number: piece.finish for number, piece in pieces if piece.finish}
                    for _, piece in pieces:
                        if piece.finish == "error":
                            raise _failed(piece)
                    limit.reschedule(None)  # a client may read slowly: that time does not count
                    gave = clock()
                    yield pieces
                    deadline += clock() - gave
                    limit.reschedule(deadline)
        except TimeoutError:
            finish = {number: "timeout" if one == "cancelled" else one for number, one in finish.items()}
            raise timed_out(self._seconds) from None
        except TEXT_ERRORS as error:
            finish = {number: "error" if one == "cancelled" else one for number, one in finish.items()}
            raise of_engine(error) from None
        finally:
            self.cancel()
            self._tell(finish)

    def _observe(self, pieces: Sequence[tuple[int, Piece]]) -> None:
        now, metrics = time.monotonic(), self._served.metrics
        for number, piece in pieces:
            if number not in self._seen:
                metrics.text_began(queue_seconds=self._streams[number].queue_seconds)
            count, last = self._seen.get(number, (0, self._began))
            if piece.num_tokens > count:  # else it brings scores, or the end of a stop string
                (metrics.text_went_on if count else metrics.first_token)(now - last)
                last = now
            self._seen[number] = piece.num_tokens, last

    def _tell(self, finish: dict[int, str]) -> None:
        seconds = time.monotonic() - self._began
        for number, reason in finish.items():
            self._served.metrics.text_ended(reason, seconds)
            self._served.tell(
                "request",
                {
                    "id": self.plan.requests[number].request_id,
                    "finish": reason,
                    "prompt_tokens": len(self.writers[number].prompt.ids),
                    "tokens": self.writers[number].num_tokens,
                    "ms": round(1000 * seconds, 1),
                },
            )


async def read_together(streams: Sequence[TextStream]) -> AsyncGenerator[list[tuple[int, Piece]], None]:
    """Yield what the streams have at the same time, each piece with the number of its stream, until all have ended.

    Raises:
        EngineGone, UnknownCheckpoint, RequestRefused: as the streams do.
    """
    if len(streams) == 1:  # a queue and a task of its own would take half of the time of a token here
        async for first in streams[0]:
            yield [(0, one) for one in (first, *streams[0].take_ready())]
        return
    ready: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()

    async def read(number: int, stream: TextStream) -> None:
        async for piece in stream:
            ready.put_nowait((number, piece))

    def ended(number: int, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            ready.put_nowait((number, None))

    readers = [asyncio.create_task(read(number, stream)) for number, stream in enumerate(streams)]
    for number, reader in enumerate(readers):
        reader.add_done_callback(partial(ended, number))
    open_streams = len(readers)
    try:
        while open_streams:
            found = [await ready.get()]
            await asyncio.sleep(0)  # the other readers take what the same step of the engine brought them
            while not ready.empty():
                found.append(ready.get_nowait())
            pieces = [(number, piece) for number, piece in found if piece is not None]
            if pieces:
                yield pieces
            for number, piece in found:
                if piece is None:
                    open_streams -= 1
                    readers[number].result()
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def unless_client_leaves(work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """Return what `work` returns, which is cancelled as soon as the client has gone; its body has been read.

    Raises:
        ClientLeft: it has gone.
    """
    task, watch = asyncio.create_task(work), asyncio.create_task(_has_left(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeft
    finally:
        for one in (task, watch):
            one.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(task, watch, return_exceptions=True)


async def _has_left(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _EventStream(Response):
    """Server-sent events, as they come."""

    media_type = "text/event-stream"

    def __init__(self, job: _Job) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"})  # nginx would keep events back
        del self.headers["content-length"]
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the texts have ended, or the client has gone."""

        async def write() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(self._job.chunks()) as chunks:
                async for chunk in chunks:
                    if chunk:
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_client_leaves(write(), receive)
        except ClientLeft:
            pass
        finally:
            self._job.cancel()


def _failed(piece: Piece) -> ApiError:
    """Return what a client is told of a text that ended with an error."""
    if piece.error:
        return ApiError(500, f"the engine failed at this text: {piece.error}", code="internal")
    return ApiError(500, "the model's logits are not finite numbers", code="not_finite")


def _says_something(part: dict[str, Any]) -> bool:
    """Return whether a part is worth an event: what is held back, as half a character is, comes with a later one."""
    logprobs = part["logprobs"]
    return bool(part["text"] or part["finish_reason"] or part.get("token_ids") or (logprobs and any(logprobs.values())))


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {_JSON.encode(data)}\n\n".encode()
