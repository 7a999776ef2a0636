"""/v1/completions: choices, seeds, log-probabilities, streams, limits, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from tests.serving.fake_engine import END
from tests.serving.web import Web, run, until
from transformerlm.serving.api_schema import CompletionRequest, parsed
from transformerlm.serving.choices import COMPLETION, joined
from transformerlm.serving.completions import _Job
from transformerlm.serving.engine import Piece, RequestRefused, UnknownCheckpoint
from transformerlm.serving.texts_plan import plan_texts


def test_a_text_goes_on(tmp_path):
    """The answer has the form of OpenAI's; a request's id, model, fingerprint and usage are in it."""

    async def ask(web: Web) -> None:
        answer = (await web.complete(model="tiny", prompt="once a", max_tokens=3, seed=0, user="me")).json()
        [choice] = answer["choices"]
        assert (choice["index"], choice["text"], choice["finish_reason"]) == (0, "once aonce", "length")
        assert choice["logprobs"] is None
        assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
        assert answer["system_fingerprint"] == "140-0123abcd"
        usage = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
        assert answer["usage"] == usage | {"prompt_tokens_details": {"cached_tokens": 0}}
        assert answer["seed"] == 0
        [event] = web.events
        assert event | {"ms": 0, "id": ""} == {
            "event": "request", "id": "", "finish": "length", "prompt_tokens": 2, "tokens": 3, "ms": 0
        }  # fmt: skip

    run(tmp_path, ask)


def test_all_settings_reach_the_engine(tmp_path):
    """Each parameter of a request is one of the engine's; what is not named has the server's default."""

    async def ask(web: Web) -> None:
        given = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 1.0}
        given |= {"frequency_penalty": -1.0, "repetition_penalty": 1.5, "min_tokens": 2, "ignore_eos": True}
        given |= {"max_tokens": 5}
        await web.choices(prompt="once", stop="x", logit_bias={"97": -100, "5": 2.5}, **given)
        seen = web.engine.seen[-1]
        assert {name: getattr(seen, name) for name in given} == given
        assert (seen.stop, seen.logit_bias) == (["x"], {97: -100.0, 5: 2.5})
        await web.choices(prompt="once", top_k=-1)
        seen = web.engine.seen[-1]
        assert (seen.temperature, seen.top_p, seen.max_tokens, seen.top_k) == (0.7, 0.25, 6, None)

    run(tmp_path, ask, sections={"defaults": {"temperature": 0.7, "top_p": 0.25, "max_tokens": 6, "top_k": 3}})


def test_each_text_names_its_own_weights(tmp_path):
    """Two choices may be made by two steps: an event names that of its choice, a whole answer only one of them all."""

    async def ask(web: Web) -> None:
        web.engine.fingerprint_of = lambda request: f"{request.seed}-0123abcd"
        body = {"prompt": "ab", "n": 2, "max_tokens": 2, "seed": 7}
        *chunks, last = await web.chunks(**body, stream_options={"include_usage": True})
        named = {(chunk["choices"][0]["index"], chunk["system_fingerprint"]) for chunk in chunks}
        assert named == {(0, "7-0123abcd"), (1, "8-0123abcd")}
        assert last["system_fingerprint"] is None
        assert (await web.complete(**body)).json()["system_fingerprint"] is None
        assert (await web.complete(**(body | {"n": 1}))).json()["system_fingerprint"] == "7-0123abcd"

    run(tmp_path, ask)


def test_choices_are_in_order_and_numbered_as_infer_numbers_its_samples(tmp_path):
    """Choice i of prompt j is number j * n + i, and draws with the seed plus that number."""

    async def ask(web: Web) -> None:
        choices = await web.choices(prompt=["once", "ab"], n=2, seed=41, max_tokens=1)
        assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
        assert [one.seed for one in web.engine.seen] == [41, 42, 43, 44]
        assert [choice["text"] for choice in choices] == ["once", "once", "b", "a"]

    run(tmp_path, ask)


def test_without_a_seed_the_drawn_one_is_told(tmp_path):
    """The same request with the seed that was told gives the same text; a negative one is one, too."""

    async def ask(web: Web) -> None:
        answer = (await web.complete(prompt="once a time", max_tokens=4)).json()
        again = (await web.complete(prompt="once a time", max_tokens=4, seed=answer["seed"])).json()
        assert answer["choices"] == again["choices"]
        assert (await web.complete(prompt="once", max_tokens=1, seed=-1)).json()["seed"] == 2**63 - 1

    run(tmp_path, ask)


@pytest.mark.parametrize("body", [{}, {"logprobs": 1}, {"echo": True}, {"echo": True, "logprobs": 2}, {"n": 3}])
def test_a_stream_is_the_whole_answer(tmp_path, body):
    """The events of a stream, put together, are the choices of the whole answer."""

    async def ask(web: Web) -> None:
        body.update(prompt="\u00e9t\u00e9 once", max_tokens=6, seed=3, return_token_ids=True)
        whole = await web.choices(**body)
        parts: dict[int, list[dict[str, Any]]] = {}
        for chunk in await web.chunks(**body):
            for choice in chunk["choices"]:
                parts.setdefault(choice["index"], []).append(choice)
        assert [joined(parts[index]) for index in sorted(parts)] == whole
        assert all(len(one) > 1 for one in parts.values())

    run(tmp_path, ask)


def test_alternatives_have_ids_when_ids_are_asked_for(tmp_path):
    """Each key of `top_logprobs` has its id, in prompt and text; without return_token_ids there are none."""

    async def ask(web: Web) -> None:
        body = {"prompt": "once a", "max_tokens": 3, "seed": 0, "logprobs": 2, "echo": True}
        [choice] = await web.choices(**body, return_token_ids=True)
        places = list(zip(choice["logprobs"]["top_logprobs"], choice["top_token_ids"], strict=True))
        assert len(places) == 5
        assert places[0] == (None, None)  # nothing comes before the first token
        for top, ids in places[1:]:
            assert top.keys() == ids.keys()
            assert {web.engine.tokenizer.decode([one]) for one in ids.values()} >= {
                key for key in top if not key.startswith("bytes:")
            }
        [plain] = await web.choices(**body)
        assert "top_token_ids" not in plain

    run(tmp_path, ask)


def test_a_stream_tells_its_usage_when_asked(tmp_path):
    """The last event has it and no choices; continuous, each event has it so far."""

    async def ask(web: Web) -> None:
        plain = await web.chunks(prompt="once", max_tokens=2)
        assert all("usage" not in chunk and chunk["choices"] for chunk in plain)
        *others, last = await web.chunks(prompt="once", max_tokens=2, stream_options={"include_usage": True})
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 2
        assert [chunk["usage"] for chunk in others] == [None] * len(others)
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = await web.chunks(prompt="once", max_tokens=2, stream_options=options)
        so_far = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert so_far == sorted(so_far)
        assert (so_far[0] >= 1, so_far[-1]) == (True, 2)

    run(tmp_path, ask)


def test_echo_with_log_probabilities_scores_the_prompt(tmp_path):
    """With no token to draw the prompt alone is scored, as lm-eval asks; offsets point into the text."""

    async def ask(web: Web) -> None:
        [choice] = await web.choices(prompt="once \u00e9 a", echo=True, logprobs=2, max_tokens=0)
        assert (choice["text"], choice["finish_reason"]) == ("once \u00e9 a", "length")
        found = choice["logprobs"]
        assert found["tokens"] == ["once", " ", "bytes:\\xc3", "bytes:\\xa9", " a"]
        assert found["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
        assert found["top_logprobs"][0] is None
        assert found["top_logprobs"][1] == {" ": -0.5, "z": -1.5}
        assert found["text_offset"] == [0, 4, 5, 5, 6]
        [choice] = await web.choices(prompt=[97, 98], echo=True, logprobs=0, max_tokens=2, seed=0)
        assert choice["text"] == "abab"
        assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
        assert choice["logprobs"]["top_logprobs"][1:] == [{"b": -0.25}, {"a": -0.5}, {"b": -0.25}]

    run(tmp_path, ask)


def test_an_end_token_has_its_place_among_the_log_probabilities(tmp_path):
    """It counts as drawn and has no text, so whoever cuts the drawn tokens off keeps all of the prompt's."""

    async def ask(web: Web) -> None:
        prompt = [97, web.engine.end_id]
        [choice] = await web.choices(prompt=prompt, echo=True, logprobs=1, max_tokens=1, seed=1)
        assert (choice["text"], choice["finish_reason"]) == ("a" + END, "stop")
        assert choice["logprobs"]["tokens"] == ["a", END, END]
        assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
        assert choice["logprobs"]["top_logprobs"][2] == {END: -0.5}
        assert len(choice["logprobs"]["text_offset"]) == 3

    run(tmp_path, ask)


def test_an_empty_prompt_starts_a_document(tmp_path):
    """As for transformerlm-infer; the token that does it is not shown."""

    async def ask(web: Web) -> None:
        for prompt in ("", None, [[]]):
            [choice] = await web.choices(prompt=prompt, echo=True, max_tokens=1, ignore_eos=True)
            assert web.engine.seen[-1].prompt == [web.engine.end_id]
            assert choice["text"] == END  # which the fake engine draws

    run(tmp_path, ask)


def test_special_tokens_in_a_prompt_are_text_unless_allowed(tmp_path):
    """As for transformerlm-infer."""

    async def ask(web: Web) -> None:
        await web.choices(prompt=END, max_tokens=1)
        assert web.engine.seen[-1].prompt == [*END.encode()]
        await web.choices(prompt=END, max_tokens=1, allow_special=True)
        assert web.engine.seen[-1].prompt == [web.engine.end_id]

    run(tmp_path, ask)


def test_half_a_character_is_answered(tmp_path):
    """JSON can spell one; it counts as U+FFFD in a prompt, and an error shows it."""

    async def ask(web: Web) -> None:
        headers = {"Content-Type": "application/json"}
        for body in (
            rb'{"prompt": "a\ud800", "echo": true, "stop": "\udfff"}',
            rb'{"prompt": ["\ud83d"], "stream": true}',
        ):
            answer = await web.client.post("/v1/completions", content=body, headers=headers)
            assert answer.status_code == 200
        assert web.engine.seen[0].stop == ["\ufffd"]
        for body in (rb'{"\ud800": 1}', rb'{"temperature": "\ud800"}', rb'{"model": "\ud800"}'):
            answer = await web.client.post("/v1/completions", content=body, headers=headers)
            assert answer.status_code in (400, 404)

    run(tmp_path, ask)


def test_best_of_returns_the_most_likely(tmp_path):
    """All candidates are drawn and counted; the best are returned, without log-probabilities nobody asked for."""

    async def ask(web: Web) -> None:
        answer = (await web.complete(prompt="ab", best_of=3, n=2, max_tokens=1, seed=0)).json()
        assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, "b"), (1, "a")]
        assert all(choice["logprobs"] is None for choice in answer["choices"])
        assert answer["usage"]["completion_tokens"] == 3
        assert [one.num_logprobs for one in web.engine.seen] == [0, 0, 0]
        as_drawn = await web.choices(prompt="ab", n=2, max_tokens=1, seed=0, logprobs=0)
        assert [choice["text"] for choice in as_drawn] == ["a", "b"]

    run(tmp_path, ask)


def test_a_stop_string_ends_the_text_before_it(tmp_path):
    """The text ends before it, and the answer says which it was."""

    async def ask(web: Web) -> None:
        [choice] = await web.choices(prompt="once a", max_tokens=9, stop=["q", " a"], seed=0)
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("once", "stop", " a")

    run(tmp_path, ask)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "other"}, 404, "'other' is not served here; there is tiny"),
        ({"model": "tiny@step-1"}, 404, "is not served here"),
        ({"n": 17}, 400, "n: expected at most 16 (limits.n)"),
        ({"prompt": ["a"] * 65}, 400, "at most 64 prompts (limits.prompts)"),
        ({"prompt": ["a"] * 9, "n": 9}, 400, "at most 80 texts in one request"),
        ({"prompt": []}, 400, "at least one prompt"),
        ({"prompt": [261]}, 400, "token ids from 0 to 260, found 261"),
        ({"prompt": [[1], [-1]]}, 400, "token ids from 0 to 260, found -1"),
        ({"logprobs": 21}, 400, "limits.logprobs"),
        ({"max_tokens": 5000}, 400, "limits.max_tokens"),
        ({"max_tokens": 64}, 400, "fit the context of 64 tokens, found 2 + 64"),
        ({"prompt": "ab" * 33}, 400, "at most 64 tokens, found 66"),
        ({"prompt": "a" * 10_000}, 400, "10000 characters"),
        ({"stop": ["x"] * 17}, 400, "limits.stop"),
        ({"stop": ""}, 400, "found an empty one"),
        ({"logit_bias": {"x": 1}}, 400, "token ids from 0 to 260, found 'x'"),
        ({"logit_bias": {"261": 1}}, 400, "token ids from 0 to 260"),
        ({"min_tokens": 20}, 400, "min_tokens: expected at most max_tokens (16)"),
        ({"best_of": 2, "n": 3}, 400, "best_of: expected at least n"),
        ({"best_of": 2, "stream": True}, 400, "best_of"),
        ({"stream_options": {}}, 400, "expected stream = true"),
    ],
)
def test_what_is_beyond_a_limit_is_refused(tmp_path, body, status, words):
    """The error names the key, the limit and what was found; the engine sees nothing of it."""

    async def ask(web: Web) -> None:
        answer = await web.complete(**({"prompt": "ab"} | body))
        assert answer.status_code == status
        error = answer.json()["error"]
        assert words in error["message"], error
        assert error["param"] in body
        assert web.engine.seen == []
        assert [event["event"] for event in web.events] == ["rejected"]

    run(tmp_path, ask, sections={"engine": {"slots": 40}, "limits": {"waiting": 40}})


def test_what_could_never_wait_is_no_busy_server(tmp_path):
    """Prompts beyond the slots that are longer than all that may wait are refused for good, not until later."""

    async def ask(web: Web) -> None:
        slots = web.config.engine.slots
        fits = await web.complete(prompt=["ab"] * slots, max_tokens=1)
        refused = await web.complete(prompt=[*["ab"] * slots, "abcd"], max_tokens=1)
        assert (fits.status_code, refused.status_code) == (200, 400)
        assert "at most 3 tokens that wait (limits.waiting_tokens), found 4" in refused.json()["error"]["message"]

    run(tmp_path, ask, slots=16, sections={"limits": {"waiting_tokens": 3}})


def test_a_context_that_is_full_may_slide(tmp_path):
    """With limits.overflow = "slide" long texts are taken; the prompt cannot be scored, then."""

    async def ask(web: Web) -> None:
        answer = (await web.complete(prompt="ab" * 50 + "c", max_tokens=200)).json()
        assert answer["usage"]["prompt_tokens"] == web.events[-1]["prompt_tokens"] == 101
        assert web.engine.seen[-1].prompt == [*("ba" * 31 + "bc").encode()]  # the model's window, no more
        await web.choices(prompt="x" + "ab" * 50, max_tokens=20, repetition_penalty=1.1)
        assert web.engine.seen[-1].prompt == [*("xab" + "ab" * 32).encode()]  # a penalty for each id of the prompt
        refused = await web.complete(prompt="ab" * 50, max_tokens=0, echo=True, logprobs=0)
        assert refused.json()["error"]["code"] == "context_length_exceeded"

    run(tmp_path, ask, sections={"limits": {"overflow": "slide"}})


def test_the_token_before_each_text_is_sent_with_a_prompt_that_is_cut(tmp_path):
    """The engine begins each window with it; where ids have a penalty, it is the first of those before the window."""

    async def ask(web: Web) -> None:
        web.engine.facts = replace(web.engine.facts, starts_texts=True)
        start, window = web.engine.end_id, [*("ab" * 32).encode()]
        await web.choices(prompt="ab" * 50, max_tokens=1)
        assert web.engine.seen[-1].prompt == [start, *window]
        await web.choices(prompt="ab" * 50, max_tokens=1, repetition_penalty=1.1)
        assert web.engine.seen[-1].prompt == [start, *b"ab", *window]
        await web.choices(prompt="ab", max_tokens=1)
        assert web.engine.seen[-1].prompt == [start, *b"ab"]

    run(tmp_path, ask, sections={"limits": {"overflow": "slide"}})


def test_the_last_token_needs_no_place_in_the_context(tmp_path):
    """A prompt as long as the context gets one token; a default that nobody named is cut to what fits."""

    async def ask(web: Web) -> None:
        assert len((await web.choices(prompt=[97] * 64, max_tokens=1))[0]["text"]) == 1
        await web.choices(prompt=[97] * 60)
        assert web.engine.seen[-1].max_tokens == 5

    run(tmp_path, ask)


def test_a_kept_checkpoint_has_a_name(tmp_path):
    """`model@step-...` asks for it."""

    async def ask(web: Web) -> None:
        await web.choices(model="tiny@step-00000020", prompt="ab", max_tokens=1)
        assert web.engine.seen[-1].checkpoint == "step-00000020"

    run(tmp_path, ask)


def test_a_full_queue_is_429(tmp_path):
    """A request that has no room is told when to come again; n = 3 counts three."""

    async def ask(web: Web) -> None:
        web.engine.gate.clear()
        first = asyncio.create_task(web.complete(prompt="ab", n=6))
        await until(lambda: len(web.engine.active) == 6)
        refused = await web.complete(prompt="ab", n=3)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        web.engine.gate.set()
        assert (await first).status_code == 200

    run(tmp_path, ask)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 8])
def test_a_client_that_leaves_frees_its_places(tmp_path, stream, n):
    """Running and queued texts are cancelled as soon as the connection is closed, whole answers and streams alike."""

    async def ask(web: Web) -> None:
        web.engine.gate.clear()
        _, writer = await asyncio.open_connection("127.0.0.1", web.port)
        body = json.dumps({"prompt": "ab", "n": n, "stream": stream}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        writer.write(head + body)
        await until(lambda: len(web.engine.active) == n)
        writer.close()
        await until(lambda: not web.engine.active)
        await until(lambda: len(web.events) == n)
        assert {event["finish"] for event in web.events} == {"cancelled"}

    run(tmp_path, ask, over_network=True)


def test_an_engine_that_dies_is_told(tmp_path):
    """A whole answer is a 503; a stream gets an error event and ends; later requests get 503."""

    async def ask(web: Web) -> None:
        web.engine.gate.clear()
        whole = asyncio.create_task(web.complete(prompt="ab"))
        stream = asyncio.create_task(web.chunks(prompt="ab"))
        await until(lambda: len(web.engine.active) == 2)
        web.engine.die()
        answer = await whole
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "the engine died")
        assert answer.headers["retry-after"]
        [event] = await stream
        assert event["error"]["code"] == "engine_unavailable"
        assert [one["event"] for one in web.events] == ["request"] * 2  # both were taken, and neither was refused
        assert (await web.complete(prompt="ab")).status_code == 503
        assert web.events[2:] == [{"event": "rejected", "reason": "engine_unavailable"}]

    run(tmp_path, ask)


@pytest.mark.parametrize(
    ("end", "status", "code", "words"),
    [
        (Piece(finish="error"), 500, "not_finite", "the model's logits are not finite numbers"),
        (Piece(finish="error", error="KeyError: 7"), 500, "internal", "the engine failed at this text: KeyError: 7"),
        (RequestRefused("ids from 0 to 9"), 400, "refused", "the engine refuses the request: ids from 0 to 9"),
        (UnknownCheckpoint("step-3: damaged"), 404, "model_not_found", "step-3: damaged"),
    ],
    ids=str,
)
def test_a_text_that_ends_with_an_error_says_which(tmp_path, end, status, code, words):
    """Whole and streamed: what went wrong is told in its own words, and counted as an error; nothing was refused."""

    async def ask(web: Web) -> None:
        web.engine.ends_by = end
        answer = await web.complete(prompt="ab")
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert answer.json()["error"]["message"] == words
        [event] = await web.chunks(prompt="ab")
        assert event["error"] == answer.json()["error"]
        assert [(one["event"], one.get("finish")) for one in web.events] == [("request", "error")] * 2
        assert b"requests_rejected_total{" not in (await web.client.get("/metrics")).content

    run(tmp_path, ask)


def test_a_text_has_its_time(tmp_path):
    """A text that is not complete within timeouts.request is ended with an error."""

    async def ask(web: Web) -> None:
        web.engine.gate.clear()
        answer = await web.complete(prompt="ab")
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        [event] = await web.chunks(prompt="ab")
        assert event["error"]["code"] == "timeout"
        assert web.engine.active == []
        assert {event["finish"] for event in web.events} == {"timeout"}

    run(tmp_path, ask, sections={"timeouts": {"request": "0.05s"}})


@pytest.mark.parametrize("n", [1, 2])
def test_a_client_that_reads_slowly_takes_nothing_of_the_time(tmp_path, n):
    """What is made in time reaches it, however long each part waits to be taken."""

    async def ask(web: Web) -> None:
        served = web.app.state.served
        asked = await parsed(CompletionRequest, json.dumps({"prompt": "ab", "n": n, "max_tokens": 3}).encode())
        job = _Job(served, plan_texts(served, asked), COMPLETION)
        finish = []
        async for pieces in job.steps():
            finish += [piece.finish for _, piece in pieces if piece.finish]
            await asyncio.sleep(1.5)
        assert finish == ["length"] * n

    run(tmp_path, ask, sections={"timeouts": {"request": "1s"}})


def test_what_a_step_makes_goes_out_together(tmp_path):
    """The events of all choices of one step are one piece of the body."""

    async def ask(web: Web) -> None:
        pieces = []
        body = {"prompt": "ab", "n": 4, "max_tokens": 3, "stream": True}
        async with web.client.stream("POST", "/v1/completions", json=body) as answer:
            async for piece in answer.aiter_raw():
                pieces.append(piece.count(b"data: "))
        assert max(pieces) >= 4
        assert sum(pieces) == 4 * 3 + 1

    run(tmp_path, ask)


def test_no_event_holds_a_prompt(tmp_path):
    """What the server tells of requests has neither prompts nor texts in it."""

    async def ask(web: Web) -> None:
        await web.choices(prompt="secret", max_tokens=2)
        await web.complete(prompt="secret", n=99)
        assert len(web.events) == 2
        assert "secret" not in json.dumps(web.events)

    run(tmp_path, ask)
