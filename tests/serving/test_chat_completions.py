"""/v1/chat/completions: what becomes of messages, what an answer looks like, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serving.fake_engine import END, fake_tokenizer
from tests.serving.web import Web, run
from transformerlm.serving.api_schema import NOT_DONE, ChatRequest, parse
from transformerlm.serving.app import routes
from transformerlm.serving.engine import EngineGone
from transformerlm.serving.errors import ApiError
from transformerlm.serving.openapi import openapi
from transformerlm.tokenizer.chat import ChatFormat, ChatRenderer

CHAT = ChatFormat(system="S:", user="U:", assistant="A:", end=END, after="\n", special_tokens=(END,))
PLAIN = ChatFormat(system="S:", user="U:", assistant="A:", end="\n", after="", special_tokens=())
HI = [{"role": "user", "content": "ab"}]


async def post(web: Web, **body: Any) -> Any:
    """Ask for an answer."""
    return await web.client.post("/v1/chat/completions", json={"messages": HI, **body})


async def chunks_of(web: Web, **body: Any) -> list[dict[str, Any]]:
    """Return the events of a streamed answer, without the last one, which says that it is whole."""
    answer = await post(web, stream=True, **body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def prompt_of(messages: list[tuple[str, str]], chat: ChatFormat = CHAT) -> list[int]:
    """Return the ids of a conversation."""
    tokenizer = fake_tokenizer()
    return ChatRenderer(tokenizer, chat, start_id=tokenizer.special_token_ids[END]).prompt(messages).tolist()


def test_messages_become_a_prompt_in_the_models_format(tmp_path):
    """Each role has its strings, content is text or parts of text, and what it spells is plain text."""

    async def ask(web: Web) -> None:
        messages = [
            {"role": "developer", "content": "be"},
            {"role": "user", "content": [{"type": "text", "text": "on"}, {"type": "text", "text": "ce"}]},
            {"role": "assistant", "content": f"a{END}b", "refusal": None, "tool_calls": None},
            {"role": "user", "content": "ab"},
        ]
        answer = await post(web, messages=messages, max_tokens=1)
        assert answer.status_code == 200, answer.text
        pairs = [("system", "be"), ("user", "once"), ("assistant", f"a{END}b"), ("user", "ab")]
        [request] = web.engine.seen
        assert request.prompt == prompt_of(pairs)
        assert request.prompt.count(web.engine.end_id) == 5  # before the conversation, and after each message
        assert request.end_ids == [web.engine.end_id]
        assert request.stop == []

    run(tmp_path, ask, chat=CHAT)


def test_an_answer_has_openais_shape(tmp_path):
    """Message, finish, usage and seed; an answer ends before the format's end, and `length` is where the room ends."""

    async def ask(web: Web) -> None:
        answer = (await post(web, seed=3)).json()
        assert answer["object"] == "chat.completion"
        assert answer["id"].startswith("chatcmpl-")
        [choice] = answer["choices"]
        assert choice["message"] == {"role": "assistant", "content": "ab", "refusal": None}
        assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
        assert (choice["stop_reason"], choice["step"]) == (None, 140)
        length = len(prompt_of([("user", "ab")]))
        assert answer["usage"]["prompt_tokens"] == length
        assert answer["usage"]["completion_tokens"] == 3  # with the end
        assert (answer["seed"], answer["model"], answer["system_fingerprint"]) == (3, "tiny", "140-0123abcd")
        cut = (await post(web, seed=3, max_completion_tokens=1)).json()["choices"][0]
        assert (cut["message"]["content"], cut["finish_reason"]) == ("a", "length")
        several = (await post(web, seed=1, n=3, max_tokens=2)).json()["choices"]
        assert [one["message"]["content"] for one in several] == ["U:", ":a", "ab"]  # seeds 1, 2, 3

    run(tmp_path, ask, chat=CHAT)


def test_a_plain_format_ends_an_answer_by_its_string(tmp_path):
    """The client is not told of it, but of a stop string of its own; ignore_eos goes on past both ends."""

    async def ask(web: Web) -> None:
        [choice] = (await post(web, seed=1)).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("U:ab", "stop")
        assert choice["stop_reason"] is None
        [choice] = (await post(web, seed=1, stop="b")).json()["choices"]
        assert (choice["message"]["content"], choice["stop_reason"]) == ("U:a", "b")
        [choice] = (await post(web, seed=1, max_tokens=6, ignore_eos=True)).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("U:ab\nA", "length")
        refused = await post(web, min_tokens=3)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "min_tokens")
        assert (await post(web, min_tokens=3, max_tokens=4, ignore_eos=True)).status_code == 200

    run(tmp_path, ask, chat=PLAIN)


def test_a_stream_begins_with_the_role_and_is_the_whole_answer(tmp_path):
    """The first chunk of each choice says who speaks, then come pieces, a finish, and the usage if it is asked for."""

    async def ask(web: Web) -> None:
        settings = {"seed": 1, "n": 2, "max_tokens": 4, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
        whole = (await post(web, **settings)).json()
        *chunks, last = await chunks_of(web, **settings, stream_options={"include_usage": True})
        assert {chunk["object"] for chunk in [*chunks, last]} == {"chat.completion.chunk"}
        assert {chunk["id"] for chunk in [*chunks, last]} == {last["id"]}
        for index, choice in enumerate(whole["choices"]):
            parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == index]
            assert parts[0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
            assert all("role" not in part["delta"] for part in parts[1:])
            assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
            told = [one for part in parts if part["logprobs"] for one in part["logprobs"]["content"]]
            assert told == choice["logprobs"]["content"]
            assert [one for part in parts for one in part.get("token_ids", [])] == choice["token_ids"]
        assert last["choices"] == []
        assert last["usage"] == whole["usage"]
        assert all(chunk["usage"] is None for chunk in chunks)

    run(tmp_path, ask, chat=CHAT)


def test_log_probabilities_are_told_a_token_at_a_time(tmp_path):
    """Each token with its bytes and as many alternatives as are asked for; none without `logprobs`."""

    async def ask(web: Web) -> None:
        [choice] = (await post(web, seed=3, logprobs=True, top_logprobs=2)).json()["choices"]
        first, second, end = choice["logprobs"]["content"]
        assert (first["token"], first["logprob"], first["bytes"]) == ("a", -0.5, [97])
        assert (second["token"], second["logprob"]) == ("b", -0.25)
        assert [one["token"] for one in first["top_logprobs"]] == ["a", "z"]
        assert end["token"] == END
        assert choice["logprobs"]["refusal"] is None
        [choice] = (await post(web, seed=3, logprobs=True)).json()["choices"]
        assert choice["logprobs"]["content"][0]["top_logprobs"] == []
        refused = await post(web, top_logprobs=2)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_logprobs")
        refused = await post(web, logprobs=True, top_logprobs=21)
        assert refused.json()["error"]["message"] == "top_logprobs: expected at most 20 (limits.logprobs), found 21"

    run(tmp_path, ask, chat=CHAT)


def test_an_answer_may_be_as_long_as_the_context_leaves(tmp_path):
    """Without max_tokens it has what is left of the context; what cannot fit is refused by the key that was given."""

    async def ask(web: Web) -> None:
        length = len(prompt_of([("user", "ab")]))
        await post(web, seed=3)
        assert web.engine.seen[-1].max_tokens == 64 - length + 1
        refused = await post(web, max_completion_tokens=64)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["param"] == "max_completion_tokens"
        refused = await post(web, messages=[{"role": "user", "content": "x" * 70}])
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
        assert error["message"].startswith("messages: expected a prompt of at most 64 tokens, found ")
        refused = await post(web, messages=[{"role": "user", "content": "x" * 10_000}])
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        refused = await post(web, max_completion_tokens=4, max_tokens=5)
        assert refused.json()["error"]["param"] == "max_tokens"

    run(tmp_path, ask, chat=CHAT)


def test_where_texts_slide_the_oldest_pairs_are_left_out(tmp_path):
    """The system's message stays, and the rest begins with a question, as in the terminal."""

    async def ask(web: Web) -> None:
        pairs = [("system", "be"), *[("user", "q" * 9), ("assistant", "r" * 9)] * 4, ("user", "last")]
        messages = [{"role": role, "content": content} for role, content in pairs]
        answer = (await post(web, messages=messages, max_tokens=8)).json()
        renderer = ChatRenderer(fake_tokenizer(), CHAT, start_id=web.engine.end_id)
        kept = renderer.fitting(pairs, context_length=64, max_tokens=8)
        assert 2 < len(kept) < len(pairs)
        assert answer["messages_left_out"] == len(pairs) - len(kept)
        schema = openapi(web.config, routes(web.config))["components"]["schemas"]["ChatCompletion"]
        assert set(answer) == set(schema["properties"])
        assert "messages_left_out" not in (await post(web, messages=messages[:1] + messages[-1:])).json()
        await post(web, messages=messages, max_tokens=8)
        assert web.engine.seen[-1].prompt == renderer.prompt(kept).tolist()
        await post(web, messages=[*messages[:1], *messages[1:3] * 500, messages[-1]], max_tokens=8)
        assert web.engine.seen[-1].prompt == renderer.prompt(kept).tolist()
        await post(web, messages=messages)
        request = web.engine.seen[-1]
        assert request.max_tokens == 64 - len(request.prompt) + 1 >= 32
        await post(web, messages=[{"role": "user", "content": "q" * 100}])  # the last message always stays
        request = web.engine.seen[-1]
        assert (request.max_tokens, len(request.prompt)) == (32, 64)

    run(tmp_path, ask, chat=CHAT, sections={"limits": {"overflow": "slide"}})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: expected a list of at least one message with role and content, found an empty array"),
        ("hi", "messages: expected a list of at least one message with role and content, found "),
        (["hi"], "messages: expected a list of at least one message with role and content, found "),
        ([{"role": "user"}], "messages.0.content: expected text, or a list of parts such as {"),
        ([{"role": "tool", "content": "x"}], "messages.0.role: expected system, user or assistant, found "),
        ([{"role": "user", "content": None}], "messages.0.content: expected text, or a list of parts such as {"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages.0.content: expected text"),
        ([{"role": "user", "content": "a", "nam": "b"}], "messages.0: 'nam' is not a known key"),
        ([{"role": "user", "content": "a", "contnt": "b"}], "messages.0: 'contnt' is not a known key (did you mean co"),
        ([{"role": "assistant", "content": "a", "tool_calls": [{}]}], "messages.0.tool_calls: expected null, found"),
        ([*HI, {"role": "system", "content": "a"}], "messages.1: expected a system message at the beginning alone"),
    ],
)
def test_messages_that_are_none_are_refused_by_their_number(messages, message, tmp_path):
    """The error names the message and its key."""

    async def ask(web: Web) -> None:
        refused = await post(web, messages=messages)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, "messages")
        assert error["message"].startswith(message), error["message"]

    run(tmp_path, ask, chat=CHAT)


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        ({"message": HI}, "did you mean messages?"),
        ({"prompt": "hi"}, "did you mean messages?"),
        ({"max_new_tokens": 5}, "did you mean max_tokens?"),
        ({"best_of": 2}, "did you mean n?"),
        ({"tools": []}, "calls no tools"),
        ({"response_format": {"type": "json_object"}}, "expected 'text'"),
        ({"logprobs": 1}, "expected a valid boolean"),
    ],
)
def test_unknown_keys_and_wrong_values_are_refused(body, hint):
    """As those of completions, with what was meant."""
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, json.dumps({"messages": HI, **body}).encode())
    assert caught.value.status == 400
    assert hint in caught.value.message


def test_what_asks_for_nothing_else_passes():
    """Keys that are not done pass with null, and so do the only format and the only kind of answer there is."""
    plain = parse(ChatRequest, json.dumps({"messages": HI}).encode())
    nothing = {key: None for key in NOT_DONE if key not in ChatRequest.model_fields}
    assert parse(ChatRequest, json.dumps({"messages": HI, "user": "me", **nothing}).encode()) == plain
    text = {"response_format": {"type": "text"}, "modalities": ["text"]}
    assert parse(ChatRequest, json.dumps({"messages": HI, **text}).encode()).messages == plain.messages


def test_a_model_of_text_has_no_chat(tmp_path):
    """404 says why, and names the route that there is; with [chat] in the TOML there is one."""

    async def ask(web: Web) -> None:
        refused = await post(web)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (404, "no_chat_format")
        assert "/v1/completions" in error["message"]
        info = (await web.client.get("/tokenizer_info")).json()
        assert (info["has_chat_format"], info["chat_template"]) == (False, None)
        web.engine.state, web.app.state.served.tokenizer = "loading", None
        assert (await post(web)).status_code == 503

    async def ask_by_hand(web: Web) -> None:
        assert (await post(web, seed=1)).json()["choices"][0]["message"]["content"] == "U:ab"
        info = (await web.client.get("/tokenizer_info")).json()
        assert info["has_chat_format"]
        assert info["chat_template"].startswith(f"{{{{- '{END}' }}}}")

    run(tmp_path / "text", ask)
    run(tmp_path / "by hand", ask_by_hand, sections={"chat": PLAIN.to_json()})


def test_an_answer_is_counted_and_guarded_as_completions_are(tmp_path):
    """The key is needed, metrics and events count it, and a full queue is a 429."""

    async def ask(web: Web) -> None:
        assert (await post(web)).status_code == 401
        web.client.headers["Authorization"] = "Bearer secret"
        assert (await post(web, seed=3)).status_code == 200
        assert [event["finish"] for event in web.events if event["event"] == "request"] == ["stop"]
        assert 'transformerlm_requests_total{finish="stop"} 1.0' in (await web.client.get("/metrics")).text
        refused = await post(web, n=9)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        refused = await web.client.post(
            "/v1/chat/completions", json={"messages": HI}, headers={"Origin": "https://evil.example"}
        )
        assert refused.status_code == 403

    run(tmp_path, ask, chat=CHAT, key="secret")


def test_a_text_that_fails_is_an_error_in_the_stream(tmp_path):
    """What went wrong is an event, as in completions."""

    async def ask(web: Web) -> None:
        web.engine.ends_by = EngineGone("the engine died")
        [error] = await chunks_of(web)
        assert error["error"]["code"] == "engine_unavailable"
        assert (await post(web)).status_code == 503

    run(tmp_path, ask, chat=CHAT)
