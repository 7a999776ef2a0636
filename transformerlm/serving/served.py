"""What all routes share: the engine, the settings, and the served model's name and tokenizer."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config.serve import ServeConfig
from transformerlm.interop.chat_template import template_to_export
from transformerlm.serving.engine import (
    Engine,
    EngineGone,
    EngineStatus,
    ModelFacts,
    QueueFull,
    TextRequest,
    TextStream,
    UnknownCheckpoint,
)
from transformerlm.serving.errors import ApiError, of_engine
from transformerlm.serving.metrics import Metrics
from transformerlm.tokenizer.chat import ChatFormat, ChatRenderer
from transformerlm.tokenizer.tokenizer import Tokenizer

Tell = Callable[[str, dict[str, Any]], None]
_CHECKPOINT = "@"


@dataclass(kw_only=True)
class Served:
    """One server's model; `tell` is given each event with its facts, which never hold a prompt or a text."""

    config: ServeConfig
    engine: Engine
    tell: Tell
    created: int = field(default_factory=lambda: int(time.time()))
    tokenizer: Tokenizer | None = None
    longest_token: int = 1
    """Bytes of the tokenizer's longest token."""
    renderer: ChatRenderer | None = None
    """What makes ids of conversations; None: the model was not trained on any."""
    chat_template: str | None = None
    """The renderer's format as a Jinja template; None: there is no format, or none that would give the same ids."""
    tokenizing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a text is tokenized for its own sake, so that one at a time takes memory."""

    def __post_init__(self) -> None:
        self.metrics = Metrics(lambda: self.engine.status)
        self.engine.subscribe(self.metrics.engine_stepped)

    @property
    def status(self) -> EngineStatus:
        """How the engine does now."""
        return self.engine.status

    def rejected(self, reason: str) -> None:
        """Count and tell of a request that is refused."""
        self.metrics.rejected(reason)
        self.tell("rejected", {"reason": reason})

    def load_tokenizer(self) -> None:
        """Read the tokenizer that the checkpoint holds; call this when the engine has loaded the model.

        Raises:
            OSError: it is not there any more, or another one is, since a training began anew at this place.
            ValueError: the tokenizer lacks a special token of the chat format.
        """
        directory = Path(self.facts().path)
        for name, expected in self.facts().tokenizer_sums.items():
            if hashlib.sha256((directory / name).read_bytes()).hexdigest() != expected:
                raise OSError(f"{directory / name}: expected the file that the engine has read, found another")
        tokenizer = Tokenizer.from_directory(directory / "tokenizer")
        facts, by_hand = self.facts(), self.config.chat
        chat = facts.chat if by_hand is None else by_hand.model_dump()
        if chat is not None:
            self.renderer = ChatRenderer(tokenizer, ChatFormat.of(chat), start_id=facts.start_id)
            self.chat_template = template_to_export(self.renderer)
        self.tokenizer = tokenizer
        self.longest_token = max(map(len, self.tokenizer.vocab.values()))

    def facts(self) -> ModelFacts:
        """Return what is known of the served checkpoint.

        Raises:
            ApiError: 503, it is still being loaded.
        """
        if self.status.facts is None:
            raise of_engine(EngineGone(f"the engine is {self.status.state}"))
        return self.status.facts

    def tokens(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            ApiError: 503, it is still being loaded.
        """
        if self.tokenizer is None:
            raise of_engine(EngineGone(f"the engine is {self.status.state}"))
        return self.tokenizer

    @property
    def name(self) -> str:
        """The model's name: the configured one, or else that of the run."""
        if self.config.name is not None:
            return self.config.name
        path = Path(self.facts().path)
        home = path.parent.parent if path.parent.name == "checkpoints" else path
        return home.name.replace(_CHECKPOINT, "-") or "model"

    def names(self) -> list[str]:
        """Return every name that a request may give as its model: the served one first, then kept checkpoints."""
        return [self.name, *(f"{self.name}{_CHECKPOINT}{one}" for one in self.engine.checkpoints())]

    def checkpoint_of(self, model: str | None) -> str:
        """Return the checkpoint that a request's `model` means; "" is the one that is served.

        Raises:
            ApiError: 404, another name than those of `names`.
        """
        if model is None or model == self.name:
            return ""
        name, at, checkpoint = model.partition(_CHECKPOINT)
        if name == self.name and at and checkpoint in self.engine.checkpoints():
            return checkpoint
        known = ", ".join(self.names()[:4])
        raise ApiError(
            404, f"model {model[:80]!r} is not served here; there is {known}", param="model", code="model_not_found"
        )

    def submit(self, requests: Sequence[TextRequest]) -> Sequence[TextStream]:
        """Hand texts to the engine, all or none.

        Raises:
            ApiError: 429, 503 or 404, as the engine says.
        """
        try:
            return self.engine.submit(requests)
        except (QueueFull, EngineGone, UnknownCheckpoint) as error:
            raise of_engine(error) from None


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token as text; one that is not whole characters is `bytes:` with the escapes of its bytes.

    That is OpenAI's form. With U+FFFD instead, different tokens would be one key of `top_logprobs`.
    """
    data = token_bytes(tokenizer, token_id)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Return a token's bytes; an id that the tokenizer lacks, which a larger model may have, spells none."""
    return tokenizer.vocab.get(token_id, b"")


def model_card(served: Served, name: str) -> dict[str, Any]:
    """Return what /v1/models says about one name."""
    facts = served.facts()
    checkpoint = name.partition(_CHECKPOINT)[2] or facts.checkpoint
    step = facts.step if checkpoint == facts.checkpoint else int(checkpoint.rpartition("-")[2])
    card: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "transformerlm",
        "max_model_len": facts.context_length,
        "checkpoint": checkpoint,
        "step": step,
        "parameters": facts.parameters,
        "vocab_size": facts.vocab_size,
        "max_logprobs": served.config.limits.logprobs,
    }
    if step == facts.step:
        card |= {
            "val_loss": facts.val_loss,
            "precision": facts.precision,
            "device": facts.device,
            "system_fingerprint": facts.fingerprint,
        }
    return card
