"""What a command proposes to type next runs when it is pasted."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cli.hints import command_line, hint_lines

posix = pytest.mark.skipif(sys.platform == "win32", reason="runs a shell")


@pytest.fixture(autouse=True)
def _no_uv(monkeypatch):
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Return an environment's folder with one command; the interpreter seems to be in it."""
    folder = tmp_path / "my env/bin"
    folder.mkdir(parents=True)
    command = folder / "transformerlm-infer"
    command.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return folder


@posix
def test_arguments_are_quoted_for_the_shell(installed, monkeypatch):
    """Paths with spaces and prompts with quotes reach the command as they are."""
    monkeypatch.setenv("PATH", str(installed), prepend=os.pathsep)
    arguments = ["--checkpoint=runs/my run", "--prompt", 'Say "hi", $USER']
    line = command_line("infer", *arguments)
    assert shlex.split(line) == ["transformerlm-infer", *arguments]
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == arguments


def test_uv_run_goes_before_where_uv_started_the_process(installed, monkeypatch):
    """Its environment is on the PATH of this process only, so the name alone would not be found later."""
    monkeypatch.setenv("PATH", str(installed), prepend=os.pathsep)
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    assert command_line("infer", Path("a")) == "uv run transformerlm-infer a"


@posix
def test_what_is_not_on_the_path_is_named_by_its_path(installed, monkeypatch):
    """An environment that is not activated is named, relative to the working directory if it is below that."""
    monkeypatch.setenv("PATH", os.defpath)
    assert shlex.split(command_line("infer")) == [str(installed / "transformerlm-infer")]
    monkeypatch.chdir(installed.parent)
    line = command_line("infer", "x")
    assert line == "bin/transformerlm-infer x"
    assert subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout == "x\n"
    assert command_line("eval") == "transformerlm-eval"  # nowhere: the plain name is most helpful


def test_an_explanation_is_a_comment_of_the_shell():
    """All lines pasted together run the commands and nothing else."""
    lines = hint_lines([("say one", "echo 1"), ("say 'two'", "echo 2")])
    assert lines == ["# say one", "echo 1", "# say 'two'", "echo 2"]
