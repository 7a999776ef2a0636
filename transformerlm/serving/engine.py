"""What the web side sees of the engine, which makes tokens in a process of its own: plain data and one protocol.

`engine_client.EngineClient` is the engine's other end; tests of the routes use one of their own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

State = Literal["loading", "ok", "stalled", "dead", "draining"]


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """One text to generate, with everything decided: the web side has filled in all defaults and checked all limits."""

    request_id: str
    prompt: list[int]
    max_tokens: int
    seed: int
    checkpoint: str = ""
    """The name of the checkpoint to use, such as step-00000140; "" is the one that is served."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    stop: list[str] = field(default_factory=list)
    ignore_eos: bool = False
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    end_ids: list[int] = field(default_factory=list)
    """Tokens that end this text besides the model's own, as the one after an answer does."""


@dataclass(frozen=True, kw_only=True)
class Logprobs:
    """Log-probabilities at some places of a text, one entry for each place."""

    token_ids: list[int]
    logprobs: list[float | None]
    """None at the first place of a prompt."""
    top: list[list[tuple[int, float]]]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What became of a request in one step of the engine.

    `text` holds whole characters only; what may be the beginning of a stop string is held back, but not its
    `token_ids`: they are those that this step drew, a stop string's too. The last piece has a `finish`.
    `prompt_logprobs` comes in the first piece of a request that asked for it.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    finish: Literal["", "stop", "length", "cancelled", "error"] = ""
    error: str = ""
    """With `finish` error: what went wrong in the engine; "": the model's logits are not finite."""
    end: Logprobs | None = None
    """The end token that was drawn, where the request asked for log-probabilities."""
    stop_string: str | None = None
    """The stop string that ended the text; None: the model's end token or the limit did."""
    num_tokens: int = 0
    """How many ids were drawn so far, those of a stop string and an end token included."""
    num_prompt_reused: int = 0
    step: int = 0
    """The training step of the checkpoint that makes this text, the same for all its pieces."""
    fingerprint: str = ""
    """That checkpoint's step and the first eight digits of the SHA-256 of its weights."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The checkpoint that is served."""

    path: str
    checkpoint: str
    """The name of its directory, such as step-00000140."""
    step: int
    val_loss: float | None
    fingerprint: str
    parameters: int
    vocab_size: int
    """Of the tokenizer: ids below it can be drawn."""
    context_length: int
    precision: str
    device: str
    end_ids: list[int]
    start_id: int | None
    starts_texts: bool
    """Whether each text begins with `start_id`."""
    tokenizer_sums: dict[str, str] = field(default_factory=dict)
    """The SHA-256 of each file of the tokenizer, by its path in the checkpoint."""
    chat: dict[str, Any] | None = None
    """How the conversations that it was trained on became ids, as `ChatFormat.to_json` says; None: there were none."""


@dataclass(frozen=True, kw_only=True)
class EngineStatus:
    """How the engine does."""

    state: State
    facts: ModelFacts | None
    running: int = 0
    waiting: int = 0
    slots: int = 0
    last_token_age_s: float | None = None
    """Seconds since a token was made; None: none was yet."""
    restarts: int = 0
    reloads: int = 0


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step of the engine took and did, for metrics."""

    seconds: float
    choice_seconds: float
    prompt_tokens: int
    generated_tokens: int
    reused_tokens: int
    read_again_tokens: int = 0
    """Of texts that had filled the context, of which the last half is read again."""


class QueueFull(Exception):
    """No more requests are taken now; `retry_after` seconds from now there may be room."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.reason, self.retry_after = reason, retry_after


class EngineGone(Exception):
    """The engine is loading, draining or dead, or died while it made this text, or cannot load its model now."""


class UnknownCheckpoint(Exception):
    """The run keeps no checkpoint of this name."""


class RequestRefused(Exception):
    """The engine cannot do what a request asks; the message says why."""


TEXT_ERRORS = (EngineGone, UnknownCheckpoint, RequestRefused)
"""Why a text may end without its last piece."""


class TextStream(Protocol):
    """The pieces of one text.

    Iterating raises EngineGone if the engine dies, UnknownCheckpoint if the checkpoint that the request names is
    damaged, gone, or has another tokenizer or context than the one that is served, and RequestRefused.
    """

    @property
    def queue_seconds(self) -> float:
        """How long the text has waited for a slot of the engine, or had."""

    def __aiter__(self) -> AsyncIterator[Piece]:
        """Return the iterator over the pieces; it ends after the one with a `finish`."""

    def take_ready(self) -> list[Piece]:
        """Return the pieces that have come already, without waiting; iterating does not give them again."""

    def cancel(self) -> None:
        """Free the slot, or the place in the queue; nothing happens where the text has ended."""


class Engine(Protocol):
    """Makes texts; all methods are called on the event loop's thread.

    `on_event` gets a dict for each event, with its name as `event`: `reloaded` (checkpoint, step, val_loss,
    fingerprint), `checkpoint_skipped` (checkpoint, reason) and `engine_restarted` (reason, restarts).
    """

    on_event: Callable[[dict[str, Any]], None]

    @property
    def status(self) -> EngineStatus:
        """How the engine does now."""

    def submit(self, requests: Sequence[TextRequest]) -> Sequence[TextStream]:
        """Take all of these requests or none; return their streams, in order.

        Raises:
            QueueFull: there is no room for all of them.
            EngineGone: the engine makes no tokens now.
            UnknownCheckpoint: one names a checkpoint that is not there.
        """

    def subscribe(self, watch: Callable[[StepReport], None]) -> None:
        """Call `watch` after each step."""

    def checkpoints(self) -> list[str]:
        """Return the names of the run's checkpoints that can be asked for, newest first."""

    async def start(self) -> None:
        """Start the engine's process; return when it has loaded the model.

        Raises:
            ValueError: the checkpoint cannot be served; the message is the process's own.
        """

    async def drain(self, seconds: float) -> bool:
        """Take no more requests and wait until those running and waiting have ended; return whether all did in time."""

    async def close(self) -> None:
        """End the process."""
