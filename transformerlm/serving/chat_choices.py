"""What a client is told of one answer of a chat: a choice of `choices`, as a message, and its parts as deltas."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformerlm.serving.choices import LEAST_LOGPROB, ChoiceWriter, Places, Shape
from transformerlm.serving.engine import Logprobs
from transformerlm.serving.served import token_bytes, token_text

_ROLE = "assistant"


class ChatWriter(ChoiceWriter):
    """The parts of one answer; log-probabilities are told a token at a time, each with its bytes."""

    logprob_keys = ("content",)

    def add(self, to: dict[str, list[Any]], logprobs: Logprobs, places: Places) -> None:
        """Add the log-probabilities at some places to the list of a part."""
        for token_id, logprob, top in zip(logprobs.token_ids, logprobs.logprobs, logprobs.top, strict=True):
            assert logprob is not None, "only a prompt has a place without one, and a chat scores none"
            alternatives = [self._token(*one) for one in top]
            to["content"].append({**self._token(token_id, logprob), "top_logprobs": alternatives})

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(self.tokenizer, token_id),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(token_bytes(self.tokenizer, token_id)),
        }


def chat_shape(end_strings: tuple[str, ...]) -> Shape:
    """Return the shape of chats; `end_strings` are the format's own, of which a client is not told."""
    return Shape(
        whole_name="chat.completion",
        part_name="chat.completion.chunk",
        writer=ChatWriter,
        whole_choice=partial(_whole_choice, end_strings),
        part=partial(_part, end_strings),
        opening=_opening,
    )


def _whole_choice(end_strings: tuple[str, ...], choice: dict[str, Any]) -> dict[str, Any]:
    message = {"role": _ROLE, "content": choice["text"], "refusal": None}
    return {"index": choice["index"], "message": message, **_rest(end_strings, choice)}


def _part(end_strings: tuple[str, ...], part: dict[str, Any]) -> dict[str, Any]:
    delta = {"content": part["text"]} if part["text"] else {}
    return {"index": part["index"], "delta": delta, **_rest(end_strings, part)}


def _rest(end_strings: tuple[str, ...], choice: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in choice.items() if name not in ("index", "text", "top_token_ids")}
    if rest["stop_reason"] in end_strings:
        rest["stop_reason"] = None
    if rest["logprobs"] is not None:
        rest["logprobs"] = {**rest["logprobs"], "refusal": None}
    return rest


def _opening(number: int) -> list[dict[str, Any]]:
    """Return the part of each choice that says who speaks."""
    delta = {"role": _ROLE, "content": ""}
    return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for index in range(number)]
