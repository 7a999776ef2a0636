"""The document of the routes: it has all of them, and what a server answers is what it says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

from tests.serving.command import ENVIRONMENT, WAIT, save_random_model, serving
from tests.serving.test_chat_completions import CHAT, PLAIN
from tests.serving.test_runs_api import write_run
from tests.serving.web import Web, run, settings
from transformerlm.serving.api_schema import ChatRequest, CompletionRequest
from transformerlm.serving.app import routes
from transformerlm.serving.openapi import openapi

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "negative_data_rejection,unsupported_method"
)


def refs_of(tree: Any) -> set[str]:
    """Return all references in a document."""
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    own = {tree["$ref"]} if isinstance(tree, dict) and isinstance(tree.get("$ref"), str) else set()
    return own.union(*map(refs_of, parts))


def test_the_document_has_every_route_and_every_key(tmp_path):
    """All routes but the page's files; each key of a request; what it refers to is there."""

    async def ask(web: Web) -> None:
        document = (await web.client.get("/openapi.json")).json()
        expected = {route.path.replace(":path}", "}") for route in routes(settings())}
        assert set(document["paths"]) == expected - {"/", "/static/{name}"}
        schemas = document["components"]["schemas"]
        asked = schemas["CompletionRequest"]
        assert set(CompletionRequest.model_fields) < set(asked["properties"])
        of_chats = schemas["ChatRequest"]["properties"]
        assert set(ChatRequest.model_fields) < set(of_chats)
        assert of_chats["messages"]["items"] == {"$ref": "#/components/schemas/ChatMessage"}
        assert (of_chats["tools"]["type"], asked["properties"]["messages"]["type"]) == ("null", "null")
        assert (asked["additionalProperties"], asked["properties"]["suffix"]["type"]) == (False, "null")
        assert refs_of(document) == {f"#/components/schemas/{name}" for name in schemas}
        assert "security" not in document

    run(tmp_path, ask)


def test_the_document_needs_the_key_and_says_so(tmp_path):
    """It is behind the key, as all routes are; without the page its routes are not in it."""

    async def ask(web: Web) -> None:
        assert (await web.client.get("/openapi.json")).status_code == 401
        answer = await web.client.get("/openapi.json", headers={"Authorization": "Bearer secret"})
        document = answer.json()
        assert document["security"] == [{"key": []}]
        assert "/api/runs" not in document["paths"]
        assert "401" in document["paths"]["/tokenize"]["post"]["responses"]

    run(tmp_path, ask, key="secret", sections={"access": {"key_env": "KEY"}, "web": {"enabled": False}})


def test_an_answer_has_the_keys_of_the_document(tmp_path):
    """Of each route that needs nothing: all that must be there is, and nothing else."""

    async def ask(web: Web) -> None:
        schemas = openapi(web.config, routes(web.config))["components"]["schemas"]
        for path, name in (("/health", "Health"), ("/v1/models", "Models"), ("/tokenizer_info", "TokenizerInfo")):
            assert set((await web.client.get(path)).json()) == set(schemas[name]["required"]), path
        answer = (await web.complete(prompt="ab", logprobs=1, return_token_ids=True)).json()
        assert set(answer) == set(schemas["Completion"]["required"])
        assert set(answer["choices"][0]) == set(schemas["Choice"]["properties"])
        of_runs = {
            "/api/runs": "Runs",
            "/api/run?run=first": "Run",
            "/api/lines?run=first": "Lines",
            "/api/differences?run=first&run=second": "Differences",
        }
        for path, name in of_runs.items():
            assert set((await web.client.get(path)).json()) == set(schemas[name]["required"]), path
        card = (await web.client.get("/v1/models/tiny")).json()
        assert set(card) == set(schemas["Model"]["properties"])
        body = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 1, "seed": 1}
        answer = (await web.client.post("/v1/chat/completions", json={**body, "return_token_ids": True})).json()
        assert set(answer) == set(schemas["ChatCompletion"]["required"])
        [choice] = answer["choices"]
        assert set(choice) == set(schemas["ChatChoice"]["properties"])
        logprobs = schemas["ChatChoice"]["properties"]["logprobs"]["anyOf"][0]["properties"]
        assert set(choice["logprobs"]) == set(logprobs)
        token = logprobs["content"]["items"]["properties"]
        assert set(choice["logprobs"]["content"][0]) == set(token)
        assert set(choice["logprobs"]["content"][0]["top_logprobs"][0]) == set(token) - {"top_logprobs"}

    for name in ("first", "second"):
        write_run(tmp_path, name)
    run(tmp_path, ask, chat=CHAT, sections={"web": {"runs_dir": str(tmp_path / "runs")}})


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="needs the extra serve-test")
def test_whatever_the_document_allows_is_answered_as_it_says(files, tmp_path):
    """schemathesis asks for it, and for what the document refuses: no 5xx, and answers as described."""
    run = save_random_model(tmp_path / "runs" / "run", files, state={"chat": PLAIN.to_json()})
    limits = ["--limits.max_tokens=8", "--defaults.max_tokens=8", "--limits.overflow=slide"]
    with serving(run, tmp_path / "server", *limits) as server:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", f"--checks={CHECKS}"]
        options = ["--max-examples=40", "--seed=1", "--exclude-path=/api/events", "--request-timeout=60"]
        done = subprocess.run(
            [*command, *options, "--phases=examples,coverage,fuzzing", "--no-color"],
            env=ENVIRONMENT,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=6 * WAIT,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert "Traceback" not in server.stderr
        assert server.health()["restarts"] == 0
