"""LangChain's `OpenAI` and `ChatOpenAI`, unmodified: invoke, stream, batch."""

from __future__ import annotations

import asyncio

import pytest

from tests.serving.command import Server
from tests.training.chat_run import ANSWER

langchain = pytest.importorskip("langchain_openai", reason="needs the extra serve-test")
pytestmark = pytest.mark.slow


def test_invoke_stream_and_batch_agree(server: Server, monkeypatch):
    """One text, its stream, and the same text among a batch are equal; so are the asynchronous forms."""
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    model = langchain.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="run", max_tokens=16, seed=3, temperature=0.9, max_retries=0
    )
    text = model.invoke("Ada sees")
    assert text
    assert "".join(model.stream("Ada sees")) == text
    batch = model.batch(["Ada sees", "Bob likes", "Zo\u00eb"])
    assert batch[0] == text
    assert len(set(batch)) == 3
    assert asyncio.run(model.ainvoke("Ada sees")) == text
    assert model.invoke("Ada sees", stop=[text[3:5]]) == text[: text.index(text[3:5])]


def test_several_prompts_in_one_request_are_counted(server: Server):
    """`generate` sends prompts together, and reads choices and the usage."""
    model = langchain.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="run", max_tokens=8, n=2, temperature=0.9, max_retries=0
    )
    result = model.generate(["Ada", "Bob", "Zo\u00eb"])
    assert [len(one) for one in result.generations] == [2, 2, 2]
    assert result.llm_output["token_usage"]["completion_tokens"] <= 48


def test_a_chat_model_answers_streams_and_counts(chat_server: Server, monkeypatch):
    """One answer, its stream and the one among a batch are equal; the usage is told, and a conversation goes on."""
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    model = langchain.ChatOpenAI(
        base_url=f"{chat_server.url}/v1",
        api_key="none",
        model="run",
        max_tokens=20,
        seed=3,
        temperature=0,
        max_retries=0,
    )
    answer = model.invoke([("system", "Be brief."), ("human", "Is Ada here?")])
    assert answer.content == ANSWER
    assert answer.usage_metadata["output_tokens"] > 1
    assert answer.response_metadata["finish_reason"] == "stop"
    assert "".join(chunk.content for chunk in model.stream("Is Bob here?")) == ANSWER
    assert [one.content for one in model.batch(["Is Ada here?", "Is Bob at sea?"])] == [ANSWER, ANSWER]
    assert asyncio.run(model.ainvoke("Is Ada here?")).content == ANSWER
    again = model.invoke([("human", "Is Ada here?"), answer, ("human", "Is Bob here?")])
    assert again.content == ANSWER
