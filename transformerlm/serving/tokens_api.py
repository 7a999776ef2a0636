"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them: a client needs no tokenizer of its own."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import Callable, Iterator
from functools import cache

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from transformerlm.serving.api_schema import DetokenizeRequest, TokenizeRequest, parsed
from transformerlm.serving.errors import JsonAnswer
from transformerlm.serving.served import Served, token_bytes, token_text
from transformerlm.serving.texts_plan import check_ids, encode

_AT_ONCE = 10_000  # tokens in one part of an answer
_LONG_TEXT = 20_000  # characters; the ids of a shorter one may be a list


def routes() -> list[Route]:
    """Return the routes of this file."""
    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info, methods=["GET"]),
    ]


async def tokenize(request: Request) -> Response:
    """Answer a text with its ids, and with each token as text and as bytes in hex.

    Special tokens spelled out in the text are tokens, as in vLLM, unless `allow_special` is false.
    """
    served: Served = request.app.state.served
    asked = await parsed(TokenizeRequest, await request.body())
    served.checkpoint_of(asked.model)
    async with served.tokenizing:  # encoding takes many times the memory of the text
        ids = await asyncio.to_thread(_ids_of, served, asked)
    return StreamingResponse(_tokenized(served, asked, ids), media_type="application/json")


def _ids_of(served: Served, asked: TokenizeRequest) -> array[int]:
    facts, tokenizer = served.facts(), served.tokens()
    allow_special = asked.allow_special is not False
    if len(asked.prompt) > _LONG_TEXT:
        found, _ = tokenizer.encode_batch_to_array([asked.prompt], allow_special=allow_special)
        ids = array("I", found.astype("uint32").tobytes())
    else:
        ids = array("I", encode(tokenizer, asked.prompt, allow_special=allow_special))
    if asked.add_special_tokens is not False and facts.starts_texts and facts.start_id is not None:
        ids = ids if ids[:1].tolist() == [facts.start_id] else array("I", [facts.start_id]) + ids
    return ids


def _tokenized(served: Served, asked: TokenizeRequest, ids: array[int]) -> Iterator[bytes]:
    """Yield the answer as JSON in parts: whole, it would take a hundred times the memory of a long text."""
    facts, tokenizer = served.facts(), served.tokens()
    piece = cache(lambda one: json.dumps(token_text(tokenizer, one)))
    lists: dict[str, Callable[[int], str] | None] = {
        "tokens": str,
        "token_strs": piece if asked.return_token_strs else None,
        "pieces": piece,
        "bytes": cache(lambda one: f'"{token_bytes(tokenizer, one).hex()}"'),
    }
    yield f'{{"count":{len(ids)},"max_model_len":{facts.context_length}'.encode()
    for name, write in lists.items():
        yield f',"{name}":'.encode() + (b"null" if write is None else b"[")
        if write is None:
            continue
        for start in range(0, len(ids), _AT_ONCE):
            part = ",".join(map(write, ids[start : start + _AT_ONCE]))
            yield ((start > 0) * "," + part).encode("ascii")
        yield b"]"
    yield b"}"


async def detokenize(request: Request) -> Response:
    """Answer ids with their text."""
    served: Served = request.app.state.served
    asked = await parsed(DetokenizeRequest, await request.body())
    served.checkpoint_of(asked.model)
    tokenizer = served.tokens()
    check_ids(tokenizer, asked.tokens, "tokens")
    return JsonAnswer({"prompt": await asyncio.to_thread(tokenizer.decode, asked.tokens)})


async def tokenizer_info(request: Request) -> Response:
    """Answer what lm-eval and its kin want to know of a tokenizer."""
    served: Served = request.app.state.served
    facts, tokenizer = served.facts(), served.tokens()
    ends = [tokenizer.decode([one]) for one in facts.end_ids if one < tokenizer.vocab_size]
    start = None if facts.start_id is None else tokenizer.decode([facts.start_id])
    return JsonAnswer(
        {
            "tokenizer_class": "transformerlm",
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": facts.context_length,
            "bos_token": start,
            "eos_token": ends[0] if ends else None,
            "pad_token": None,
            "add_bos_token": facts.starts_texts,
            "special_tokens": tokenizer.special_tokens,
            "has_chat_format": served.renderer is not None,
            "chat_template": served.chat_template,
            "fingerprint": tokenizer.fingerprint(),
        }
    )
