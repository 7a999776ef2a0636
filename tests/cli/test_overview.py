"""`transformerlm` without a command, and with an unknown one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib

import pytest

from cli.overview import summary
from tests.cli.commands import ROOT, call


def transformerlm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `transformerlm` as its console script does."""
    command = [sys.executable, "-c", "from cli.entry import transformerlm; transformerlm()", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]], ids=str)
def test_the_commands_are_listed_in_order(arguments, monkeypatch):
    """Each console script has its line, one that needs another's files comes after it, and all fit the terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    done = call("overview", *arguments)
    assert (done.code, done.stderr) == (0, "")
    listed = re.findall(r"^  ([\w-]+) +[A-Z]", done.stdout, flags=re.MULTILINE)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {f"transformerlm-{verb}" for verb in listed} == set(scripts) - {"transformerlm"}
    order = ["quickstart", "init", "download", "train-tokenizer", "make-data", "train", "infer", "eval", "export"]
    assert [verb for verb in listed if verb in order] == order
    assert max(map(len, done.stdout.splitlines())) < 80


def test_a_command_by_its_name_is_its_script():
    """`transformerlm make-data ...` says what `transformerlm-make-data ...` says; `import` is a command, too."""
    done = transformerlm("make-data")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("transformerlm-make-data: expected --config FILE.toml")
    assert transformerlm("import", "--help").stdout.startswith("usage: transformerlm-import ")


def test_python_m_is_the_same():
    """`python -m transformerlm` is `transformerlm`."""
    done = subprocess.run(
        [sys.executable, "-m", "transformerlm", "trian"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = ["transformerlm: trian is not a command (did you mean train?)", "transformerlm: see transformerlm --help"]
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", lines)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["make_data", "--input=x"], "make_data is not a command (did you mean make-data?)"),
        (["xyz"], "xyz is not a command; there are quickstart, init, "),
        (["--config", "train.toml"], "--config: expected a command first, such as transformerlm train --help"),
    ],
)
def test_what_is_no_command(words, line):
    """A typo is answered with the most likely command, an option with where it belongs."""
    done = call("overview", *words)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"transformerlm: {line}")


@pytest.mark.parametrize("words", [["--print-completion"], ["--print-completion", "tcsh"], ["--print-completion=csh"]])
def test_a_shell_without_completions(words):
    """The error names the shells that have them."""
    done = call("overview", *words)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith("--print-completion: expected one of bash, zsh, fish, found '")


def test_the_version():
    """`transformerlm --version` is the version of the commands."""
    assert call("overview", "--version").stdout == call("train", "--version").stdout


@pytest.mark.parametrize("text", ["Do this.", "Do this: and that.", "Do this. Then that.", "Do this.\n\nMore."])
def test_a_summary_ends_at_the_first_stop(text):
    """One line is enough in a list."""
    assert summary(text) == "Do this"


def test_a_reader_that_goes_away_is_no_traceback():
    """`transformerlm --help | true` says nothing on stderr."""
    command = f"{sys.executable} -c 'from cli.entry import transformerlm; transformerlm()' --help | true"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False, env=buffered)
    assert done.stderr == ""
