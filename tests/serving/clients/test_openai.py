"""OpenAI's own client, unmodified, is answered as its server answers it."""

from __future__ import annotations

import pytest

from tests.serving.command import Server, serving

openai = pytest.importorskip("openai", reason="needs the extra serve-test")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(server: Server):
    """Return a client of the server."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_choices_seeds_and_usage(client):
    """n choices of each of several prompts come in order, the same ones for the same seed, and are counted."""
    settings = {"model": "run", "prompt": ["Ada sees", "Bob"], "n": 3, "max_tokens": 9, "seed": 11}
    first, again = (client.completions.create(**settings) for _ in range(2))
    assert [choice.index for choice in first.choices] == list(range(6))
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]
    assert len({choice.text for choice in first.choices}) == 6
    assert {choice.finish_reason for choice in first.choices} <= {"length", "stop"}
    assert first.usage.completion_tokens <= 54
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
    other = client.completions.create(**{**settings, "seed": 12})
    assert other.choices[0].text == first.choices[1].text  # choice i is drawn with seed + i


def test_a_stream_is_the_whole_text(client):
    """The pieces of n streamed choices are the texts of the answer that is not streamed, and usage comes last."""
    settings = {"model": "run", "prompt": "Zo\u00eb finds", "n": 4, "max_tokens": 24, "seed": 5, "temperature": 0.8}
    whole = client.completions.create(**settings)
    texts = ["", "", "", ""]
    *chunks, last = client.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


def test_log_probabilities_and_echo(client):
    """Echo gives the prompt back with the probabilities of its tokens; texts and offsets agree."""
    answer = client.completions.create(model="run", prompt="Ada likes the sea.", max_tokens=4, echo=True, logprobs=2)
    [choice] = answer.choices
    assert choice.text.startswith("Ada likes the sea.")
    logprobs = choice.logprobs
    counts = {len(getattr(logprobs, name)) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    assert len(counts) == 1
    assert logprobs.token_logprobs[0] is None
    assert all(one <= 0 for one in logprobs.token_logprobs[1:] if one is not None)
    assert all(len(one) in (2, 3) for one in logprobs.top_logprobs[1:] if one is not None)
    spelled = [one for one in logprobs.tokens if not one.startswith("bytes:")]
    assert choice.text.startswith("".join(spelled)[:10])
    scored = client.completions.create(model="run", prompt="Ada likes", max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].text == "Ada likes"
    assert scored.choices[0].logprobs.token_logprobs[1:] == pytest.approx(
        logprobs.token_logprobs[1:][: counts.pop()][: len(scored.choices[0].logprobs.tokens) - 1]
    )


def test_stop_strings_and_ids_as_prompts(client):
    """A text ends before its stop string; a prompt of ids is the prompt of their text."""
    settings = {"model": "run", "prompt": "Ada", "max_tokens": 40, "seed": 2}
    [free] = client.completions.create(**settings).choices
    stop = free.text[len(free.text) // 2 :][:2]
    [stopped] = client.completions.create(**settings, stop=[stop, "never to be seen"]).choices
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]
    ids = client.post("/../tokenize", body={"prompt": "Ada"}, cast_to=object)["tokens"]
    [by_ids] = client.completions.create(**{**settings, "prompt": ids}).choices
    assert by_ids.text == free.text
    both = client.completions.create(**{**settings, "prompt": [ids, ids]}).choices
    assert both[0].text == free.text


def test_biases_and_penalties_are_taken(client):
    """A banned token does not come; a penalty changes the text."""
    settings = {"model": "run", "prompt": "Bob sees", "max_tokens": 30, "seed": 4, "temperature": 0}
    [free] = client.completions.create(**settings, extra_body={"return_token_ids": True}).choices
    banned = free.token_ids[0]
    [biased] = client.completions.create(
        **settings, logit_bias={str(banned): -100}, extra_body={"return_token_ids": True}
    ).choices
    assert banned not in biased.token_ids
    [varied] = client.completions.create(**settings, presence_penalty=2, frequency_penalty=2).choices
    assert varied.text != free.text


def test_errors_are_the_ones_that_the_client_knows(client, server, untrained, tmp_path):
    """400, 401 and 404 raise its own classes, with our words; models are listed."""
    assert next(model.id for model in client.models.list()) == "run"
    assert client.models.retrieve("run").id == "run"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.NotFoundError, match="/v1/completions"):
        client.chat.completions.create(model="run", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.BadRequestError, match="context of 128 tokens") as refused:
        client.completions.create(model="run", prompt="a", max_tokens=1000)
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError, match="did you mean max_tokens"):
        client.completions.create(model="run", prompt="a", extra_body={"max_new_tokens": 3})
    with pytest.raises(openai.BadRequestError, match="cannot fill a gap"):
        client.completions.create(model="run", prompt="a", suffix="b")
    with serving(untrained, tmp_path, "--access.key_env=KEY", environment={"KEY": "secret"}) as guarded:
        right, wrong = (
            openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0) for key in ("secret", "other")
        )
        assert right.completions.create(model="run", prompt="a", max_tokens=2).choices
        with pytest.raises(openai.AuthenticationError, match="expected the server's key"):
            wrong.completions.create(model="run", prompt="a")


def test_an_asynchronous_client_that_leaves_frees_its_place(server):
    """Closing a stream in the middle of a text ends it on the server."""
    import asyncio

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.completions.create(
                model="run", prompt="a", max_tokens=120, stream=True, extra_body={"ignore_eos": True}
            )
            async for _ in stream:
                break
            await stream.close()

    asyncio.run(leave())
    server.wait_until_idle()
