"""Conversations as ids: one function renders messages, for data, for training and for whoever answers.

What a message says is plain text, whatever it spells: only the format's own strings may be special tokens. So no
message can end another one's turn, or begin one. What the assistant says, and the string that ends its message, is
learnt; nothing else is.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from transformerlm.tokenizer.pretokenize import SpecialTokenSplitter
from transformerlm.tokenizer.tokenizer import Tokenizer

Message = tuple[str, str]
"""A role, which is system, user or assistant, and a content."""


@dataclass(frozen=True)
class ChatFormat:
    """The strings around messages; the defaults are ChatML.

    A message is `system`, `user` or `assistant`, by its role, then its content, `end` and `after`. `special_tokens` are
    those of the strings that must be special tokens of the tokenizer.
    """

    system: str = "<|im_start|>system\n"
    user: str = "<|im_start|>user\n"
    assistant: str = "<|im_start|>assistant\n"
    end: str = "<|im_end|>"
    after: str = "\n"
    special_tokens: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> ChatFormat:
        """Return the format that `to_json` wrote.

        Raises:
            TypeError: a key that does not exist.
        """
        return cls(**{**record, "special_tokens": tuple(record.get("special_tokens", ()))})

    @property
    def strings(self) -> dict[str, str]:
        """The strings around messages, by their names."""
        return {name: getattr(self, name) for name in ("system", "user", "assistant", "end", "after")}

    def to_json(self) -> dict[str, Any]:
        """Return the format as a sidecar and a checkpoint keep it."""
        return {**asdict(self), "special_tokens": list(self.special_tokens)}

    def check(self, tokenizer: Tokenizer, *, separator: str | None = None) -> None:
        """Refuse a tokenizer that lacks one of the special tokens, and a separator that the format itself uses.

        Raises:
            ValueError: it is one of these.
        """
        if missing := [token for token in self.special_tokens if token not in tokenizer.special_token_ids]:
            known = ", ".join(map(repr, tokenizer.special_tokens)) or "none at all"
            raise ValueError(
                f"chat.special_tokens: expected special tokens of the tokenizer ({known}), found {missing[0]!r}; add "
                "it with transformerlm-add-tokens, train a tokenizer with it in special_tokens, or set "
                "chat.special_tokens to those that the strings hold ([]: none, all is plain text)"
            )
        used = [name for name, text in self.strings.items() if separator in self.special_tokens and separator in text]
        if used:
            raise ValueError(
                f"chat.{used[0]}: expected a string without {separator!r}, which separates the documents and would cut "
                "a conversation apart, found it there; name another special token as separator"
            )

    def warn_of_unlisted(self, tokenizer: Tokenizer) -> None:
        """Warn if a string holds a special token of the tokenizer that is plain text there, as it is not listed."""
        for name, text in self.strings.items():
            for token in tokenizer.special_tokens:
                if token in text and not any(token in listed for listed in self.special_tokens):
                    warnings.warn(
                        f"chat.{name} spells the special token {token!r}, which is plain text there; list it in "
                        "chat.special_tokens to make it that token",
                        stacklevel=3,
                    )


class ChatRenderer:
    """Renders conversations as ids by a format; its strings are encoded once.

    `start_id` begins a prompt: in training a conversation follows the token that separates documents.

    Raises:
        ValueError: the tokenizer lacks a special token of the format.
    """

    def __init__(self, tokenizer: Tokenizer, chat: ChatFormat, *, start_id: int | None = None) -> None:
        chat.check(tokenizer)
        self.tokenizer, self.chat, self.start_id = tokenizer, chat, start_id
        self._start = np.array([] if start_id is None else [start_id], dtype=np.uint32)
        self._strings = {name: np.array(self._encoded(text), dtype=np.uint32) for name, text in chat.strings.items()}

    def render(self, messages: Sequence[Message]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
        """Return the ids of a conversation, and which of them are learnt, each `(tokens,)`."""
        ids, learnt, _ = self.render_all([messages])
        return ids, learnt

    def prompt(self, messages: Sequence[Message]) -> npt.NDArray[np.uint32]:
        """Return the ids after which the assistant answers: those of the messages, and the beginning of its own."""
        return np.concatenate([self._start, self.render(messages)[0], self._strings["assistant"]])

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The special token that ends an answer, if the format's `end` begins with one."""
        found = (token for token in self.chat.special_tokens if self.chat.end.startswith(token))
        return tuple(self.tokenizer.special_token_ids[token] for token in sorted(found, key=len)[-1:])

    @property
    def end_strings(self) -> tuple[str, ...]:
        """The string that ends an answer, if no special token does."""
        return () if self.end_ids else (self.chat.end,)

    def fitting(self, messages: Sequence[Message], *, context_length: int, max_tokens: int) -> list[Message]:
        """Return the messages that leave room for an answer: without the oldest pairs, but with the system's.

        The room is `max_tokens`, but at most half of the context. The last message always stays, however long it is.
        """
        room = context_length + 1 - max(1, min(max_tokens, context_length // 2))  # the last token is not read
        kept, (_, _, ends) = list(messages), self.render_all([[one] for one in messages])
        sizes = np.diff(ends, prepend=0).tolist()
        total = len(self._start) + sum(sizes) + len(self._strings["assistant"])
        first = 1 if kept and kept[0][0] == "system" else 0
        while len(kept) > first + 1 and (total > room or (len(kept) < len(messages) and kept[first][0] == "assistant")):
            total -= sizes.pop(first)
            del kept[first]
        return kept

    def render_all(
        self, conversations: Sequence[Sequence[Message]]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Return ids and what is learnt of conversations, one after the other, and where each ends."""
        contents = [content for messages in conversations for _, content in messages]
        encoded, content_ends = self.tokenizer.encode_batch_to_array(contents, allow_special=False)
        texts = iter(np.split(encoded, content_ends[:-1]) if contents else [])
        ids, learnt, ends = [np.empty(0, dtype=np.uint32)], [np.empty(0, dtype=np.bool_)], []
        total = 0
        for messages in conversations:
            for role, _ in messages:
                said = next(texts)
                parts = (self._strings[role], said, self._strings["end"], self._strings["after"])
                is_learnt = (False, role == "assistant", role == "assistant", False)
                for part, yes in zip(parts, is_learnt, strict=True):
                    ids.append(part.astype(np.uint32, copy=False))
                    learnt.append(np.full(len(part), yes))
                    total += len(part)
            ends.append(total)
        return np.concatenate(ids), np.concatenate(learnt), np.array(ends, dtype=np.int64)

    def _encoded(self, text: str) -> list[int]:
        """Return the ids of a string of the format: its special tokens, the longest first; the rest is plain text."""
        ids: list[int] = []
        for segment, is_special in SpecialTokenSplitter(self.chat.special_tokens).split(text):
            ids += (
                [self.tokenizer.special_token_ids[segment]] if is_special else self.tokenizer.encode_ordinary(segment)
            )
        return ids
