"""LangChain's `OpenAI`, unmodified: invoke, stream, batch."""

from __future__ import annotations

import asyncio

import pytest

from tests.serving.command import Server

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
