"""An engine without a model: its texts repeat their prompts, so that a test knows every token beforehand."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from transformerlm.serving.engine import (
    EngineGone,
    EngineStatus,
    Logprobs,
    ModelFacts,
    Piece,
    QueueFull,
    State,
    StepReport,
    TextRequest,
    UnknownCheckpoint,
)
from transformerlm.tokenizer.chat import ChatFormat
from transformerlm.tokenizer.tokenizer import Tokenizer

END = "<|endoftext|>"


def fake_tokenizer() -> Tokenizer:
    """Return a tokenizer of all bytes, three longer tokens and the end of a text."""
    merges = [(b"o", b"n"), (b"c", b"e"), (b"on", b"ce"), (b" ", b"a")]
    vocab = {one: bytes([one]) for one in range(256)}
    vocab |= {256 + number: left + right for number, (left, right) in enumerate(merges)}
    return Tokenizer(vocab, merges, [END])


def write_checkpoint(home: Path, *, run: str = "tiny", step: int = 140) -> Path:
    """Write the tokenizer of a checkpoint, which is all that the web side reads of one, and return its directory."""
    path = home / run / "checkpoints" / f"step-{step:08d}"
    fake_tokenizer().save(path / "tokenizer")
    return path


class FakeEngine:
    """A text is the ids of its prompt over and over, from id `seed` on; a token has the log-probability -0.5, b -0.25.

    A test holds all texts back with `gate.clear()`, or ends the engine with `die`. An end token is drawn where a prompt
    ends in one.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        slots: int = 4,
        waiting: int = 4,
        context_length: int = 64,
        chat: ChatFormat | None = None,
    ) -> None:
        self.on_event: Callable[[dict[str, Any]], None] = lambda event: None
        self.tokenizer = fake_tokenizer()
        self.gate = asyncio.Event()
        self.gate.set()
        self.state: State = "loading"
        self.ends_by: Exception | Piece | None = None
        """What each text comes to instead of its first token."""
        self.fingerprint_of: Callable[[TextRequest], str] = lambda request: "140-0123abcd"
        """Which weights make a text."""
        self.seen: list[TextRequest] = []
        self.active: list[FakeStream] = []
        self.kept = [checkpoint.name, "step-00000020"]
        self._slots, self._waiting = slots, waiting
        self._watches: list[Callable[[StepReport], None]] = []
        self.facts = ModelFacts(
            path=str(checkpoint),
            checkpoint=checkpoint.name,
            step=140,
            val_loss=2.5,
            fingerprint="140-0123abcd",
            parameters=1000,
            vocab_size=self.tokenizer.vocab_size,
            context_length=context_length,
            precision="fp32",
            device="cpu",
            end_ids=[self.end_id],
            start_id=self.end_id,
            starts_texts=False,
            chat=None if chat is None else chat.to_json(),
        )

    @property
    def end_id(self) -> int:
        """The id of the end of a text."""
        return self.tokenizer.special_token_ids[END]

    @property
    def status(self) -> EngineStatus:
        """How the engine does now."""
        running = min(len(self.active), self._slots)
        return EngineStatus(
            state=self.state,
            facts=None if self.state == "loading" else self.facts,
            running=running,
            waiting=len(self.active) - running,
            slots=self._slots,
            last_token_age_s=0.25 if self.seen else None,
        )

    def submit(self, requests: Sequence[TextRequest]) -> list[FakeStream]:
        """Take all of these requests or none."""
        if self.state != "ok":
            raise EngineGone(f"the engine is {self.state}")
        for request in requests:
            if request.checkpoint and request.checkpoint not in self.kept:
                raise UnknownCheckpoint(f"there is no {request.checkpoint}")
        if len(self.active) + len(requests) > self._slots + self._waiting:
            raise QueueFull("too many texts wait", 3)
        self.seen += requests
        streams = [FakeStream(self, request) for request in requests]
        self.active += streams
        return streams

    def subscribe(self, watch: Callable[[StepReport], None]) -> None:
        """Call `watch` after each step."""
        self._watches.append(watch)

    def stepped(self) -> None:
        """Tell of a step that drew one token."""
        for watch in self._watches:
            watch(StepReport(seconds=0.01, choice_seconds=0.001, prompt_tokens=0, generated_tokens=1, reused_tokens=0))

    def checkpoints(self) -> list[str]:
        """Return the names of the checkpoints that can be asked for."""
        return list(self.kept)

    async def start(self) -> None:
        """Be ready."""
        self.state = "ok"

    async def drain(self, seconds: float) -> bool:
        """Take no more requests, and wait for those that there are."""
        self.state = "draining"
        try:
            async with asyncio.timeout(seconds):
                while self.active:
                    await asyncio.sleep(0.005)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End."""
        self.die()

    def die(self) -> None:
        """End as a process that is killed."""
        self.state = "dead"
        self.gate.set()


class FakeStream:
    """The pieces of one text."""

    def __init__(self, engine: FakeEngine, request: TextRequest) -> None:
        self._engine, self._request = engine, request
        self.is_cancelled = False
        self.queue_seconds = 0.25

    def take_ready(self) -> list[Piece]:
        """Nothing: each piece is waited for."""
        return []

    def cancel(self) -> None:
        """Free the place."""
        self.is_cancelled = True
        if self in self._engine.active:
            self._engine.active.remove(self)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Yield one token a turn of the loop."""
        try:
            async for piece in self._pieces():
                yield piece
        finally:
            self.cancel()

    async def _pieces(self) -> AsyncIterator[Piece]:
        request, engine = self._request, self._engine
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        text, scored = "", self._scored_prompt()
        shared: Any = {"step": 140, "fingerprint": engine.fingerprint_of(request)}
        for number in range(request.max_tokens):
            await engine.gate.wait()
            await asyncio.sleep(0)
            if engine.state == "dead":
                raise EngineGone("the engine died")
            if isinstance(engine.ends_by, Exception):
                raise engine.ends_by
            if engine.ends_by is not None:
                yield engine.ends_by
                return
            token = request.prompt[(request.seed + number) % len(request.prompt)]
            engine.stepped()
            ends = (engine.end_id, *request.end_ids)
            if token in ends and not request.ignore_eos and number >= request.min_tokens:
                end = None if request.num_logprobs is None else self._logprobs([token], request.num_logprobs)
                yield Piece(finish="stop", num_tokens=number + 1, prompt_logprobs=scored, end=end, **shared)
                return
            new = decoder.decode(engine.tokenizer.decode_bytes([token]), final=number + 1 == request.max_tokens)
            before, text = text, text + new
            stop = next((one for one in request.stop if one in text), None)
            is_last = stop is not None or number + 1 == request.max_tokens
            yield Piece(
                text=text[len(before) : text.index(stop) if stop else None],
                token_ids=[token],
                logprobs=None if request.num_logprobs is None else self._logprobs([token], request.num_logprobs),
                prompt_logprobs=scored,
                finish="" if not is_last else "stop" if stop else "length",
                stop_string=stop,
                num_tokens=number + 1,
                **shared,
            )
            scored = None
            if is_last:
                return
        yield Piece(finish="length", prompt_logprobs=scored, **shared)  # no token was asked for

    def _scored_prompt(self) -> Logprobs | None:
        if self._request.num_prompt_logprobs is None:
            return None
        prompt = self._request.prompt
        known = self._logprobs(prompt, self._request.num_prompt_logprobs)
        return Logprobs(token_ids=prompt, logprobs=[None, *known.logprobs[1:]], top=[[], *known.top[1:]])

    def _logprobs(self, ids: Sequence[int], number: int) -> Logprobs:
        known = [-0.25 if one == ord("b") else -0.5 for one in ids]
        top = [
            [(one, value), (ord("z"), -1.5), (ord("y"), -2.5)][:number] for one, value in zip(ids, known, strict=True)
        ]
        return Logprobs(token_ids=list(ids), logprobs=list(known), top=top)
