"""Commands to type next, as lines that can be pasted."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path


def command_line(verb: str, *arguments: object) -> str:
    """Return the line that runs `transformerlm-VERB` from where this process was started, quoted for a shell.

    It begins with `uv run` if uv started this process. A command that is not on the PATH, as in an environment that is
    not activated, is named by its path.
    """
    name = f"transformerlm-{verb}"
    return shlex.join([*_program(name), *map(str, arguments)])


def from_here(path: Path) -> str:
    """Return an absolute path as people type it: relative to the working directory if it is below that."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def hint_lines(hints: Iterable[tuple[str, str]]) -> list[str]:
    """Return pairs of explanation and command as shell lines: the explanation is a comment above the command."""
    return [line for words, command in hints for line in (f"# {words}", command)]


def hints_are_wanted() -> bool:
    """Return whether to propose commands: not with TRANSFORMERLM_HINTS=0, which a command sets when it runs others."""
    return os.environ.get("TRANSFORMERLM_HINTS") != "0"


def _program(name: str) -> list[str]:
    if "UV_RUN_RECURSION_DEPTH" in os.environ:  # set by `uv run`; UV alone is set by `uvx` as well
        return ["uv", "run", name]
    beside = Path(sys.executable).with_name(name)
    return [from_here(beside)] if shutil.which(name) is None and beside.exists() else [name]
