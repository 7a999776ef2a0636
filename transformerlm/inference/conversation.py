"""A conversation with a model: its messages, and the answers to them, in the format that the model was trained on."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any, Self

from transformerlm.checkpoints.chat_format import chat_format_of, ids_with_chat, no_chat_format
from transformerlm.inference.predictor import Predictor
from transformerlm.tokenizer.chat import ChatFormat, ChatRenderer, Message
from transformerlm.utils.strings import check_is_no_string, whole_characters


class Conversation:
    """Messages and answers by one model; what a message says is plain text, whatever it spells.

    The token that ends an answer ends the predictor's texts from now on. Raises ValueError when the tokenizer lacks a
    special token of the format.
    """

    def __init__(self, predictor: Predictor, chat: ChatFormat, *, system: str | None = None) -> None:
        self.predictor = predictor
        self.renderer = ChatRenderer(predictor.tokenizer, chat, start_id=predictor.document_ids.start_id)
        predictor.document_ids = ids_with_chat(predictor.document_ids, self.renderer)
        self.system = None if system is None else whole_characters(system)
        """What the model is told before all messages; None: nothing."""
        self.turns: list[Message] = []
        """What user and assistant have said."""
        self.num_left_out = 0
        """How many of the oldest turns the last answer's prompt had no room for."""

    @classmethod
    def with_checkpoint(cls, predictor: Predictor, *, system: str | None = None) -> Self:
        """Return a conversation in the format of the checkpoint that the predictor was loaded from.

        Raises:
            ValueError: the checkpoint has no chat format.
        """
        assert predictor.checkpoint is not None, "it was not loaded from a checkpoint"
        chat = chat_format_of(predictor.checkpoint)
        if chat is None:
            raise no_chat_format(predictor.checkpoint)
        return cls(predictor, chat, system=system)

    @property
    def messages(self) -> list[Message]:
        """All messages, the system's first."""
        return [*([] if self.system is None else [("system", self.system)]), *self.turns]

    def reset(self) -> None:
        """Forget what was said; the system's message stays."""
        self.turns = []

    def stream(
        self,
        said: str,
        *,
        seed: int | None = None,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> Generator[str, None, None]:
        """Return the answer to a message, in pieces of whole characters as they come; both are kept in `turns`.

        An answer that nobody reads to its end is kept as far as it was read; if nothing of it was, its question is
        forgotten, too. Where the conversation does not fit the model's context beside the answer, the oldest pairs are
        left out of what the model reads. `sampling` is that of `Predictor.stream`.

        Raises:
            TypeError: `stop` is one string.
            ValueError: `min_tokens` for a model whose answers end with a string, or as `Predictor.stream`.
        """
        check_is_no_string(stop, "stop")
        ends = self.renderer.end_strings if sampling.get("stop_at_eos", True) else ()
        if ends and sampling.get("min_tokens"):
            raise ValueError(
                "min_tokens: expected 0, since this model's answers end with a string, not a token, and cannot be made "
                f"longer, found {sampling['min_tokens']}"
            )
        asked: Message = ("user", whole_characters(said))
        messages = [*self.messages, asked]
        context_length = self.predictor.model.context_length
        kept = self.renderer.fitting(messages, context_length=context_length, max_tokens=max_new_tokens)
        self.num_left_out = len(messages) - len(kept)
        pieces = self.predictor.stream(
            self.renderer.prompt(kept).tolist(),
            seed=seed,
            max_new_tokens=max_new_tokens,
            stop=[*stop, *ends],
            **sampling,
        )
        return self._answer(asked, pieces)

    def _answer(self, asked: Message, pieces: Iterator[str]) -> Generator[str, None, None]:
        read: list[str] = []
        is_whole = False
        try:
            for piece in pieces:
                read.append(piece)
                yield piece
            is_whole = True
        finally:
            if read or is_whole:
                self.turns = [*self.turns, asked, ("assistant", "".join(read))]
