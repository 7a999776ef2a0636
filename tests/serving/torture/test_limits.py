"""What does not fit is refused at once and counts as it should; who may not ask is told so on every route."""

from __future__ import annotations

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.serving.command import WAIT, Server, memory_of, save_random_model, serving, wait_until
from tests.serving.torture.test_leaving import LONG_TEXT, connect, raw_request, sum_of
from tests.serving.web import settings
from transformerlm.serving.app import routes
from transformerlm.serving.web import is_open


def test_a_full_queue_is_429_and_n_choices_count_n(server):
    """With 16 that run and 64 that wait the next one is refused, and so are n = 16 where 15 fit; all others end."""
    pid = server.engine_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        sockets = [connect(server) for _ in range(5)]
        for one in sockets[:4]:
            one.sendall(raw_request({**LONG_TEXT, "n": 16}, stream=True))
        sockets[4].sendall(raw_request({**LONG_TEXT, "prompt": ["a"] * 15}, stream=True))
        wait_until(lambda: sum_of(server) == 79)
        assert server.health()["waiting"] == 63
        for body in ({"n": 2}, {"n": 16}, {"prompt": ["a", "b"]}, {"best_of": 2}):
            refused = server.complete(**{"prompt": "a", **body})
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
        assert sum_of(server) == 79
        sockets += [connect(server)]
        sockets[5].sendall(raw_request({**LONG_TEXT}, stream=False))
        wait_until(lambda: sum_of(server) == 80)
        assert server.complete(prompt="a").status_code == 429
        for one in sockets:
            one.close()
    finally:
        os.kill(pid, signal.SIGCONT)
    server.wait_until_idle()
    assert server.texts(prompt="a", max_tokens=2)


def test_a_stop_string_that_no_text_could_hold_is_refused(server):
    """The engine would make a table of each of its characters for each text, and all others would wait for that."""
    refused = server.complete(prompt="a", n=16, stop=["b" * 1_000_000])
    assert refused.status_code == 400
    assert (
        refused.json()["error"]["message"] == "stop: expected strings of at most 1000 characters, found one of 1000000"
    )
    assert server.texts(prompt="a", max_tokens=2, stop="b" * 1000)


def test_settings_at_their_ends_give_texts(server):
    """The smallest and the largest of each setting, alone and beside the others: no text ends in an error."""
    restarts = server.health()["restarts"]
    ends = {
        "temperature": (0, 1e-300, 100),
        "top_p": (0, -0.0, 1e-300, 0.05, 0.3, 1),
        "top_k": (-1, 0, 1, 2**31 - 1),
        "min_p": (0, 1e-300, 1),
        "repetition_penalty": (0.01, 100),
        "presence_penalty": (-2, 2),
        "frequency_penalty": (-2, 2),
        "logit_bias": ({}, {str(one): -100 for one in range(290)}, {str(one): 100 for one in range(290)}),
        "min_tokens": (0, 4),
    }
    rng = random.Random(3)
    bodies = [{name: value} for name, values in ends.items() for value in values]
    bodies += [{name: rng.choice(values) for name, values in ends.items()} for _ in range(30)]
    for body in bodies:
        answer = server.complete(prompt="Ada", max_tokens=4, **body)
        assert answer.status_code == 200, (body, answer.text)
    ids = list(range(100))  # more than there is room for at first
    assert server.complete(prompt=ids, max_tokens=4, repetition_penalty=1.1).status_code == 200
    for penalty in (0, 1e-300):
        assert server.complete(prompt="Ada", repetition_penalty=penalty).status_code == 400
    assert server.health()["restarts"] == restarts


def test_a_slash_too_many_is_no_redirect(server):
    """A redirect would name a host, and behind a proxy that is the wrong one."""
    answer = server.get("/health/")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


@pytest.mark.slow
def test_many_long_texts_are_tokenized_in_the_memory_of_one(untrained, tmp_path):
    """Eight at once, each with an answer of ten times its size: their parts are not all there at the same time."""
    text = "xyz " * 200_000
    with serving(untrained, tmp_path) as server, ThreadPoolExecutor(8) as pool:

        def ask(number: int) -> int:
            answer = httpx.post(f"{server.url}/tokenize", json={"prompt": text}, timeout=WAIT)
            return int(answer.json()["count"])

        one = ask(0)
        before = peak_memory_of(server.process.pid)
        assert list(pool.map(ask, range(8))) == [one] * 8
        assert peak_memory_of(server.process.pid) < before + 100_000_000


@pytest.mark.slow
def test_every_route_checks_key_host_and_origin(untrained, tmp_path):
    """Over real HTTP: 401 without the key, 403 for another host or page, and no header that lets a page read."""
    environment, arguments = (
        {"KEY": "secret"},
        ["--access.key_env=KEY", "--access.allowed_origins=https://good.example"],
    )
    with serving(untrained, tmp_path, *arguments, environment=environment) as server:
        key = {"Authorization": "Bearer secret"}
        paths = [(route.path, method) for route in routes(settings()) for method in getattr(route, "methods", ["GET"])]
        assert len(paths) > 8
        for path, method in [*paths, ("/nothing", "GET"), ("/", "GET"), ("/static/x", "GET")]:
            path = path.replace("{name:path}", "run").replace("{name}", "run")

            def ask(**headers: str) -> httpx.Response:
                with httpx.stream(method, server.url + path, headers=headers, timeout=WAIT) as answer:  # noqa: B023
                    return answer  # events come without end

            expected = 200 if is_open(path) else 401  # the page itself is there to ask for the key
            assert ask().status_code == expected, path
            assert ask(Authorization="Bearer secre").status_code == expected, path
            assert ask(**key, Host="evil.example").status_code == 403, path
            evil = ask(**key, Origin="http://evil.example")
            assert evil.status_code == 403, path
            assert "access-control-allow-origin" not in evil.headers, path
            good = ask(**key, Origin="https://good.example")
            assert good.status_code not in (401, 403), path
            assert good.headers["access-control-allow-origin"] == "https://good.example", path
            assert "origin" in good.headers["vary"].lower(), path
            assert good.headers["x-content-type-options"] == "nosniff", path
        assert server.terminate() == 143


@pytest.mark.slow
def test_scores_of_a_long_prompt_take_little_memory(files, tmp_path):
    """Echo with log-probabilities of 1,024 places and 50,000 tokens: the logits are never all there at once."""
    sizes = {"vocab_size": 50_000, "context_length": 1024, "d_model": 64, "num_layers": 2, "num_heads": 2, "d_ff": 128}
    run = save_random_model(tmp_path / "run", files, changes={f"model.{name}": one for name, one in sizes.items()})
    with serving(run, tmp_path / "server", "--engine.slots=4") as server:
        pid = server.engine_pid
        assert pid is not None
        ids = [number % 280 for number in range(1023)]
        warm = server.complete(prompt=ids[:300], echo=True, logprobs=20, max_tokens=1)
        assert warm.status_code == 200, warm.text
        before, web_before = peak_memory_of(pid), peak_memory_of(server.process.pid)
        answer = server.complete(prompt=ids, echo=True, logprobs=20, max_tokens=1, return_token_ids=True)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["choices"][0]["logprobs"]["token_logprobs"]) == 1024
        assert peak_memory_of(pid) < before + 100_000_000
        assert peak_memory_of(server.process.pid) < web_before + 100_000_000


def peak_memory_of(pid: int) -> int:
    """Return the most bytes of memory that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


@pytest.mark.slow
def test_memory_stays_where_it_is(untrained, tmp_path):
    """Minutes of 4 streams with ever new prompts, more by an environment variable: the processes do not grow."""
    minutes = float(os.environ.get("TRANSFORMERLM_SOAK_MINUTES", "5"))
    rng, end = random.Random(1), time.monotonic() + 60 * minutes

    def ask(server: Server) -> None:
        body = {"prompt": [rng.randrange(289) for _ in range(rng.randrange(1, 100))], "max_tokens": 20}
        server.texts(**body, logprobs=rng.choice([None, 5]), echo=rng.random() < 0.2)

    with serving(untrained, tmp_path, "--engine.prefix_cache_mb=16") as server, ThreadPoolExecutor(4) as pool:
        pids = [server.process.pid, server.engine_pid or 0]
        list(pool.map(ask, [server] * 1500))
        before = [memory_of(pid) for pid in pids]
        while time.monotonic() < end:
            list(pool.map(ask, [server] * 100))
        for pid, bytes_before in zip(pids, before, strict=True):
            assert memory_of(pid) < bytes_before + 10_000_000
        assert server.health()["restarts"] == 0
        assert server.terminate() == 143
