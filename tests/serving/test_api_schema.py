"""What clients may send: every key is checked, and none is ignored that could change a text."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from transformerlm.serving import api_schema
from transformerlm.serving.api_schema import IGNORED, NOT_DONE, ChatRequest, CompletionRequest, parse
from transformerlm.serving.errors import ApiError


@pytest.mark.parametrize(
    "body", [{"prompt": [1.5] * 1000}, {"prompt": [[1.5]] * 1000}, {"prompt": "a", "stop": [3] * 1000}]
)
def test_a_long_list_with_many_faults_has_few_problems(body):
    """Millions of them would take the server's time from all others, and an answer names one."""
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate(body)
    assert caught.value.error_count() <= 5


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a", "logit_bias": {str(number): [] for number in range(5000)}},
        {"prompt": "a", "stream_options": dict.fromkeys(map(str, range(5000)), 0)},
        {"messages": [dict.fromkeys(map(str, range(5000)), 0)]},
        {"messages": [{}] * 5000},
        {"messages": [{"role": "user", "content": [{}] * 5000}]},
        {"messages": [{"role": "user", "content": [dict.fromkeys(map(str, range(5000)), 0)]}]},
    ],
    ids=["logit_bias", "stream_options", "keys of a message", "messages", "content", "keys of a part"],
)
def test_an_object_with_many_faults_has_one_problem(body, monkeypatch):
    """Each of them would be an error of its own, a megabyte a thousand."""
    found = []
    explain = api_schema._invalid
    monkeypatch.setattr(api_schema, "_invalid", lambda error, schema: found.append(error) or explain(error, schema))
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest if "messages" in body else CompletionRequest, json.dumps(body).encode())
    assert (caught.value.status, caught.value.param) == (400, next(name for name in body if name != "prompt"))
    assert all(error.error_count() < 20 for error in found)


def refusal(**body: object) -> ApiError:
    """Return the error of a body that is refused."""
    with pytest.raises(ApiError) as caught:
        parse(CompletionRequest, json.dumps(body).encode())
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("promt", "prompt"),
        ("max_new_tokens", "max_tokens"),
        ("n_predict", "max_tokens"),
        ("max_completion_tokens", "max_tokens"),
        ("temprature", "temperature"),
        ("repeat_penalty", "repetition_penalty"),
        ("topp", "top_p"),
        ("stream_option", "stream_options"),
    ],
)
def test_an_unknown_key_is_answered_with_the_right_one(key, meant):
    """The error says what was meant, and names the key."""
    error = refusal(**{key: 1})
    assert f"did you mean {meant}?" in error.message
    assert (error.param, error.code) == (key, "unknown_parameter")


def test_every_key_with_one_letter_missing_is_answered_with_the_right_one():
    """A mistyped key is never taken in silence."""
    names = set(CompletionRequest.model_fields)
    for name in names:
        for place in range(len(name)):
            wrong = name[:place] + name[place + 1 :]
            if wrong and wrong not in names and len(name) > 3:
                assert name in refusal(**{wrong: 1}).message, wrong


@pytest.mark.parametrize("key", sorted(NOT_DONE))
def test_a_key_that_is_not_done_says_so(key):
    """A known key without its function is refused with the reason, and passes where it asks for nothing."""
    error = refusal(**{key: "x"})
    assert (error.code, error.param) == ("unsupported_parameter", key)
    parse(CompletionRequest, json.dumps({key: None}).encode())


@pytest.mark.parametrize("key", IGNORED)
def test_a_key_that_cannot_change_the_text_passes(key):
    """Such keys may hold anything."""
    assert parse(CompletionRequest, json.dumps({key: {"a": [1]}}).encode()) == CompletionRequest()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"stop": 1}, "stop"),
        ({"stop": ["a", 1]}, "stop"),
        ({"prompt": 1}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1, "a"]]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usge": True}}, "include_usge"),
        ({"stream_options": True}, "stream_options"),
    ],
)
def test_a_wrong_value_is_refused_by_name(body, param):
    """The error names the key, what was expected and what was found."""
    error = refusal(**body)
    assert error.param == param
    assert error.body()["error"]["message"] == error.message  # type: ignore[index]
    assert "expected" in error.message or "did you mean include_usage?" in error.message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"seed": NaN}',
        b'{"temperature": 1e999}',
        b'{"n": 1, "n": 2}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_a_body_that_is_no_object_is_refused(data):
    """Whatever the bytes are, the answer is one line."""
    with pytest.raises(ApiError) as caught:
        parse(CompletionRequest, data)
    assert caught.value.status == 400
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


def test_prompts_come_in_four_forms():
    """A text, texts, ids, and lists of ids."""
    for prompt in ("a", ["a", "b"], [1, 2], [[1], [2, 3]], []):
        assert parse(CompletionRequest, json.dumps({"prompt": prompt}).encode()).prompt == prompt
