"""The examples of docs/chat.md, tried with a run that was trained on conversations."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from cli.chat import HELP
from tests.cli.test_serve import WAIT, serving
from tests.pages import blocks
from tests.test_readme import ROOT
from tests.training.chat_run import ANSWER, train_chat_run
from transformerlm.serving.api_schema import ChatRequest
from transformerlm.tokenizer import Tokenizer
from transformerlm.tokenizer.chat import ChatFormat, ChatRenderer

PAGE = ROOT / "docs/chat.md"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a shell")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder with the page's run, runs/chat."""
    folder = tmp_path_factory.mktemp("home")
    train_chat_run(
        tmp_path_factory.mktemp("training"), changes={"runs_dir": str(folder / "runs"), "logging.run_name": "chat"}
    )
    return folder


def block_with(language: str, words: str) -> str:
    """Return the only block of a language that has some words."""
    [found] = [block.text for block in blocks(PAGE) if block.language == language and words in block.text]
    return found


def run(command: list[str], folder: Path, *, stdin: str = "") -> str:
    """Run a command of the page, and return its stdout."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, input=stdin, capture_output=True, text=True, timeout=WAIT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_terminals_commands_work(home):
    """A conversation by hand, and one in a pipe, whose answers are the file that the page names."""
    said = run(
        ["bash", "-c", block_with("bash", "transformerlm-chat --checkpoint runs/chat\n")], home, stdin="Hi\n/exit\n"
    )
    assert len(said.splitlines()) == 1
    run(["bash", "-c", block_with("bash", "printf")], home)
    lines = [json.loads(line) for line in (home / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["text.user"] for line in lines] == ["Is Ada here?", "Is Bob at sea?"]
    assert lines[0]["text.assistant"] == ANSWER


@pytest.mark.slow
def test_the_servers_examples_work(home):
    """curl gets an answer, and so does openai's client, whole and as a stream."""
    with serving(home / "runs/chat") as (_, url):
        asked = block_with("bash", "curl").replace("http://", "").replace("localhost:8000", url)
        answer = json.loads(run(["bash", "-c", asked], home))
        assert answer["choices"][0]["message"]["content"]
        if find_spec("openai") is not None:
            program = block_with("py", "openai").replace("http://localhost:8000", url)
            assert run([sys.executable, "-c", program], home)


@pytest.mark.slow
def test_the_programs_of_the_page_work(home):
    """A conversation in Python, the exports, and transformers with one of them, which gives the answer of training."""
    assert "assistant" in run([sys.executable, "-c", block_with("python", "Conversation")], home)
    run(["bash", "-c", block_with("bash", "transformerlm-export")], home)
    assert (home / "exports/chat.gguf").is_file()
    said = run([sys.executable, "-c", block_with("python", "apply_chat_template")], home)
    assert said.strip() == ANSWER


@pytest.mark.slow
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs the extra serve-test")
def test_llama_cpp_chats_with_the_gguf_file(home):
    """Its own server makes our prompt by the file's template, gives the answer of training, and stops there."""
    run(["bash", "-c", block_with("bash", "transformerlm-export").replace("exports/", "others/")], home)
    command = [sys.executable, "-m", "benchmarking.peers.llama_server", "others/chat.gguf", "1", "1", "96"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is Ada here?"}]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=home, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        prompt = httpx.post(f"{url}/apply-template", json={"messages": messages}, timeout=WAIT).json()["prompt"]
        body = {"messages": messages, "temperature": 0}
        [choice] = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=WAIT).json()["choices"]
        server.communicate()  # closes its stdin, at which it ends
    tokenizer = Tokenizer.from_directory(next((home / "runs/chat/checkpoints").glob("step-*")) / "tokenizer")
    renderer = ChatRenderer(tokenizer, ChatFormat(), start_id=tokenizer.special_token_ids["<|endoftext|>"])
    assert tokenizer.encode(prompt) == renderer.prompt([(one["role"], one["content"]) for one in messages]).tolist()
    assert (choice["message"]["content"], choice["finish_reason"]) == (ANSWER, "stop")


def test_the_page_has_every_key_and_every_command():
    """The table of keys names what the schema takes; that of commands names what /help lists."""
    text = PAGE.read_text(encoding="utf-8")
    keys = re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table_of(text, "| key |")))
    assert sorted(keys) == sorted(ChatRequest.model_fields)
    named = {
        command for line in table_of(text, "| you type |") for command in re.findall(r"`(/\w+)", line.split("|")[1])
    }
    assert named == set(re.findall(r"^(/\w+)", HELP, flags=re.M))


def table_of(text: str, head: str) -> list[str]:
    """Return the rows of the table that begins so."""
    return [line for line in text.partition(head)[2].partition("\n\n")[0].splitlines()[2:] if line.startswith("|")]
