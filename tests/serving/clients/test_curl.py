"""curl, as documents show it."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from tests.serving.command import WAIT, Server, events_of

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")]


def curl(*arguments: str) -> str:
    """Return what curl prints."""
    command = ["curl", "--silent", "--show-error", "--noproxy", "*", *arguments]
    done = subprocess.run(command, capture_output=True, timeout=WAIT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode("utf-8")


def test_one_text_whole_and_streamed(server: Server):
    """With -d alone, which says nothing of JSON, and -N for a stream: the same text."""
    url = f"{server.url}/v1/completions"
    body = {"prompt": "Ada sees", "max_tokens": 12, "seed": 1}
    whole = json.loads(curl(url, "-d", json.dumps(body)))
    events = events_of(curl("-N", url, "-d", json.dumps({**body, "stream": True})).splitlines())
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]


def test_a_large_body_that_waits_for_leave_to_come(server: Server):
    """curl sends `Expect: 100-continue` before large bodies, and is told to go on; one too large gets 413."""
    ids = [5] * 90
    padding = " " * 2_000_000
    body = json.dumps({"prompt": ids, "max_tokens": 4}) + padding
    expect = ("-H", "Expect: 100-continue", "-H", "Content-Type: application/json", "--data-binary", "@-")
    for size, status in ((1, "200"), (3, "413")):
        command = ["curl", "-s", "--noproxy", "*", "-o", "/dev/null", "-w", "%{http_code}", *expect]
        done = subprocess.run(
            [*command, f"{server.url}/v1/completions"],
            input=(body + padding * (size - 1)).encode(),
            capture_output=True,
            timeout=WAIT,
            check=False,
        )
        assert done.stdout.decode() == status


def test_what_is_asked_of_a_server_by_hand(server: Server):
    """HEAD and GET of what there is, and of what there is not, have a status that says so."""
    assert json.loads(curl(f"{server.url}/health"))["status"] == "ok"
    assert "transformerlm_generated_tokens_total" in curl(f"{server.url}/metrics")
    assert "200" in curl("--head", f"{server.url}/health").splitlines()[0]
    assert json.loads(curl(f"{server.url}/nothing"))["error"]["code"] == "unknown_url"
    assert "error" in json.loads(curl("-X", "DELETE", f"{server.url}/v1/models"))
