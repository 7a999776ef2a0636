"""A signal ends a command in one line from its first moment on, during its imports and at its end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.commands import ROOT, SCHEMAS, script_of, shipped

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

TOKENIZER = ["--tokenizer.vocab_size=290", "--workers=2"]
BOOT_SECONDS = 0.2  # of Python on a busy machine
STOPS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 0)]
# A library that gets the signal while it is imported: like most; one that takes any exception for a missing option, as
# torch does with numpy; and one in a callback, where Python shows the exception and continues.
PLAIN = "import os, time\nos.kill(os.getpid(), {number})\ntime.sleep(20)\n"
SWALLOWED = (
    "import os, time\ntry:\n    os.kill(os.getpid(), {number})\nexcept BaseException:\n    pass\ntime.sleep(20)\n"
)
DROPPED = """
import os, time
class Lost:
    def __del__(self):
        os.kill(os.getpid(), {number})
Lost()
time.sleep(20)
"""


def start(folder: Path, name: str, *arguments: object, how: str = "script", **files: str) -> subprocess.Popen[str]:
    """Start a command as its console script or `python -m` does, with some libraries in place of the real ones."""
    for library, source in files.items():
        (folder / f"{library}.py").write_text(source)
    _, *word = script_of(name)
    entry = "runs" if word else name
    script = ["-c", f"from cli.entry import {entry}; {entry}()", *word]
    command = [sys.executable, *(script if how == "script" else ["-m", f"cli.{name}"]), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, process_group=0, **pipes)


def ending(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return a process's exit code, and what it wrote on stdout and stderr."""
    stdout, stderr = process.communicate(timeout=600)
    return process.returncode, stdout, stderr


@pytest.mark.parametrize("how", ["script", "module"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_ctrl_c_is_one_line_before_anything_is_imported(name, how, tmp_path):
    """Each command is interrupted in its first import with exit code 130 and one line."""
    process = start(tmp_path, name, "--help", how=how, pydantic=PLAIN.format(number=int(signal.SIGINT)))
    line = "SIGINT: stopped before the first step\n" if name == "train" else "interrupted\n"
    assert ending(process) == (130, "", line)


@pytest.mark.parametrize(
    ("number", "code", "library", "source"),
    [(*stop, "pydantic", PLAIN) for stop in STOPS]
    + [(*stop, "torch", source) for stop, source in zip(STOPS, [DROPPED, SWALLOWED, PLAIN, PLAIN], strict=True)],
)
def test_training_that_is_not_begun_ends_with_the_signals_code(number, code, library, source, tmp_path):
    """Each signal ends the start with its code and line, even inside an import that would swallow an exception."""
    process = start(tmp_path, "train", "--config", shipped("train"), **{library: source.format(number=int(number))})
    assert ending(process) == (code, "", f"{number.name}: stopped before the first step\n")


def test_a_server_that_is_not_ready_ends_with_the_signals_code(tmp_path):
    """A service manager that stops it during its imports gets 143 and one line."""
    process = start(tmp_path, "serve", "--checkpoint=x", pydantic=PLAIN.format(number=int(signal.SIGTERM)))
    assert ending(process) == (143, "", "SIGTERM: stopped before the server was ready\n")


@pytest.mark.parametrize(
    ("name", "library", "source", "arguments"),
    [
        ("infer", "torch", SWALLOWED, ["--checkpoint=nowhere", "--prompt=a"]),
        ("eval", "torch", DROPPED, ["--checkpoint=a", "--input=a"]),
        ("make_data", "regex", SWALLOWED, ["--tokenizer=nowhere", "--input=a", "--train=b.npy"]),
    ],
)
def test_ctrl_c_is_one_line_while_a_library_is_imported(name, library, source, arguments, tmp_path):
    """A library that a command imports later cannot swallow Ctrl-C, or turn it into a traceback."""
    process = start(tmp_path, name, *arguments, **{library: source.format(number=int(signal.SIGINT))})
    assert ending(process) == (130, "", "interrupted\n")


AT_THE_END = """
import atexit, os
atexit.register(lambda: os.kill(os.getpid(), 2))
raise ImportError("a")
"""


def test_ctrl_c_at_the_very_end_is_no_traceback(tmp_path):
    """While Python shuts down, Ctrl-C ends it like a program that does not handle it."""
    code, _, stderr = ending(start(tmp_path, "infer", "--checkpoint=nowhere", "--prompt=a", torch=AT_THE_END))
    assert (code, stderr) == (-signal.SIGINT, "error: a\n")


def entry_after(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program that calls one of the scripts."""
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_second_ctrl_c_is_one_line_too():
    """Ctrl-C while a command cleans up after the first ends it."""
    done = entry_after("""
import os
from cli import entry, infer
def main():
    try:
        os.kill(os.getpid(), 2)
    finally:
        os.kill(os.getpid(), 2)
infer.main = main
entry.infer()
""")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("name", ["infer", "train"])
def test_a_job_in_the_background_does_not_hear_ctrl_c(name):
    """A shell starts a background job with SIGINT ignored, and a command keeps it ignored."""
    done = entry_after(f"""
import os, signal
from cli import entry, train, {name}
signal.signal(signal.SIGINT, signal.SIG_IGN)
def main():
    os.kill(os.getpid(), 2)
    with train.StopSignals():
        os.kill(os.getpid(), 2)
{name}.main = main
entry.{name}()
print("done")
""")
    assert (done.returncode, done.stdout) == (0, "done\n")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_a_signal_at_a_random_moment_is_no_traceback(seed, pipeline, tmp_path):
    """Whenever it comes, the command ends with the signal's code or, if it was done before, with its own."""
    rng = random.Random(seed)
    commands = {
        "train": ["--config", pipeline.train_toml, "--runs_dir", tmp_path, "--training.max_steps=100000"],
        "infer": ["--checkpoint", pipeline.run, "--prompt=Ada", "--num_samples=100000"],
        "eval": ["--checkpoint", pipeline.run, "--input", pipeline.files.text],
        "export": ["--checkpoint", pipeline.run, "--output", tmp_path / "out"],
        "import_": ["--help"],
        "train_tokenizer": ["--input", pipeline.files.text, "--output_dir", tmp_path / "out", *TOKENIZER],
    }
    name = rng.choice(list(commands))
    number, code = rng.choice(STOPS) if name == "train" else STOPS[0]
    process = start(tmp_path, name, *commands[name])
    time.sleep(rng.uniform(BOOT_SECONDS, 2.0))
    os.killpg(process.pid, number)  # as a terminal does
    found, _, stderr = ending(process)
    assert "Traceback" not in stderr
    assert found in ((code,) if name == "train" else (code, 0, -number)), stderr
