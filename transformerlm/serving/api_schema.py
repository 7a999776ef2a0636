"""What a client may send: strict schemas of the requests' bodies, and answers for every key that is not in them.

A key that is silently ignored is the worst answer, since the text is then made with other settings than the client
thinks. So a key that could change the text and that the server does not know, or does not do, is an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from config.keys import describe_value
from config.suggest import hint
from transformerlm.serving.errors import ApiError
from transformerlm.utils.json_files import json_kind, levels, parse_json_object

# Keys of OpenAI's API and its kin that cannot change a text.
IGNORED = ("user", "metadata", "store", "safety_identifier", "service_tier", "priority")
# Keys of OpenAI's or vLLM's that are not done, each with what to do instead.
NOT_DONE = {
    "suffix": "the model continues texts and cannot fill a gap",
    "tools": "the model writes texts and calls no tools",
    "tool_choice": "the model writes texts and calls no tools",
    "parallel_tool_calls": "the model writes texts and calls no tools",
    "functions": "the model writes texts and calls no tools",
    "function_call": "the model writes texts and calls no tools",
    "web_search_options": "the model writes texts and calls no tools",
    "messages": "conversations are for /v1/chat/completions; give the text to continue as prompt",
    "response_format": "texts have no other format than text",
    "modalities": "the model writes texts alone",
    "audio": "the model writes texts alone",
    "prediction": "each token is drawn",
    "reasoning_effort": "the model answers at once",
    "verbosity": "a system message says how to answer",
    "chat_template": "the model has the chat format that it was trained with",
    "chat_template_kwargs": "the model has the chat format that it was trained with",
    "add_generation_prompt": "the assistant's answer is always a message of its own",
    "continue_final_message": "the assistant's answer is always a message of its own",
    "guided_json": "texts are not bound to a grammar",
    "guided_regex": "texts are not bound to a grammar",
    "guided_choice": "texts are not bound to a grammar",
    "guided_grammar": "texts are not bound to a grammar",
    "structured_outputs": "texts are not bound to a grammar",
    "prompt_logprobs": "echo with logprobs gives the log-probabilities of the prompt",
    "use_beam_search": "texts are drawn, or greedy with temperature = 0",
    "length_penalty": "texts are drawn, or greedy with temperature = 0",
    "stop_token_ids": "stop takes strings, and the model's own end tokens end a text unless ignore_eos is given",
    "bad_words": "logit_bias of -100 bans a token",
    "allowed_token_ids": "logit_bias of -100 bans a token",
    "include_stop_str_in_output": "a text ends before its stop string",
    "skip_special_tokens": "special tokens are spelled out",
    "spaces_between_special_tokens": "special tokens are spelled out",
    "truncate_prompt_tokens": "limits.overflow in the server's TOML says what happens to long prompts",
    "echo_prompt": "the key is echo",
}
_SYNONYMS = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_length": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "num_return_sequences": "n",
    "num_samples": "n",
    "repeat_penalty": "repetition_penalty",
    "n_probs": "logprobs",
    "top_logprobs": "logprobs",
    "stop_sequences": "stop",
    "random_seed": "seed",
    "texts": "prompt",
    "input": "prompt",
    "prompt": "messages",
    "best_of": "n",
}
MAX_BIASES = 1024
LONG_BODY = 50_000  # bytes; reading a longer one in the event loop would delay the streams of others


class Body(BaseModel):
    """The body of a request: strict, as the configuration is."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Body):
    """What a streamed answer holds besides the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


# Of a long list with many faults the first is enough: an answer names one.
Ids = Annotated[list[StrictInt], Field(fail_fast=True)]
Strings = Annotated[list[StrictStr], Field(fail_fast=True)]
Prompts = StrictStr | Strings | Ids | Annotated[list[Ids], Field(fail_fast=True)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class TextKeys(Body):
    """What every request for texts may hold: OpenAI's parameters, and vLLM's names for what OpenAI has not."""

    model: str | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Bias] | None = Field(None, max_length=MAX_BIASES)
    max_tokens: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StrictStr | Strings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)  # logits divided by less would not stay finite
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    return_token_ids: bool | None = None


class CompletionRequest(TextKeys):
    """POST /v1/completions: OpenAI's parameters, and vLLM's names for what OpenAI has not. None: the default."""

    prompt: Prompts | None = None
    best_of: int | None = Field(None, ge=1)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0)
    allow_special: bool | None = None
    add_special_tokens: bool | None = None


class TextPart(Body):
    """A part of what a message says."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """A message; keys that may only be null are those of an answer, which clients send back as they got it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @property
    def text(self) -> str:
        """What the message says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(Body):
    """The only format of an answer."""

    type: Literal["text"]


class ChatRequest(TextKeys):
    """POST /v1/chat/completions: OpenAI's parameters, and vLLM's names for what OpenAI has not. None: the default."""

    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=0)
    modalities: list[Literal["text"]] | None = None
    response_format: TextFormat | None = None


class TokenizeRequest(Body):
    """POST /tokenize: vLLM's keys; `allow_special` reads special tokens spelled out in the text as tokens."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    allow_special: bool | None = None


class DetokenizeRequest(Body):
    """POST /detokenize: vLLM's keys."""

    model: str | None = None
    tokens: Ids


Schema = TypeVar("Schema", bound=Body)


def parse(schema: type[Schema], data: bytes) -> Schema:
    """Return a request's body, checked.

    Raises:
        ApiError: 400, with the name of the first wrong key in `param`.
    """
    try:
        tree = parse_json_object(data.decode("utf-8"), where="body")
    except UnicodeDecodeError as error:
        found = f"byte {data[error.start]:#04x} at offset {error.start}"
        raise ApiError(400, f"body: expected JSON in UTF-8, found {found}", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_json") from None
    known = list(schema.model_fields)
    for name in [name for name in tree if name not in known]:
        if name not in IGNORED and not (name in NOT_DONE and tree[name] is None):
            raise _unknown(name, known)
        del tree[name]
    if wide := next((name for name, value in tree.items() if _is_wide(value)), None):
        message = f"{wide}: expected at most {MAX_BIASES} keys in an object, found more"
        raise ApiError(400, message, param=wide, code="invalid_value")
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise _invalid(error, schema) from None


def _is_wide(value: Any) -> bool:
    """Return whether an object at any depth has so many keys that listing what is wrong with each takes long."""
    return any(isinstance(one, dict) and len(one) > MAX_BIASES for level in levels(value) for one in level)


async def parsed(schema: type[Schema], data: bytes) -> Schema:
    """Return a request's body, checked as `parse` does: in a thread where others would wait for a long one."""
    return await asyncio.to_thread(parse, schema, data) if len(data) > LONG_BODY else parse(schema, data)


def _unknown(name: str, known: list[str]) -> ApiError:
    shown = name[:80]
    if name in NOT_DONE:
        return ApiError(400, f"{shown} is not supported: {NOT_DONE[name]}", param=shown, code="unsupported_parameter")
    meant = _SYNONYMS.get(name)
    maybe = f" (did you mean {meant}?)" if meant in known else hint(shown, known, sections=False)
    return ApiError(400, f"{shown!r} is not a known key{maybe}", param=shown, code="unknown_parameter")


def _invalid(error: ValidationError, schema: type[Body]) -> ApiError:
    """Return the first problem; a key with several types has one for each, of which its own words are better."""
    problems = error.errors(include_url=False)
    first = problems[0]
    names = [str(part) for part in first["loc"]]
    key = names[0] if names else "body"
    if key == "stream_options" and first["type"] == "extra_forbidden":
        return _unknown(names[1], list(StreamOptions.model_fields))
    if key == "messages" and len(names) > 2:
        return _invalid_message(problems, names[:3])
    expected = _EXPECTED.get(key)
    if first["type"] == "missing":
        return ApiError(400, f"{key}: expected {expected or 'a value'}, found none", param=key, code="missing")
    if expected is None or "expected " in first["msg"]:
        expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        expected = expected[:1].lower() + expected[1:]
    where = key if key in _EXPECTED else ".".join(names)[:80]
    return ApiError(
        400, f"{where}: expected {expected}, found {_shown(first['input'])}", param=key, code="invalid_value"
    )


def _invalid_message(problems: Sequence[Mapping[str, Any]], place: list[str]) -> ApiError:
    """Return the problem of one key of a message: of content's several types, the one that was nearest."""
    of_key = [one for one in problems if [str(part) for part in one["loc"][:3]] == place]
    nearest, key = max(of_key, key=lambda one: len(one["loc"])), place[2]
    where = f"messages.{place[1]}"
    if nearest["type"] == "extra_forbidden" and len(nearest["loc"]) == 3:
        maybe = hint(key[:80], ["role", "content"], sections=False)
        return ApiError(
            400, f"{where}: {key[:80]!r} is not a known key{maybe}", param="messages", code="unknown_parameter"
        )
    found = "none" if nearest["type"] == "missing" else _shown(nearest["input"])
    expected = _EXPECTED_OF_MESSAGE.get(key, "null")
    return ApiError(400, f"{where}.{key}: expected {expected}, found {found}", param="messages", code="invalid_value")


def _shown(value: Any) -> str:
    return json_kind(value) if isinstance(value, dict | list) or value is None else describe_value(value)


_EXPECTED = {
    "prompt": "a string, a list of strings, a list of token ids, or a list of lists of token ids",
    "stop": "a string or a list of strings",
    "tokens": "a list of token ids",
    "messages": "a list of at least one message with role and content",
}
_EXPECTED_OF_MESSAGE = {
    "role": "system, user or assistant",
    "content": 'text, or a list of parts such as {"type": "text", "text": "..."}',
}
