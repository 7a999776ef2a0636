"""`transformerlm-serve`: mistakes are one line, a signal ends it with its code, and its texts are those of infer."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import transformerlm
from tests.cli.commands import ROOT, call

WAIT = 300  # seconds, for what takes a second unless the machine is busy


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host=0.0.0.0"], "it needs a key: access.key_env"),
        (["--access.key_env=NO_SUCH_VARIABLE"], "environment variable NO_SUCH_VARIABLE, found no such variable"),
        (["--access.key_env=EMPTY_KEY"], "found an empty one"),
        (["--access.key_env=BAD_KEY"], "found characters that no header takes"),
        (["--host=no.such.host.invalid", "--access.key_env=GOOD_KEY"], "expected an address of this machine"),
        (["--host=192.0.2.1", "--access.key_env=GOOD_KEY", "--port=0"], "cannot listen on 192.0.2.1:0"),
        (["--access.allowed_hosts=a.example:8443"], "address, without a port, found"),
        (["--defaults.max_tokens=5000"], "expected at most limits.max_tokens (4096)"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, words, monkeypatch):
    """The error names the key, what was expected and what was found; the exit code is 2."""
    for name, value in (("EMPTY_KEY", ""), ("BAD_KEY", "a\u00e9"), ("GOOD_KEY", "k")):
        monkeypatch.setenv(name, value)
    done = call("serve", "--checkpoint=nowhere", *arguments)
    assert (done.code, done.stdout) == (2, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_port_that_is_taken_is_one_line():
    """The error says which port, and how to get another."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = call("serve", "--checkpoint=nowhere", f"--port={port}")
    assert done.code == 2
    assert f"cannot listen on 127.0.0.1:{port}: another program uses it; --port=0" in done.stderr


def test_a_missing_library_is_one_line(monkeypatch):
    """Without the extra, the error says how to install it."""
    if hasattr(transformerlm, "serving"):  # importing it anew changes this name, too, by which others patch it
        monkeypatch.setattr(transformerlm, "serving", transformerlm.serving)
    for name in [name for name in sys.modules if name.startswith("transformerlm.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = call("serve", "--checkpoint=nowhere")
    assert done.code == 1
    assert 'pip install -e ".[serve]"' in done.stderr


def test_a_missing_checkpoint_is_one_line(tmp_path):
    """It is named, and nothing is left running."""
    done = call("serve", f"--checkpoint={tmp_path / 'nowhere'}", "--port=0")
    assert (done.code, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "nowhere: no such checkpoint or run directory" in done.stderr


@contextmanager
def serving(run: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Give a server's process and its URL."""
    command = [sys.executable, "-P", "-m", "cli.serve", f"--checkpoint={run}", "--port=0", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe)
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first, process.communicate()
        event = json.loads(first)
        assert event["event"] == "serving"
        yield process, event["url"]
    finally:
        process.kill()
        process.wait(WAIT)


def completed(url: str, **body: Any) -> Any:
    """Return the answer to a request for completions."""
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=WAIT) as answer:
        return json.load(answer)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_its_texts_are_those_of_infer_and_a_signal_lets_them_end(pipeline):
    """Same prompts, same seed: the same texts; SIGTERM waits for a text on its way, and the exit code is 143."""
    sampling = ["--sampling.max_new_tokens=6", "--sampling.temperature=0.9", "--sampling.top_p=0.8"]
    inferred = call(
        "infer", "--checkpoint", pipeline.run, "--prompt", "on", "th", "--num_samples=2", "--seed=7", *sampling
    )
    expected = [record["text.output"] for record in inferred.records]
    with serving(pipeline.run) as (process, url):
        sampled = {"max_tokens": 6, "temperature": 0.9, "top_p": 0.8}
        answer = completed(url, prompt=["on", "th"], n=2, seed=7, **sampled)
        assert [choice["text"] for choice in answer["choices"]] == expected
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=WAIT)
    events = [json.loads(line) for line in out.splitlines()]
    assert process.returncode == 143
    assert [event["event"] for event in events] == ["request"] * 4 + ["stopped"]
    assert events[-1] == {"event": "stopped", "signal": "SIGTERM", "all_texts_ended": True}
    assert "Ctrl-C ends" in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_second_signal_ends_at_once(pipeline):
    """While a long text drains, /health says so and new texts are refused; the second signal does not wait for it."""
    with serving(pipeline.run, "--limits.overflow=slide", "--limits.max_tokens=1000000") as (process, url):
        body = {"prompt": "on", "max_tokens": 1_000_000, "ignore_eos": True}

        def ask() -> None:
            with suppress(OSError):  # the answer never comes
                completed(url, **body)

        long = threading.Thread(target=ask)
        long.start()
        while health(url)["running"] == 0:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        while health(url)["status"] != "draining":
            time.sleep(0.05)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            completed(url, prompt="on")
        time.sleep(1)  # two signals within half a second count as one
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=WAIT)
        long.join(WAIT)
    assert process.returncode == 143
    assert "SIGTERM: ended at once" in err


def health(url: str) -> Any:
    """Return what /health says, whatever its status is."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=WAIT) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)
