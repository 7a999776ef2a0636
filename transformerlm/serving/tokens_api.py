"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them: a client needs no tokenizer of its own."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from transformerlm.serving.api_schema import DetokenizeRequest, TokenizeRequest, parse
from transformerlm.serving.errors import JsonAnswer
from transformerlm.serving.served import Served, token_bytes, token_text
from transformerlm.serving.texts_plan import check_ids, encode


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
    asked = parse(TokenizeRequest, await request.body())
    served.checkpoint_of(asked.model)
    async with served.tokenizing:  # an answer takes up to a hundred times the memory of its request
        return await asyncio.to_thread(_tokenized, served, asked)


def _tokenized(served: Served, asked: TokenizeRequest) -> Response:
    facts, tokenizer = served.facts(), served.tokens()
    ids = encode(tokenizer, asked.prompt, allow_special=asked.allow_special is not False)
    if asked.add_special_tokens is not False and facts.starts_texts and facts.start_id is not None:
        ids = ids if ids[:1] == [facts.start_id] else [facts.start_id, *ids]
    pieces = [token_text(tokenizer, one) for one in ids]
    return JsonAnswer(
        {
            "count": len(ids),
            "max_model_len": facts.context_length,
            "tokens": ids,
            "token_strs": pieces if asked.return_token_strs else None,
            "pieces": pieces,
            "bytes": [token_bytes(tokenizer, one).hex() for one in ids],
        }
    )


async def detokenize(request: Request) -> Response:
    """Answer ids with their text."""
    served: Served = request.app.state.served
    asked = parse(DetokenizeRequest, await request.body())
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
            "fingerprint": tokenizer.fingerprint(),
        }
    )
