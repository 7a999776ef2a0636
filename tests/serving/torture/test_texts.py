"""The same prompt and seed give the same text, whatever else the server does, and that text is infer's."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.command import WAIT, Server, events_of, infer_texts, save_random_model, serving
from tests.training.tiny_run import TinyFiles

Answer = tuple[str, list[float]]
"""A text, and the log-probabilities of its tokens where they were asked for."""
SAMPLING = {"temperature": 0.9, "top_p": 0.95}


@dataclass(frozen=True)
class Load:
    """How a set of texts is asked for: so many at a time, streamed or whole, beside others that are cancelled."""

    streams: int
    is_streamed: bool
    num_cancelled: int


def prompts_of(files: TinyFiles, count: int, longest: int, rng: random.Random) -> list[str]:
    """Return prompts of different lengths, of which many begin in the same way."""
    text = files.text.read_text(encoding="utf-8").replace("<|endoftext|>", "")
    starts = [rng.randrange(len(text) // 2) for _ in range(4)]
    lengths = [rng.randrange(1, longest) for _ in range(count)]
    return [text[(start := rng.choice(starts)) : start + length] for length in lengths]


async def ask_all(server: Server, bodies: Sequence[dict[str, Any]], load: Load, rng: random.Random) -> list[Answer]:
    """Return the answers to all requests, in order."""
    room = asyncio.Semaphore(load.streams)
    limits = httpx.Limits(max_connections=2 * load.streams + 8)
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT, limits=limits, verify=False) as client:

        async def ask(body: dict[str, Any]) -> Answer:
            async with room:
                return await _ask(client, body, is_streamed=load.is_streamed)

        async def ask_and_leave() -> None:
            await asyncio.sleep(rng.random())
            body = {**rng.choice(bodies), "seed": rng.randrange(10**6), "logprobs": rng.choice([None, 3])}
            async with room:
                asking = _ask(client, body, is_streamed=rng.random() < 0.5)
                with suppress(TimeoutError):
                    await asyncio.wait_for(asking, rng.choice([0.01, 0.05, 0.2]))

        others = [asyncio.create_task(ask_and_leave()) for _ in range(load.num_cancelled)]
        texts = await asyncio.gather(*map(ask, bodies))
        await asyncio.gather(*others)
    return texts


async def _ask(client: httpx.AsyncClient, body: dict[str, Any], *, is_streamed: bool) -> Answer:
    if not is_streamed:
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        [choice] = answer.json()["choices"]
        return choice["text"], _numbers([choice])
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        lines = [line async for line in answer.aiter_lines()]
    parts = [event["choices"][0] for event in events_of(lines)]
    return "".join(part["text"] for part in parts), _numbers(parts)


def _numbers(parts: Sequence[dict[str, Any]]) -> list[float]:
    return [one for part in parts if part["logprobs"] for one in part["logprobs"]["token_logprobs"]]


def check(server: Server, bodies: Sequence[dict[str, Any]], expected: Sequence[str], loads: Sequence[Load]) -> None:
    """Compare the texts at several loads with those expected, and all numbers with those of the first load."""
    first: list[Answer] = []
    restarts = server.health()["restarts"]
    for number, load in enumerate(loads):
        found = asyncio.run(ask_all(server, bodies, load, random.Random(number)))
        server.wait_until_idle()
        assert [text for text, _ in found] == list(expected), load
        first = first or found
        assert found == first, load  # the log-probabilities, too, to the last bit
    assert server.health()["restarts"] == restarts
    assert "Traceback" not in server.stderr


def test_texts_are_those_of_infer_at_any_load(server, untrained, files):
    """Alone and eight at a time, streamed and whole, beside texts that are cancelled: the same bytes, and infer's."""
    rng = random.Random(5)
    prompts = prompts_of(files, 12, 120, rng)
    expected = infer_texts(
        untrained,
        prompts,
        "--reproducible=true",
        "--seed=3",
        "--sampling.max_new_tokens=12",
        *(f"--sampling.{name}={value}" for name, value in SAMPLING.items()),
    )
    bodies = [
        {"prompt": prompt, "seed": 3 + number, "max_tokens": 12, "logprobs": 1 if number % 2 else None, **SAMPLING}
        for number, prompt in enumerate(prompts)
    ]
    check(server, bodies, expected, [Load(1, False, 0), Load(8, True, 4), Load(8, False, 4)])


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory, files: TinyFiles) -> Path:
    """Return a run of a model with matrices that take the fast paths, and room for prompts of several chunks."""
    sizes = {"d_model": 256, "num_layers": 4, "num_heads": 4, "d_ff": 704, "context_length": 512}
    changes = {f"model.{name}": value for name, value in sizes.items()}
    return save_random_model(tmp_path_factory.mktemp("larger") / "run", files, changes=changes)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [256, 0])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_many_texts_are_those_of_infer_at_any_load(precision, cache, larger, files, tmp_path):
    """50 prompts with 4 seeds at 1 to 32 streams, streamed and whole, 60 others cancelled, with a cache or not."""
    rng = random.Random(7)
    prompts = prompts_of(files, 50, 1000, rng)
    settings = ["--reproducible=true", f"--precision={precision}", "--seed=100", "--num_samples=4"]
    sampling = [f"--sampling.{name}={value}" for name, value in SAMPLING.items()]
    expected = infer_texts(larger, prompts, *settings, *sampling, "--sampling.max_new_tokens=20")
    bodies = [
        {
            "prompt": prompts[number // 4],
            "seed": 100 + number,
            "max_tokens": 20,
            "logprobs": 2 if number % 3 else None,
            **SAMPLING,
        }
        for number in range(200)
    ]
    arguments = [f"--precision={precision}", f"--engine.prefix_cache_mb={cache}", "--engine.slots=32"]
    loads = [Load(streams, is_streamed, 60) for streams in (1, 2, 8, 32) for is_streamed in (True, False)]
    with serving(larger, tmp_path, *arguments) as server:
        check(server, bodies, expected, loads)
        if cache:
            assert server.metric("reused_tokens_total") > 0
        assert server.terminate() == 143
