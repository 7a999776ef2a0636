"""GET /openapi.json: all routes as an OpenAPI 3.1 document, from the schemas by which requests are checked.

What is described here is what is done: a test asks a server for all that the document allows, and checks its answers
against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from config.serve import ServeConfig
from transformerlm.serving.api_schema import (
    IGNORED,
    NOT_DONE,
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from transformerlm.serving.errors import JsonAnswer
from transformerlm.serving.served import Served

Json = dict[str, Any]
_REF = "#/components/schemas/{model}"
_TEXT, _WHOLE, _REAL, _YES_NO = {"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}
_ANY: Json = {}


def routes() -> list[Route]:
    """Return the route of the document."""
    return [Route("/openapi.json", document, methods=["GET"])]


async def document(request: Request) -> Response:
    """Answer the document of the routes that this server has."""
    served: Served = request.app.state.served
    return JsonAnswer(openapi(served.config, request.app.routes))


def openapi(config: ServeConfig, served_routes: Sequence[BaseRoute]) -> Json:
    """Return the document; a route that it does not know, as those of the page's files, is not in it."""
    known = _operations(config)
    paths: Json = {}
    for route in served_routes:
        assert isinstance(route, Route), route
        path = route.path.replace(":path}", "}")
        if path in known:
            method = "post" if "POST" in (route.methods or ()) else "get"
            paths[path] = {method: known[path]}
    schemas: Json = {}
    for kind in (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest):
        schemas |= _request_schemas(kind)
    document: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": "transformerlm-serve",
            "version": "1",
            "description": "OpenAI's completions and chat API over a model, and what its page asks for.",
        },
        "paths": paths,
        "components": {"schemas": {**schemas, **_ANSWERS}},
    }
    if config.access.key_env is not None:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


# --- requests --------------------------------------------------------------------------------------------------------


def _request_schemas(kind: type[Body]) -> Json:
    """Return the schema of a body, and those that it needs, by their names."""
    schema = kind.model_json_schema(ref_template=_REF)
    parts: Json = schema.pop("$defs", {})
    # Keys that are taken and change nothing, and those that may only be null.
    schema["properties"] |= dict.fromkeys(IGNORED, _ANY)
    not_done = {name: why for name, why in NOT_DONE.items() if name not in kind.model_fields}
    schema["properties"] |= {name: {"type": "null", "description": why} for name, why in not_done.items()}
    return {kind.__name__: schema, **parts}


def _operations(config: ServeConfig) -> Json:
    """Return each path's operation."""
    complete = _post("Texts that go on from prompts, whole or as events", CompletionRequest, "Completion")
    chat = _post("Answers to a conversation, whole or as events", ChatRequest, "ChatCompletion")
    chat["responses"]["404"] = _error("the model has no chat format, or there is no such model")
    for one in (complete, chat):
        one["responses"]["200"]["content"]["text/event-stream"] = {"schema": _ANY}
        for status, words in (("429", "too many texts wait"), ("500", "a text failed"), ("504", "it took too long")):
            one["responses"][status] = _error(words)
    model = _get("One model", "Model")
    model["parameters"] = [_parameter("name", _TEXT, where="path")]
    run = _parameter("run", _TEXT)
    places = [_parameter(one, {"type": "integer", "minimum": 0}, required=False) for one in ("offset", "every")]
    health = _get("How the engine does", "Health")
    health["responses"]["503"] = _answer("it makes no tokens now", "Health")
    operations = {
        "/v1/completions": complete,
        "/v1/chat/completions": chat,
        "/v1/models": _get("All models", "Models"),
        "/v1/models/{name}": model,
        "/health": health,
        "/metrics": _get("Numbers for Prometheus", None, kind="text/plain"),
        "/openapi.json": _get("This document", None, kind="application/json"),
        "/tokenize": _post("A text as tokens", TokenizeRequest, "Tokens"),
        "/detokenize": _post("Tokens as a text", DetokenizeRequest, "Text"),
        "/tokenizer_info": _get("The tokenizer", "TokenizerInfo"),
        "/api/runs": _get("The runs below web.runs_dir", "Runs"),
        "/api/run": _get("A run's configuration and checkpoints", "Run", [run]),
        "/api/lines": _get("Lines of a run", "Lines", [run, _parameter("file", _TEXT, required=False), *places]),
        "/api/differences": _get(
            "In which keys configurations differ",
            "Differences",
            [_parameter("run", {"type": "array", "items": _TEXT, "minItems": 2, "maxItems": 32})],
        ),
        "/api/events": _get("What changes, as server-sent events", None, kind="text/event-stream"),
    }
    if config.access.key_env is not None:
        for one in operations.values():
            one["responses"]["401"] = _error("the key is missing or wrong")
    return operations


def _get(summary: str, answer: str | None, parameters: list[Json] | None = None, *, kind: str = "") -> Json:
    plain = {"description": "the answer", "content": {kind: {"schema": _ANY}}}
    return {
        "summary": summary,
        "parameters": parameters or [],
        "responses": {
            "200": plain if answer is None else _answer("", answer),
            **_errors("400", "403", "404", "503"),
        },
    }


def _post(summary: str, body: type[Body], answer: str) -> Json:
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(body.__name__)}}},
        "responses": {"200": _answer("", answer), **_errors("400", "403", "404", "413", "503")},
    }


def _parameter(name: str, schema: Json, *, where: str = "query", required: bool = True) -> Json:
    return {"name": name, "in": where, "required": required, "schema": schema}


def _answer(words: str, schema: str) -> Json:
    return {"description": words or "the answer", "content": {"application/json": {"schema": _ref(schema)}}}


_WORDS = {
    "400": "the request is wrong; param names the key",
    "403": "Host or Origin is not allowed",
    "404": "there is no such thing",
    "413": "the body is too large",
    "503": "the engine makes no tokens now",
}


def _errors(*statuses: str) -> Json:
    return {status: _error(_WORDS[status]) for status in statuses}


def _error(words: str) -> Json:
    return _answer(words, "Error")


def _ref(name: str) -> Json:
    return {"$ref": _REF.format(model=name)}


# --- answers ---------------------------------------------------------------------------------------------------------


def _object(**properties: Json) -> Json:
    """Return the schema of an object that has exactly these keys."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _some(schema: Json, **optional: Json) -> Json:
    """Return the schema of an object that may have some keys more."""
    return {**schema, "properties": {**schema["properties"], **optional}}


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _map(values: Json) -> Json:
    return {"type": "object", "additionalProperties": values}


_LOGPROBS = _object(
    tokens=_list(_TEXT),
    token_logprobs=_list(_or_null(_REAL)),
    top_logprobs=_list(_or_null(_map(_REAL))),
    text_offset=_list(_WHOLE),
)
_TOKEN = _object(token=_TEXT, logprob=_REAL, bytes=_list(_WHOLE))
_CHAT_LOGPROBS = _object(
    content=_list(_object(**_TOKEN["properties"], top_logprobs=_list(_TOKEN))), refusal={"type": "null"}
)
_USAGE = _object(
    prompt_tokens=_WHOLE,
    completion_tokens=_WHOLE,
    total_tokens=_WHOLE,
    prompt_tokens_details=_object(cached_tokens=_WHOLE),
)


def _completion(kind: str, choice: str) -> Json:
    """Return the schema of an answer with texts."""
    return _object(
        id=_TEXT,
        object={"const": kind},
        created=_WHOLE,
        model=_TEXT,
        system_fingerprint=_or_null(_TEXT),
        choices=_list(_ref(choice)),
        usage=_USAGE,
        seed=_WHOLE,
    )


_ANSWERS: Json = {
    "Error": _object(error=_object(message=_TEXT, type=_TEXT, param=_or_null(_TEXT), code=_or_null(_TEXT))),
    "Choice": _some(
        _object(
            index=_WHOLE,
            text=_TEXT,
            logprobs=_or_null(_LOGPROBS),
            finish_reason={"enum": ["stop", "length"]},
            stop_reason=_or_null(_TEXT),
            step=_WHOLE,
        ),
        token_ids=_list(_WHOLE),
        prompt_token_ids=_list(_WHOLE),
        top_token_ids=_list(_or_null(_map(_WHOLE))),
    ),
    "Completion": _completion("text_completion", "Choice"),
    "ChatChoice": _some(
        _object(
            index=_WHOLE,
            message=_object(role={"const": "assistant"}, content=_TEXT, refusal={"type": "null"}),
            logprobs=_or_null(_CHAT_LOGPROBS),
            finish_reason={"enum": ["stop", "length"]},
            stop_reason=_or_null(_TEXT),
            step=_WHOLE,
        ),
        token_ids=_list(_WHOLE),
        prompt_token_ids=_list(_WHOLE),
    ),
    "ChatCompletion": _some(_completion("chat.completion", "ChatChoice"), messages_left_out=_WHOLE),
    "Model": _some(
        _object(
            id=_TEXT,
            object={"const": "model"},
            created=_WHOLE,
            owned_by=_TEXT,
            max_model_len=_WHOLE,
            checkpoint=_TEXT,
            step=_WHOLE,
            parameters=_WHOLE,
            vocab_size=_WHOLE,
            max_logprobs=_WHOLE,
        ),
        val_loss=_or_null(_REAL),
        precision=_TEXT,
        device=_TEXT,
        system_fingerprint=_TEXT,
    ),
    "Models": _object(object={"const": "list"}, data=_list(_ref("Model"))),
    "Health": _object(
        status={"enum": ["ok", "loading", "stalled", "dead", "draining"]},
        model=_or_null(_TEXT),
        step=_or_null(_WHOLE),
        system_fingerprint=_or_null(_TEXT),
        running=_WHOLE,
        waiting=_WHOLE,
        slots=_WHOLE,
        last_token_age_s=_or_null(_REAL),
        restarts=_WHOLE,
        reloads=_WHOLE,
    ),
    "Tokens": _object(
        count=_WHOLE,
        max_model_len=_WHOLE,
        tokens=_list(_WHOLE),
        token_strs=_or_null(_list(_TEXT)),
        pieces=_list(_TEXT),
        bytes=_list({"type": "string", "pattern": "^([0-9a-f]{2})*$"}),
    ),
    "Text": _object(prompt=_TEXT),
    "TokenizerInfo": _object(
        tokenizer_class=_TEXT,
        vocab_size=_WHOLE,
        model_max_length=_WHOLE,
        bos_token=_or_null(_TEXT),
        eos_token=_or_null(_TEXT),
        pad_token=_or_null(_TEXT),
        add_bos_token=_YES_NO,
        special_tokens=_list(_TEXT),
        has_chat_format=_YES_NO,
        chat_template=_or_null(_TEXT),
        fingerprint=_TEXT,
    ),
    "Runs": _object(runs=_list({"type": "object", "required": ["name", "state", "step"]})),
    "Run": _object(name=_TEXT, config=_map(_ANY), defaults=_map(_ANY), checkpoints=_list(_WHOLE)),
    "Lines": _object(
        file=_TEXT,
        offset=_WHOLE,
        reset=_YES_NO,
        bad=_WHOLE,
        every=_WHOLE,
        more=_YES_NO,
        lines=_list({"type": "object"}),
    ),
    "Differences": _object(differences=_map(_map(_ANY))),
}
