"""POST /v1/chat/completions: an answer to a conversation, in the format that the model was trained on.

A conversation becomes a prompt of ids here; all else is `completions`, whose texts are told as messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from transformerlm.serving.api_schema import ChatRequest, CompletionRequest, TextKeys, parsed
from transformerlm.serving.chat_choices import chat_shape
from transformerlm.serving.completions import answer, planned
from transformerlm.serving.errors import ApiError
from transformerlm.serving.served import Served
from transformerlm.serving.texts_plan import Plan, Prompt, Turn, check_length, plan_texts
from transformerlm.tokenizer.chat import ChatRenderer, Message
from transformerlm.utils.strings import whole_characters

_NO_CHAT = (
    "the model has no chat format, since it was not trained on conversations; use /v1/completions, or serve a model "
    "that was (docs/chat.md)"
)


async def chat_completions(request: Request) -> Response:
    """Answer one request for the next message of a conversation."""
    served: Served = request.app.state.served
    body = await request.body()
    served.tokens()  # until it is loaded nobody knows whether there is a format
    renderer = served.renderer
    if renderer is None:
        raise ApiError(404, _NO_CHAT, code="no_chat_format")
    asked = await parsed(ChatRequest, body)
    plan = await planned(body, partial(plan_answer, served, renderer, asked))
    return await answer(request, plan, chat_shape(renderer.end_strings))


def plan_answer(served: Served, renderer: ChatRenderer, asked: ChatRequest) -> Plan:
    """Return the texts that a conversation asks for.

    Raises:
        ApiError: 400 for a conversation that is too long, or in an order that the model never saw, and as `plan_texts`.
    """
    messages = _messages(asked)
    num_logprobs = _num_logprobs(asked)
    wanted, name = _max_tokens(asked)
    try:
        check_length(served, "".join(content for _, content in messages))
        kept = _kept(served, renderer, messages, wanted)
        prompt = Prompt(renderer.prompt(kept).tolist(), "")
        context_length = served.facts().context_length
        slid = context_length // 2 if served.config.limits.overflow == "slide" else 1  # what `fitting` makes room for
        room = max(slid, context_length - len(prompt.ids) + 1)
        keys: dict[str, Any] = {key: getattr(asked, key) for key in TextKeys.model_fields if key != "stream_options"}
        keys["max_tokens"] = min(room, served.config.limits.max_tokens) if wanted is None else wanted
        completion = CompletionRequest(**keys, logprobs=num_logprobs, stream_options=asked.stream_options)
        turn = Turn(
            prompt=prompt,
            end_ids=renderer.end_ids,
            end_strings=renderer.end_strings,
            num_left_out=len(messages) - len(kept),
        )
        return plan_texts(served, completion, turn)
    except ApiError as error:
        raise _renamed(error, {"prompt": "messages", "logprobs": "top_logprobs", "max_tokens": name}) from None


def _messages(asked: ChatRequest) -> list[Message]:
    """Return the messages as pairs; `developer` is OpenAI's newer word for `system`.

    Raises:
        ApiError: 400, there is a system message after another one.
    """
    messages: list[Message] = []
    for number, message in enumerate(asked.messages):
        role = "system" if message.role == "developer" else message.role
        if role == "system" and number:
            raise _refused("messages", f"messages.{number}: expected a system message at the beginning alone")
        messages.append((role, whole_characters(message.text)))
    return messages


def _num_logprobs(asked: ChatRequest) -> int | None:
    """Return how many alternatives each token is told with; None: no log-probabilities are asked for."""
    if asked.top_logprobs is not None and not asked.logprobs:
        raise _refused("top_logprobs", "top_logprobs: expected logprobs = true beside it")
    return (asked.top_logprobs or 0) if asked.logprobs else None


def _max_tokens(asked: ChatRequest) -> tuple[int | None, str]:
    """Return the most tokens of an answer, and the key that says so; None: what the context leaves."""
    new, old = asked.max_completion_tokens, asked.max_tokens
    if new is not None and old not in (None, new):
        message = f"max_tokens: expected the same as max_completion_tokens ({new}), or nothing, found {old}"
        raise _refused("max_tokens", message)
    return (old, "max_tokens") if new is None else (new, "max_completion_tokens")


def _kept(served: Served, renderer: ChatRenderer, messages: list[Message], max_tokens: int | None) -> Sequence[Message]:
    """Return the messages that the model reads: where long texts slide, without the oldest pairs, as in a terminal.

    Each message has a token at least, so more messages than the context has tokens are not even rendered.
    """
    context_length = served.facts().context_length
    is_long = len(messages) > context_length
    if served.config.limits.overflow != "slide":
        if is_long:
            message = f"messages: expected at most {context_length}, the tokens of the context, found {len(messages)}"
            raise ApiError(400, message, param="messages", code="context_length_exceeded")
        return messages
    if is_long:
        system = messages[:1] if messages[0][0] == "system" else []
        messages = [*system, *messages[len(messages) - context_length // 2 * 2 - 1 :]]  # whole pairs, and the last
    wanted = context_length if max_tokens is None else max_tokens
    return renderer.fitting(messages, context_length=context_length, max_tokens=wanted)


def _renamed(error: ApiError, names: dict[str, str]) -> ApiError:
    """Return an error about a key of completions as one about the chat's key for it."""
    name = names.get(error.param or "", error.param)
    message = error.message
    if name != error.param:
        message = f"{name}: {message.removeprefix(f'{error.param}: ')}"
    return ApiError(error.status, message, param=name, code=error.code, headers=error.headers)


def _refused(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
