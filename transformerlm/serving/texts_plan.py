"""From the body of a request to the texts that the engine is asked for: defaults, limits, seeds."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from transformerlm.serving.api_schema import CompletionRequest
from transformerlm.serving.engine import ModelFacts, TextRequest
from transformerlm.serving.errors import ApiError
from transformerlm.serving.served import Served
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.utils.strings import whole_characters

SEEDS = 2**63
_LONGEST_STOP = 1000  # characters; the engine prepares a table of each stop string for each text
_RANDOM_SEEDS = 2**31  # every client's language has integers of this size


@dataclass(frozen=True)
class Prompt:
    """One prompt: its ids, its text, and how many ids at its start the text does not show."""

    ids: list[int]
    text: str
    num_hidden: int = 0


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What a chat brings instead of prompts: one prompt, and what ends its answers besides what the request names."""

    prompt: Prompt
    end_ids: tuple[int, ...]
    end_strings: tuple[str, ...]
    num_left_out: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request with everything decided; text k of prompt j is `requests[j * best_of + k]`."""

    request_id: str
    created: int
    model: str
    seed: int
    n: int
    best_of: int
    prompts: list[Prompt]
    requests: list[TextRequest]
    asked: CompletionRequest
    num_left_out: int = 0
    """Of the oldest messages of a chat, how many the model does not read."""

    @property
    def told(self) -> dict[str, int]:
        """What an answer tells beside its choices."""
        return {"seed": self.seed} | ({"messages_left_out": self.num_left_out} if self.num_left_out else {})


def plan_texts(served: Served, asked: CompletionRequest, turn: Turn | None = None) -> Plan:
    """Return what a request asks for, with the server's defaults and limits; of a chat, `turn` has the prompt.

    Raises:
        ApiError: 400 for a value beyond a limit or a relation that does not hold, 404 for another model, 503 while the
            model is being loaded.
    """
    facts, tokenizer = served.facts(), served.tokens()
    checkpoint = served.checkpoint_of(asked.model)
    n, best_of = _numbers(served, asked)
    _at_most("logprobs", asked.logprobs or 0, served.config.limits.logprobs, "limits.logprobs")
    prompts = read_prompts(served, asked) if turn is None else [turn.prompt]
    total = len(prompts) * best_of
    room = served.config.engine.slots + served.config.limits.waiting
    _at_most("prompt", total, room, "engine.slots + limits.waiting", what="texts in one request")
    seed = secrets.randbelow(_RANDOM_SEEDS) if asked.seed is None else asked.seed % SEEDS
    request_id = f"{'cmpl' if turn is None else 'chatcmpl'}-{secrets.token_hex(12)}"
    shared = _settings(served, asked, tokenizer, turn) | {
        "checkpoint": checkpoint,
        "num_logprobs": 0 if best_of > n and asked.logprobs is None else asked.logprobs,  # best_of ranks by them
        "num_prompt_logprobs": asked.logprobs if asked.echo else None,
    }
    requests = [
        TextRequest(
            request_id=f"{request_id}-{number}",
            prompt=_ids_to_send(facts, asked, prompts[number // best_of].ids),
            max_tokens=_max_tokens(served, asked, facts, prompts[number // best_of]),
            seed=(seed + number) % SEEDS,  # as transformerlm-infer numbers its samples
            **shared,  # type: ignore[arg-type]
        )
        for number in range(total)
    ]
    # More could never wait, however little there is to do: no 429, after which clients ask again.
    waiting = sum(len(request.prompt) for request in requests[served.config.engine.slots :])
    _at_most("prompt", waiting, served.config.limits.waiting_tokens, "limits.waiting_tokens", what="tokens that wait")
    return Plan(
        request_id=request_id,
        created=int(time.time()),
        model=asked.model or served.name,
        seed=seed,
        n=n,
        best_of=best_of,
        prompts=prompts,
        requests=requests,
        asked=asked,
        num_left_out=turn.num_left_out if turn else 0,
    )


def _numbers(served: Served, asked: CompletionRequest) -> tuple[int, int]:
    """Return how many choices of each prompt are returned, and how many are made."""
    n = asked.n or 1
    best_of = asked.best_of or n
    _at_most("n", n, served.config.limits.n, "limits.n")
    _at_most("best_of", best_of, served.config.limits.n, "limits.n")
    if best_of < n:
        raise _refused("best_of", f"expected at least n ({n}), found {best_of}")
    if best_of > n and asked.stream:
        raise _refused("best_of", "expected best_of = n with stream, since the best are known at the end only")
    if asked.stream_options is not None and not asked.stream:
        raise _refused("stream_options", "expected stream = true beside it")
    return n, best_of


def _settings(served: Served, asked: CompletionRequest, tokenizer: Tokenizer, turn: Turn | None) -> dict[str, object]:
    """Return what all texts of a request share."""
    defaults, stop = served.config.defaults, asked.stop
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    _at_most("stop", len(stops), served.config.limits.stop, "limits.stop", what="strings")
    if "" in stops:
        raise _refused("stop", "expected strings with at least one character, found an empty one")
    if (longest := max(map(len, stops), default=0)) > _LONGEST_STOP:
        raise _refused("stop", f"expected strings of at most {_LONGEST_STOP} characters, found one of {longest}")
    if turn and turn.end_strings and asked.min_tokens and not asked.ignore_eos:
        raise _refused("min_tokens", "this model's answers end with a string, not a token, and cannot be made longer")
    top_k = defaults.top_k if asked.top_k is None else asked.top_k
    top_p = _given(asked.top_p, defaults.top_p)
    return {
        "temperature": _given(asked.temperature, defaults.temperature),
        "top_p": top_p,
        # vLLM's -1 and 0: all; beside top_p = 0, which keeps the most likely token alone, it does nothing
        "top_k": top_k if top_k is not None and top_k > 0 and top_p else None,
        "min_p": _given(asked.min_p, defaults.min_p),
        "presence_penalty": _given(asked.presence_penalty, 0.0),
        "frequency_penalty": _given(asked.frequency_penalty, 0.0),
        "repetition_penalty": _given(asked.repetition_penalty, 1.0),
        "logit_bias": _biases(asked.logit_bias or {}, tokenizer.vocab_size),
        "min_tokens": asked.min_tokens or 0,
        "stop": [*map(whole_characters, stops), *(turn.end_strings if turn and not asked.ignore_eos else ())],
        "ignore_eos": bool(asked.ignore_eos),
        "end_ids": list(turn.end_ids) if turn else [],
    }


def _given(value: float | None, default: float) -> float:
    return float(default if value is None else value)


def _biases(asked: dict[str, float], vocab_size: int) -> dict[int, float]:
    for name in asked:
        if not (name.isascii() and name.isdecimal() and len(name) <= 10 and int(name) < vocab_size):
            raise _refused("logit_bias", f"expected token ids from 0 to {vocab_size - 1}, found {name[:20]!r}")
    return {int(name): float(bias) for name, bias in asked.items()}


def _max_tokens(served: Served, asked: CompletionRequest, facts: ModelFacts, prompt: Prompt) -> int:
    """Return how many tokens a text may have; a default, which nobody asked for, is cut to the room that is left."""
    limits, length = served.config.limits, len(prompt.ids)
    # The last token is drawn and not read, so it needs no place in the context.
    room = facts.context_length - length + 1
    if asked.max_tokens is None:
        wanted = served.config.defaults.max_tokens
        tokens = wanted if limits.overflow == "slide" else max(1, min(wanted, room))
    else:
        tokens = asked.max_tokens
    _at_most("max_tokens", tokens, limits.max_tokens, "limits.max_tokens")
    if (asked.min_tokens or 0) > tokens:
        raise _refused("min_tokens", f"expected at most max_tokens ({tokens}), found {asked.min_tokens}")
    scores = asked.echo and asked.logprobs is not None
    if length > facts.context_length and (scores or limits.overflow == "refuse"):
        raise _too_long(f"expected a prompt of at most {facts.context_length} tokens, found {length}")
    if limits.overflow == "refuse" and tokens > room:
        raise _too_long(
            f"expected prompt and max_tokens to fit the context of {facts.context_length} tokens, "
            f"found {length} + {tokens}",
            param="max_tokens",
        )
    return tokens


def _ids_to_send(facts: ModelFacts, asked: CompletionRequest, ids: list[int]) -> list[int]:
    """Return what the engine needs of a prompt: its last window, and before it what else counts.

    That is the first id, where texts start with one, and each id once, where ids have a penalty.
    """
    before = ids[: -facts.context_length]
    if asked.repetition_penalty in (None, 1.0):
        before = before[:1] if facts.starts_texts else []
    return [*dict.fromkeys(before), *ids[-facts.context_length :]]


def _too_long(message: str, param: str = "prompt") -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code="context_length_exceeded")


# --- prompts -------------------------------------------------------------------------------------------------------


def read_prompts(served: Served, asked: CompletionRequest) -> list[Prompt]:
    """Return the prompts of a request, in any of the four forms, as ids.

    Raises:
        ApiError: 400 for no prompts, too many, ids that do not exist, or text that cannot fit.
    """
    given = "" if asked.prompt is None else asked.prompt
    if isinstance(given, str):
        many: Sequence[str | list[int]] = [given]
    elif given and all(isinstance(one, int) for one in given):
        many = [cast(list[int], given)]
    else:
        many = cast(list[str | list[int]], given)
    if not many:
        raise _refused("prompt", "expected at least one prompt, found an empty list")
    _at_most("prompt", len(many), served.config.limits.prompts, "limits.prompts", what="prompts")
    return [_read_text(served, asked, one) if isinstance(one, str) else _read_ids(served, one) for one in many]


def _read_text(served: Served, asked: CompletionRequest, text: str) -> Prompt:
    facts, tokenizer = served.facts(), served.tokens()
    text = whole_characters(text)
    check_length(served, text)
    ids = encode(tokenizer, text, allow_special=bool(asked.allow_special))
    add_start = facts.starts_texts and asked.add_special_tokens is not False and ids[:1] != [facts.start_id]
    if facts.start_id is not None and (add_start or not ids):
        return Prompt([facts.start_id, *ids], text, num_hidden=1)
    if not ids:
        raise _refused("prompt", "expected some text: no token is known at which a document of this model starts")
    return Prompt(ids, text)


def _read_ids(served: Served, ids: list[int]) -> Prompt:
    facts, tokenizer = served.facts(), served.tokens()
    check_ids(tokenizer, ids, "prompt")
    if ids:
        return Prompt(ids, tokenizer.decode(ids))
    if facts.start_id is None:
        raise _refused("prompt", "expected some ids: no token is known at which a document of this model starts")
    return Prompt([facts.start_id], "", num_hidden=1)


def encode(tokenizer: Tokenizer, text: str, *, allow_special: bool) -> list[int]:
    """Return a text's ids; special tokens spelled out in it are tokens only with `allow_special`."""
    return tokenizer.encode(text) if allow_special else tokenizer.encode_ordinary(text)


def check_ids(tokenizer: Tokenizer, ids: Sequence[int], param: str) -> None:
    """Refuse ids that the tokenizer lacks.

    Raises:
        ApiError: 400.
    """
    if ids and not (min(ids) >= 0 and max(ids) < tokenizer.vocab_size):
        wrong = next(one for one in ids if not 0 <= one < tokenizer.vocab_size)
        raise _refused(param, f"expected token ids from 0 to {tokenizer.vocab_size - 1}, found {wrong}")


def check_length(served: Served, text: str) -> None:
    """Refuse a text that cannot fit whatever its ids are, before time is spent on them.

    Raises:
        ApiError: 400.
    """
    context_length = served.facts().context_length
    # Each character has at least one byte.
    if served.config.limits.overflow == "refuse" and len(text) > context_length * served.longest_token:
        raise _too_long(
            f"expected at most {context_length} tokens, found a text of {len(text)} characters, which are more"
        )


def _at_most(param: str, found: int, limit: int, key: str, *, what: str = "") -> None:
    if found > limit:
        raise _refused(param, f"expected at most {limit}{what and ' ' + what} ({key}), found {found}")


def _refused(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")
