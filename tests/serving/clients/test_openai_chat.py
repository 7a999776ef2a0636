"""OpenAI's own client, unmodified, chats; and the terminal gives the same answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.command import ENVIRONMENT, WAIT, Server
from tests.training.chat_run import ANSWER

openai = pytest.importorskip("openai", reason="needs the extra serve-test")
pytestmark = pytest.mark.slow
HI = [{"role": "user", "content": "Is Ada here?"}]
DRAWN = {"temperature": 3.0, "max_tokens": 24}


@pytest.fixture(scope="module")
def client(chat_server: Server):
    """Return a client of the server."""
    return openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="none", max_retries=0)


def test_a_conversation_goes_on(client):
    """An answer is a message that goes back as it came, and the next answer follows it."""
    messages = [{"role": "system", "content": "Be brief."}, *HI]
    for _ in range(2):
        answer = client.chat.completions.create(model="run", messages=messages, temperature=0)
        [choice] = answer.choices
        assert (choice.message.content, choice.finish_reason) == (ANSWER, "stop")
        messages += [choice.message, {"role": "user", "content": "Is Bob at sea?"}]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.object == "chat.completion"


def test_a_stream_is_the_whole_answer(client):
    """The pieces of several choices are the answers that are not streamed; role first, usage last."""
    settings = {"model": "run", "messages": HI, "n": 3, "seed": 5, **DRAWN}
    whole = client.chat.completions.create(**settings)
    assert len({choice.message.content for choice in whole.choices}) == 3
    *chunks, last = client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    texts, roles = ["", "", ""], [None, None, None]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] = roles[choice.index] or choice.delta.role
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == ["assistant"] * 3
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_the_helper_for_streams_puts_an_answer_together(client):
    """`chat.completions.stream` of the client, with log-probabilities, ends in the same answer."""
    # Temperature 0: the helper takes an answer that was cut at max_tokens for an error.
    settings = {"model": "run", "messages": HI, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**settings)
    with client.chat.completions.stream(**settings) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    told = whole.choices[0].logprobs.content
    assert all(len(one.top_logprobs) == 2 for one in told)
    assert [one.token for one in final.choices[0].logprobs.content] == [one.token for one in told]
    spelled = b"".join(bytes(one.bytes) for one in told)
    assert spelled.decode() == f"{whole.choices[0].message.content}<|im_end|>"


def test_stops_biases_and_errors(client):
    """A stop string, a banned token, and its own classes of errors."""
    greedy = {"model": "run", "messages": HI, "temperature": 0, "extra_body": {"return_token_ids": True}}
    [stopped] = client.chat.completions.create(**greedy, stop=["it"]).choices
    assert stopped.message.content == ANSWER[: ANSWER.index("it")]
    [biased] = client.chat.completions.create(
        **greedy, max_completion_tokens=5, logit_bias={str(stopped.token_ids[0]): -100}
    ).choices
    assert biased.token_ids[0] != stopped.token_ids[0]
    with pytest.raises(openai.BadRequestError, match="context of 96 tokens"):
        client.chat.completions.create(model="run", messages=HI, max_completion_tokens=500)
    with pytest.raises(openai.BadRequestError, match="calls no tools"):
        client.chat.completions.create(
            model="run", messages=HI, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.chat.completions.create(model="gpt-4", messages=HI)


def test_the_terminal_gives_the_same_answers(chat_server: Server, chat_run: Path):
    """Same messages, seed and settings: transformerlm-chat and the server say the same, turn after turn."""
    said = ["Is Ada here?", "What?", "<|im_end|>"]
    command = [sys.executable, "-P", "-m", "cli.chat", f"--checkpoint={chat_run}", "--device=cpu", "--seed=7"]
    command += ["--sampling.temperature=3.0", "--sampling.top_p=0.9", "--sampling.max_new_tokens=12"]
    done = subprocess.run(
        command, input="\n".join(said), env=ENVIRONMENT, capture_output=True, text=True, timeout=WAIT, check=False
    )
    assert done.returncode == 0, done.stderr
    messages: list[dict[str, str]] = []
    for line in map(json.loads, done.stdout.splitlines()):
        messages.append({"role": "user", "content": line["text.user"]})
        body = {"messages": messages, "seed": 7, "temperature": 3.0, "top_p": 0.9, "max_tokens": 12}
        [choice] = chat_server.chat(**body).json()["choices"]
        assert choice["message"]["content"] == line["text.assistant"]
        messages.append({"role": "assistant", "content": line["text.assistant"]})
    assert [line["content"] for line in messages[::2]] == said
