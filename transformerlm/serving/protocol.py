"""What the web process and the engine process tell each other: JSON lines, whose objects are the dataclasses below.

The web process writes `Settings` first, then one `Ask` a line. The engine process writes one `Told` a line, at most one
for each step, with the pieces of all texts, and is told when they were taken: it is never more than `MOST_UNTAKEN`
steps ahead, or a new text's first token would wait behind all that is on its way. Fields that have their default are
omitted. Nothing here needs torch, and nothing that is read can name code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from transformerlm.serving.engine import ModelFacts, Piece, StepReport, TextRequest

# Nested dataclasses without a configuration of their own take this one.
_STRICT = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")

MessageT = TypeVar("MessageT")

MOST_UNTAKEN, FEW_PIECES = 2, 16
"""So many steps may be on their way, and no more than one of them with more pieces than a few."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the engine process is started with."""

    __pydantic_config__ = _STRICT

    checkpoint: str
    """A run, `RUN/best`, or a checkpoint's directory."""
    device: str
    precision: str
    threads: int | None
    slots: int
    prefill_chunk: int
    prefix_cache_mb: int
    reproducible: bool
    follow: str
    """none, newest or best."""
    interval: float
    """Seconds between two looks at the run's checkpoints."""
    earlier: ModelFacts | None = None
    """What the process before this one served: requests are prepared for its tokenizer and its context."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What the web process wants."""

    __pydantic_config__ = _STRICT

    submit: list[TextRequest] = field(default_factory=list)
    cancel: list[str] = field(default_factory=list)
    """Ids of requests whose texts are to end; one that has ended is ignored."""
    ping: int | None = None
    """To be answered with the same number, between two steps."""
    taken: int = 0
    """How many more steps it has taken, lines with a `report`."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A request of which no text comes."""

    request_id: str
    reason: str
    is_checkpoint: bool = False
    """Whether the checkpoint that it names is the reason."""
    is_for_now: bool = False
    """Whether that checkpoint may be there another time."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A checkpoint that is not taken over, and why."""

    checkpoint: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the engine process has to say."""

    __pydantic_config__ = _STRICT

    pieces: list[tuple[str, Piece]] = field(default_factory=list)
    """What became of requests in this step, by request id."""
    report: StepReport | None = None
    serving: ModelFacts | None = None
    """The model that new requests get from now on: the first, or one that was taken over."""
    checkpoints: list[str] | None = None
    """The names that a request may give, newest first; None: as before."""
    refused: list[Refused] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    note: str | None = None
    """Something that a person should know."""
    pong: int | None = None
    is_loading: bool = False
    """Beside a pong: a checkpoint is being read for a request."""
    failed: str | None = None
    """The last line: why the process ends, for the user."""


class Codec(Generic[MessageT]):
    """One kind of message as a line of JSON, and back."""

    def __init__(self, kind: type[MessageT]) -> None:
        self._kind, self._adapter = kind, TypeAdapter[Any](kind)

    def encode(self, message: MessageT) -> bytes:
        """Return the line, with its end."""
        return self._adapter.dump_json(message, exclude_defaults=True) + b"\n"

    def decode(self, line: bytes) -> MessageT:
        """Return the message of a line.

        Raises:
            ValueError: the line is not JSON, a field is unknown or missing, or a value has another type.
        """
        try:
            message: MessageT = self._adapter.validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "line"
            raise ValueError(f"{self._kind.__name__}: {place}: {first['msg']}, found {line[:80]!r}") from None
        return message


SETTINGS, ASK, TOLD = Codec(Settings), Codec(Ask), Codec(Told)
