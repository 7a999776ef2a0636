"""`transformerlm` without a command: the list of commands, in the order in which one needs them."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import partial

from cli.completion import SHELLS, Completed, completion_script
from cli.options import package_version
from cli.utils import exit_after
from config.commands import COMMANDS, SUMMARIES
from config.errors import ConfigError
from config.keys import iter_keys
from config.suggest import closest

PREFIX = "transformerlm-"
PROGRAMS = {name: schema for name, schema in COMMANDS.items() if name.startswith(PREFIX)}
VERBS = list(dict.fromkeys(name.removeprefix(PREFIX).partition(" ")[0] for name in PROGRAMS))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script if its first word is not a command."""
    exit_after(partial(answer, sys.argv[1:] if argv is None else argv))


def answer(words: Sequence[str]) -> None:
    """Print what a command line without a command asks for.

    Raises:
        ConfigError: it asks for something that does not exist.
    """
    word, _, value = " ".join(words[:2]).replace("=", " ").partition(" ")
    if word in ("", "-h", "--help", "--help-all", "help"):
        print("\n".join(_overview()))
    elif word == "--version":
        print(f"transformerlm {package_version()}")
    elif word == "--print-completion":
        if value not in SHELLS:
            raise ConfigError([f"--print-completion: expected one of {', '.join(SHELLS)}, found {value!r}"])
        print(completion_script(value, [Completed(name, iter_keys(schema)) for name, schema in PROGRAMS.items()]))
    else:
        raise ConfigError([_unknown(word), "transformerlm: see transformerlm --help"])


def _overview() -> Iterator[str]:
    yield "usage: transformerlm COMMAND [--config FILE.toml] [--key=value ...]\n"
    yield "From raw text to a language model of your own, in the order of the work:\n"
    width = max(40, shutil.get_terminal_size().columns - 1)
    for verb in VERBS:
        text = SUMMARIES[PREFIX + verb] if PREFIX + verb in SUMMARIES else PROGRAMS[PREFIX + verb].__doc__
        yield textwrap.fill(f"  {verb:<17}{summary(text or '')}", width, subsequent_indent=" " * 19)
    yield "\ntransformerlm COMMAND --help says more of one."
    yield "Each is a program of its own, too, such as transformerlm-train."
    yield 'Completion: eval "$(transformerlm --print-completion bash)"; also zsh, fish.'


def summary(text: str) -> str:
    """Return the beginning of a docstring, up to its first full stop or colon."""
    return re.split(r"[.:]\s", f"{text} ")[0]


def _unknown(word: str) -> str:
    if word.startswith("-"):
        return f"transformerlm: {word}: expected a command first, such as transformerlm train --help"
    meant = closest(word.replace("_", "-"), VERBS, cutoff=0.5)
    suggestion = f" (did you mean {' or '.join(meant)}?)" if meant else f"; there are {', '.join(VERBS)}"
    return f"transformerlm: {word} is not a command{suggestion}"
