"""What a client is told of one text: pieces of the engine become parts of a choice, and parts become a whole one.

A whole answer is the parts of the streamed one, put together, so the two cannot differ.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformerlm.serving.engine import Logprobs, Piece
from transformerlm.serving.served import token_bytes, token_text
from transformerlm.serving.texts_plan import Plan, Prompt
from transformerlm.tokenizer.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON has no number for; vLLM's, too."""


class ChoiceWriter:
    """The parts of one choice, made from the pieces of its text."""

    logprob_keys: tuple[str, ...] = ("tokens", "token_logprobs", "top_logprobs", "text_offset")

    def __init__(self, plan: Plan, index: int, prompt: Prompt, tokenizer: Tokenizer) -> None:
        self.index, self.prompt = index, prompt
        self.num_tokens, self.num_reused = 0, 0
        self.fingerprint = ""
        self.sum_logprobs, self.num_logprobs = 0.0, 0
        self._asked, self.tokenizer = plan.asked, tokenizer
        self._num_told = 0
        self._is_first = True
        self._places = Places(tokenizer, len(prompt.text) if plan.asked.echo else 0)

    def part(self, piece: Piece) -> dict[str, Any]:
        """Return what a piece adds to the choice; `finish_reason` is None until the last one."""
        self.num_tokens = max(self.num_tokens, piece.num_tokens)
        self.num_reused = max(self.num_reused, piece.num_prompt_reused)
        self.fingerprint = piece.fingerprint or self.fingerprint
        text = piece.text
        logprobs: dict[str, list[Any]] = {key: [] for key in self.logprob_keys}
        if self._is_first and self._asked.echo:
            text = self.prompt.text + text
        if piece.prompt_logprobs is not None:
            places = Places(self.tokenizer, 0, num_hidden=self.prompt.num_hidden)
            self.add(logprobs, piece.prompt_logprobs, places)
        if piece.logprobs is not None:
            self._count(piece.logprobs)
            self.add(logprobs, piece.logprobs, self._places)
        self._num_told += len(piece.token_ids)
        if piece.finish == "stop" and self._num_told < self.num_tokens:
            self._add_end(logprobs, piece.end)
        part: dict[str, Any] = {
            "index": self.index,
            "text": text,
            "logprobs": None if self._asked.logprobs is None else logprobs,
            "finish_reason": piece.finish or None,
            "stop_reason": piece.stop_string,
        }
        if piece.finish or self._is_first:
            part["step"] = piece.step
        if self._asked.return_token_ids:
            part["token_ids"] = list(piece.token_ids)
            if self._asked.logprobs is not None:
                known = (piece.prompt_logprobs, piece.logprobs, piece.end)
                part["top_token_ids"] = [one for each in known for one in self._ids_of(each)]
            if self._is_first:
                part["prompt_token_ids"] = self.prompt.ids
        self._is_first = False
        return part

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of the drawn tokens, by which best_of ranks."""
        return self.sum_logprobs / self.num_logprobs if self.num_logprobs else 0.0

    def _count(self, logprobs: Logprobs) -> None:
        known = [one for one in logprobs.logprobs if one is not None]
        self.sum_logprobs += sum(known)
        self.num_logprobs += len(known)

    def add(self, to: dict[str, list[Any]], logprobs: Logprobs, places: Places) -> None:
        """Add the log-probabilities at some places to the lists of a part."""
        for token_id, logprob, top in zip(logprobs.token_ids, logprobs.logprobs, logprobs.top, strict=True):
            to["tokens"].append(token_text(self.tokenizer, token_id))
            to["token_logprobs"].append(None if logprob is None else max(logprob, LEAST_LOGPROB))
            to["top_logprobs"].append(self._alternatives(token_id, logprob, top))
            to["text_offset"].append(places.of(token_id))

    def _add_end(self, to: dict[str, list[Any]], end: Logprobs | None) -> None:
        """Add the end token, which is drawn as the others are and has no text.

        Without it a client that cuts the drawn tokens off, as lm-eval does, would cut off one of the prompt.
        """
        if end is not None:
            self._count(end)
            place = self._places.of(None)
            self.add(to, end, Places(self.tokenizer, place))

    def _ids_of(self, logprobs: Logprobs | None) -> list[dict[str, int] | None]:
        """Return which id each key of `top_logprobs` is, for clients that go on from another token than was drawn."""
        if logprobs is None:
            return []
        found: list[dict[str, int] | None] = []
        for token_id, logprob, top in zip(logprobs.token_ids, logprobs.logprobs, logprobs.top, strict=True):
            ids = [*(one for one, _ in top), token_id]
            found.append(None if logprob is None else {token_text(self.tokenizer, one): one for one in ids})
        return found

    def _alternatives(
        self, token_id: int, logprob: float | None, top: Sequence[tuple[int, float]]
    ) -> dict[str, float] | None:
        """Return the most likely tokens with their log-probabilities, the drawn one among them; None: none is known."""
        if logprob is None:
            return None
        pairs = [*top] if any(one == token_id for one, _ in top) else [*top, (token_id, logprob)]
        return {token_text(self.tokenizer, one): max(value, LEAST_LOGPROB) for one, value in pairs}


class Places:
    """Where tokens begin in a text, in characters; a token that begins within a character begins where that does."""

    def __init__(self, tokenizer: Tokenizer, start: int, *, num_hidden: int = 0) -> None:
        self._tokenizer, self._place, self._num_hidden = tokenizer, start, num_hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def of(self, token_id: int | None) -> int:
        """Return the place of the next token; the first `num_hidden` are not in the text, nor is None."""
        place = self._place
        if self._num_hidden:
            self._num_hidden -= 1
        elif token_id is not None:
            self._place += len(self._decoder.decode(token_bytes(self._tokenizer, token_id)))
        return place


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a whole choice from all its parts, in order."""
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if key == "logprobs" and value is not None:
                _extend(whole.setdefault(key, {}), value)
            elif key in ("token_ids", "top_token_ids"):
                _extend(whole, {key: value})
            else:
                whole[key] = value
    return whole | {"text": "".join(part["text"] for part in parts)}


def _extend(lists: dict[str, list[Any]], more: Mapping[str, list[Any]]) -> None:
    """Add to the end of each list; a text has a part for each token, so none is copied whole."""
    for key, values in more.items():
        lists.setdefault(key, []).extend(values)


def best(choices: list[tuple[float, dict[str, Any]]], n: int) -> list[dict[str, Any]]:
    """Return the n choices with the highest scores, the best first; of equal ones the earlier."""
    return [choice for _, choice in sorted(choices, key=lambda pair: -pair[0])[:n]]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How an API tells texts: what its answers are called, and what becomes of a choice and of each part of one."""

    whole_name: str
    part_name: str
    writer: type[ChoiceWriter]
    whole_choice: Callable[[dict[str, Any]], dict[str, Any]]
    part: Callable[[dict[str, Any]], dict[str, Any]]
    opening: Callable[[int], list[dict[str, Any]]]
    """What a stream of so many choices begins with."""


COMPLETION = Shape(
    whole_name="text_completion",
    part_name="text_completion",
    writer=ChoiceWriter,
    whole_choice=lambda choice: choice,
    part=lambda part: part,
    opening=lambda number: [],
)
