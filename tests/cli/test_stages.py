"""Stages are processes of their own: signals reach them, and their last word counts."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from cli import stages


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_leaves_the_last_word_to_the_running_command(monkeypatch, tmp_path):
    """SIGINT reaches the command that runs; the caller waits for it to save instead of killing it."""
    marker = tmp_path / "saved"
    child = (
        "import signal, sys, time, os, pathlib\n"
        "def save(*_):\n    time.sleep(0.6); pathlib.Path(sys.argv[1]).touch(); sys.exit(130)\n"
        "signal.signal(signal.SIGINT, save); signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])\n"
        "os.kill(os.getppid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(10)\n"
    )
    code, *_ = stages.wait_for([sys.executable, "-c", child, marker], quiet=True)
    assert code == 130
    assert marker.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_command_may_write_in_another_encoding():
    """Where the locale is Latin-1, a sample with an accent is invalid UTF-8; what follows is read all the same."""
    child = r"import sys; sys.stdout.buffer.write(b'caf\xe9\n{}\n')"
    assert stages.wait_for([sys.executable, "-c", child], quiet=True)[:2] == (0, "caf\ufffd\n{}\n")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_while_python_starts_waits_for_the_command(monkeypatch):
    """It is heard when the command can answer: one line and code 130, where Python alone would end in a traceback."""

    class StartedAndInterrupted(subprocess.Popen):
        def __init__(self, *args, **keywords):
            super().__init__(*args, **keywords)
            self.send_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", StartedAndInterrupted)
    code, out, err = stages.wait_for([sys.executable, "-P", "-m", "cli.plan", "--config=train"], quiet=True)
    assert (code, out, err) == (130, "", "interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_request_to_end_is_passed_on():
    """SIGTERM to the caller alone, as a batch system sends it, ends the command that runs, and leaves no orphan."""
    child = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(600)\n"
    )
    code, *_ = stages.wait_for([sys.executable, "-c", child], quiet=True)
    assert code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_what_is_ignored_here_is_ignored_by_the_command():
    """A script's job in the background does not hear Ctrl-C, and `nohup` keeps the terminal's end from all stages."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    previous = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    child = "import signal; print([signal.getsignal(number).name for number in (signal.SIGINT, signal.SIGHUP)])"
    try:
        _, out, _ = stages.wait_for([sys.executable, "-c", child], quiet=True)
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
    assert out == "['SIG_IGN', 'SIG_IGN']\n"
