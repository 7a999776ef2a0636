"""`transformerlm-chat`: messages from a terminal or a pipe, answers as text or JSON lines, and the commands between."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from cli.summary import next_commands
from tests.cli.commands import ROOT, call, shipped
from tests.training.chat_run import ANSWER, train_chat_run

WAIT = 120.0  # seconds, for what comes at once unless the machine is busy


@pytest.fixture(scope="session")
def chat_run(tmp_path_factory):
    """Return a run that was trained on conversations, which no test changes."""
    return train_chat_run(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def chat(chat_run):
    """Return a function that calls the command with lines of stdin; its answers are the most likely ones."""

    def run(*lines, arguments=(), checkpoint=chat_run):
        usual = ["--checkpoint", checkpoint, "--device=cpu", "--sampling.temperature=0.0"]
        return call("chat", *usual, *arguments, stdin="".join(f"{line}\n" for line in lines))

    return run


def answers(outcome):
    """Return the answers of JSON lines."""
    assert outcome.code == 0, outcome.stderr
    return [record["text.assistant"] for record in outcome.records]


def test_a_line_is_a_message_and_its_answer_a_json_line(chat):
    """In a pipe each line is a message of one conversation; empty lines are none."""
    done = chat("Is Ada here?", "", "Is Bob at sea?")
    assert answers(done) == [ANSWER, ANSWER]
    assert [record["text.user"] for record in done.records] == ["Is Ada here?", "Is Bob at sea?"]
    assert set(done.records[0]) == {
        "event",
        "params.seed",
        "text.user",
        "text.assistant",
        "is_stopped",
        "messages_left_out",
        "metrics.latency_ms",
    }


def test_text_is_the_answer_alone(chat):
    """Where text is asked for, stdout has the answers and nothing else."""
    done = chat("Is Ada here?", "Is Bob here?", arguments=["--output.format=text"])
    assert (done.code, done.stdout) == (0, f"{ANSWER}\n{ANSWER}\n")


def test_the_seed_decides(chat):
    """The same seed gives the same answer, as the one that is asked for in the conversation does."""
    drawn = ["--sampling.temperature=4.0", "--sampling.top_p=1.0", "--sampling.max_new_tokens=8"]
    first, again, other = (answers(chat("Hi", arguments=[*drawn, f"--seed={seed}"])) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert answers(chat("/seed 2", "Hi", arguments=[*drawn, "--seed=1"])) == other
    refused = ("-1", "x", f"{2**63}", f"000{10**22}", "9" * 5000)
    done = chat("/seed 0007", "/seed", *(f"/seed {one}" for one in refused), "Hi", arguments=drawn)
    assert done.records[0]["params.seed"] == 7
    assert done.stderr.count("the seed is 7") == 2 + len(refused)
    assert done.stderr.count("/seed: expected a whole number from 0 to") == len(refused)


def test_a_conversation_is_saved_as_make_data_reads_it(chat, chat_run, tmp_path):
    """`/save` adds a line with all messages, the system's too; make-data takes the file as it is."""
    path = tmp_path / "talk.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "old"}]}')  # without a line end
    done = chat("/save x.jsonl", "Is Zoë here?", f"/save {path}", "/reset", "/system", "Again?", f"/save {path}",
                arguments=["--system=Be brief."])  # fmt: skip
    assert len(answers(done)) == 2
    assert "/save: nothing has been said yet" in done.stderr
    lines = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    answer = {"role": "assistant", "content": ANSWER}
    assert lines[1:] == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is Zoë here?"}, answer],
        [{"role": "user", "content": "Again?"}, {"role": "assistant", "content": done.records[1]["text.assistant"]}],
    ]
    tokenizer = chat_run.parent / "tokenizer"
    made = call("make_data", "--toml=[chat]", "--input", path, "--tokenizer", tokenizer, "--train", tmp_path / "t.npy")
    assert made.code == 0, made.stderr


def test_what_cannot_be_saved_is_told_and_the_conversation_goes_on(chat, tmp_path):
    """A name of another kind, none, and a folder that does not exist."""
    done = chat("Hi", "/save", f"/save {tmp_path / 'talk.txt'}", f"/save {tmp_path / 'no/talk.jsonl'}", "Is Bob here?")
    assert len(answers(done)) == 2
    assert "/save: expected the name of a .jsonl file, found none" in done.stderr
    assert done.stderr.count("/save: expected the name of a .jsonl file, found ") == 2
    assert re.search(r"/save: .*no/talk\.jsonl: cannot be written: No such file", done.stderr)
    done = chat("Hi", "/save ~nobody-of-this-name/talk.jsonl", "/save a\0b.jsonl", "Is Bob here?")
    assert len(answers(done)) == 2
    assert done.stderr.count("cannot be written") == 2


def test_commands_are_told_apart_from_messages(chat):
    """A command that does not exist is answered with the likely one; two slashes begin a message with one."""
    done = chat("/rest", "/help", "//reset", "/exit", "not read")
    assert [record["text.user"] for record in done.records] == ["/reset"]
    assert "/rest is not a command (did you mean /reset?); /help lists them" in done.stderr
    for command in ("/reset", "/save FILE.jsonl", "/seed N", "/system TEXT", "/help", "/exit", "Ctrl-C"):
        assert command in done.stderr


def test_the_oldest_pairs_are_left_out_and_that_is_told_once(chat):
    """When the conversation is longer than the context it goes on; after /reset it would be told again."""
    done = chat(*["Is Ada at sea?"] * 8, "/reset", *["Is Ada at sea?"] * 8, arguments=["--sampling.max_new_tokens=12"])
    assert answers(done)[0] == ANSWER
    left_out = [record["messages_left_out"] for record in done.records]
    assert left_out[0] == left_out[8] == 0
    assert left_out[7] == left_out[15] > 0
    assert done.stderr.count("longer than the model's context") == 2


def test_a_checkpoint_without_a_format_says_how_to_get_one(chat, pipeline):
    """A model of plain text is refused, unless the TOML gives the strings by hand."""
    done = chat("Hi", checkpoint=pipeline.run)
    assert done.code == 2
    assert re.search(r"run: expected a model with a chat format, .* docs/documents\.md .* \[chat\]", done.stderr)
    by_hand = '[chat]\nuser = "Q: "\nassistant = "A: "\nend = "\\n"\nafter = ""\nspecial_tokens = []'
    toml = ["--sampling.max_new_tokens=4", "--toml", by_hand]
    assert len(answers(chat("Hi", checkpoint=pipeline.run, arguments=toml))) == 1
    done = chat("Hi", checkpoint=pipeline.run, arguments=["--toml=[chat]"])
    assert done.code == 2
    assert "chat.special_tokens: expected special tokens of the tokenizer" in done.stderr


def test_no_input_and_odd_bytes(chat, chat_run):
    """No line at all is no answer; a line that is not UTF-8 is refused after those before it were answered."""
    done = chat()
    assert (done.code, done.stdout) == (0, "")
    command = [sys.executable, "-P", "-m", "cli.chat", "--checkpoint", chat_run, "--device=cpu"]
    done = subprocess.run(command, input=b"Hi\n\xff\n", capture_output=True, cwd=ROOT, timeout=WAIT, check=False)
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 1
    assert b"stdin: line 2: expected a message in UTF-8, found the byte 0xff after 0 others" in done.stderr


@pytest.mark.parametrize(("facts", "command"), [({"chat": {}}, "transformerlm-chat"), ({}, "transformerlm-infer")])
def test_a_run_on_conversations_is_talked_to(facts, command):
    """The end of a training names the command that suits its data."""
    data = SimpleNamespace(train=SimpleNamespace(metadata=facts))
    world = SimpleNamespace(is_distributed=True)
    trainer = SimpleNamespace(
        data=data,
        config=SimpleNamespace(data=SimpleNamespace(valid=None)),
        runtime=SimpleNamespace(world=world),
        state=SimpleNamespace(step=1),
    )
    first = next_commands(trainer, Path("runs/x"), {"best_checkpoint_step": None})[0][1]
    assert f"{command} --checkpoint=runs/x" in first


def test_the_shipped_file_is_for_a_run():
    """It names the run of the chat recipe."""
    done = call("chat", "--config", shipped("chat"), "--print-config")
    assert done.code == 0
    assert 'checkpoint = "runs/chat"' in done.stdout


class Terminal:
    """The command in a pseudo-terminal, whose Ctrl-C is a signal to it."""

    def __init__(self, *arguments):
        import pty  # not on Windows

        self.screen = ""
        command = [sys.executable, "-P", "-m", "cli.chat", "--device=cpu", *map(str, arguments)]
        environment = os.environ | {"TERM": "xterm", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._pid, self._master = pty.fork()
        if self._pid == 0:
            os.execve(sys.executable, command, environment)

    def wait_until(self, happened):
        """Read until something is on the screen."""
        end = time.monotonic() + WAIT
        while not happened():
            assert time.monotonic() < end, self.screen
            if select.select([self._master], [], [], 0.1)[0]:
                self.screen += os.read(self._master, 65536).decode(errors="replace").replace("\r\n", "\n")

    def wait_for(self, text, *, after=0):
        """Read until the screen has a text after a place, and return where it ends."""
        self.wait_until(lambda: text in self.screen[after:])
        return self.screen.index(text, after) + len(text)

    def type(self, text):
        """Type."""
        os.write(self._master, text.encode())

    def close(self, key=""):
        """Return the exit code, when the command has ended; the key is pressed again where readline did not hear it.

        Not once it says that it ends: then one more Ctrl-C ends Python at once.
        """
        end = time.monotonic() + WAIT
        with suppress(OSError):  # Linux says so when the other end is closed
            while time.monotonic() < end:
                if "interrupted" not in self.screen:
                    self.type(key)
                pressed = time.monotonic()
                self.wait_until(lambda since=pressed: key and time.monotonic() > since + 2)
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        os.close(self._master)
        return code


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal")
def test_a_terminal_asks_answers_and_ends_with_ctrl_d(chat_run):
    """The prompt is there, the answer is text, and Ctrl-D is no error."""
    terminal = Terminal("--checkpoint", chat_run, "--sampling.temperature=0.0")
    place = terminal.wait_for("> ")
    terminal.type("Is Ada here?\n")
    place = terminal.wait_for(ANSWER, after=place)
    terminal.wait_for("> ", after=place)
    terminal.type("\x04")
    assert terminal.close() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal")
def test_ctrl_c_stops_an_answer_and_at_the_prompt_the_program(chat_run):
    """The answer ends where it is, and the conversation goes on; Ctrl-C at the prompt ends it with 130."""
    endless = ["--sampling.max_new_tokens=1000000", "--sampling.stop_at_eos=false", "--sampling.temperature=2.0"]
    terminal = Terminal("--checkpoint", chat_run, *endless)
    place = terminal.wait_for("> ")
    terminal.type("Hi\n")
    place = terminal.wait_for("Hi\n", after=place)
    terminal.wait_until(lambda: len(terminal.screen) > place + 30)
    terminal.type("\x03")
    terminal.wait_until(lambda: terminal.screen.endswith("\n> "))
    terminal.type("/seed 5\n")
    place = terminal.wait_for("the seed is 5", after=place)
    terminal.wait_for("> ", after=place)
    assert terminal.close("\x03") == 130
    assert "interrupted" in terminal.screen
