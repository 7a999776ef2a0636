"""`transformerlm-runs tail` shows lines of a run until it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading

from cli.terminal import LIVE
from tests.cli.commands import ROOT, call, call_in_terminal, lines_on_screen
from tests.experiments.runs import FINISHED, STARTED, lines, step, validation, write_run
from transformerlm.utils.lock import DirectoryLock


def test_the_last_lines_of_a_run_that_has_ended(tmp_path):
    """As they are where stdout is no terminal; one line on stderr says how the run is."""
    directory = write_run(tmp_path, "a", STARTED, step(1, 5.0), validation(2, 4.0), FINISHED)
    done = call("runs_tail", directory, "--lines=2")
    assert done.records == [validation(2, 4.0), FINISHED]
    assert (done.code, done.stderr) == (0, f"{directory}: finished\n")
    done = call("runs_tail", directory, "--follow=false", "--output.format=text", "--lines=3")
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "step 1/50  loss 5.000  100 tokens/s",
        "step 2/50  loss 4.000  val loss 4.000  2.000 bits/byte  100 tokens/s",
        "step 50/50  finished: reason max_steps",
    ]
    assert call("runs_tail", directory, "--lines=0").stdout == ""


def test_a_run_is_followed_to_its_end(tmp_path, monkeypatch):
    """On a terminal lines come above a live line with the curve, the speed and the remaining time."""
    monkeypatch.setattr("cli.runs_tail.LOOK_SECONDS", 0.05)
    directory = write_run(tmp_path, "a", STARTED | {"tokens_per_step": 64}, step(1, 5.0))
    path, shown = directory / "metrics.jsonl", threading.Event()
    monkeypatch.setattr("cli.runs_tail.LIVE.show", seeing(shown))

    def train() -> None:
        assert shown.wait(60)
        with path.open("a") as file:
            file.write(lines([step(2, 4.0), FINISHED]))

    with DirectoryLock(directory):
        trainer = threading.Thread(target=train)
        trainer.start()
        text = call_in_terminal("runs_tail", directory).stdout
        trainer.join()
    assert "█  step 1/50  100 tokens/s  ETA 0:31" in text or "▁  step 1/50  100 tokens/s  ETA 0:31" in text
    assert [line for line in lines_on_screen(text) if line][-3:] == [
        "step 2/50  loss 4.000  100 tokens/s",
        "step 50/50  finished: reason max_steps",
        f"{directory}: finished",
    ]


def seeing(shown: threading.Event):
    """Return `LIVE.show` with an event that is set when words were shown."""
    show = LIVE.show

    def shows(words) -> None:
        show(words)
        if words is not None:
            shown.set()

    return shows


def test_ctrl_c_is_a_quiet_end(tmp_path):
    """The exit code is that of an interrupt, and there is no word about it."""
    directory = write_run(tmp_path, "a", STARTED, step(1, 5.0))
    with DirectoryLock(directory):
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.runs_tail", str(directory)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert json.loads(process.stdout.readline()) == STARTED
        assert json.loads(process.stdout.readline()) == step(1, 5.0)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=600) == ("", "")
    assert process.returncode == 130


def test_what_is_no_run_is_refused(tmp_path):
    """Exit 2, with a line that names the file."""
    folder = tmp_path / "folder"
    folder.mkdir()
    done = call("runs_tail", folder)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr == f"error: {folder}: expected the directory of a run, found no metrics.jsonl in it\n"
