"""`transformerlm-runs`: what training runs have done and do, each word of it a command of its own.

A word is four things: `config/runs_<word>.py`, `cli/runs_<word>.py`, `config/resources/runs_<word>.toml`, and a line
`"transformerlm-runs <word>"` in `config/commands.py`.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.runs")

import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from cli.completion import SHELLS, Completed, completion_script
from cli.options import package_version
from cli.utils import exit_after
from config.errors import ConfigError
from config.keys import iter_keys
from config.suggest import closest

if TYPE_CHECKING:
    from pydantic import BaseModel

PROGRAM = "transformerlm-runs"


def schemas_of_words() -> dict[str, type[BaseModel]]:
    """Return the schema of each word; this imports those of all commands, which takes longer than to list the runs."""
    from config.commands import COMMANDS

    return {name.partition(" ")[2]: schema for name, schema in COMMANDS.items() if name.startswith(f"{PROGRAM} ")}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first word names."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].isidentifier() and find_spec(f"cli.runs_{words[0]}"):
        import_module(f"cli.runs_{words[0]}").main(words[1:])
    exit_after(partial(_answer, words))


def _answer(words: Sequence[str]) -> None:
    """Print what a command line without such a word asks for.

    Raises:
        ConfigError: it asks for something that does not exist.
    """
    option, _, value = " ".join(words[:2]).replace("=", " ").partition(" ")
    if option in ("-h", "--help", "--help-all", "help"):
        print("\n".join(_overview()))
    elif option == "--version":
        print(f"transformerlm {package_version()}")
    elif option == "--print-completion" and value in SHELLS:
        commands = [Completed(f"{PROGRAM} {word}", iter_keys(schema)) for word, schema in schemas_of_words().items()]
        print(completion_script(value, commands))
    elif option == "--print-completion":
        raise ConfigError([f"--print-completion: expected one of {', '.join(SHELLS)}, found {value!r}"])
    else:
        raise ConfigError([_unknown(option), f"{PROGRAM}: see {PROGRAM} --help"])


def _overview() -> Iterator[str]:
    from config.commands import SUMMARIES

    schemas = schemas_of_words()
    yield f"usage: {PROGRAM} {'|'.join(schemas)} [RUN ...] [--config FILE.toml] [--key=value ...]\n"
    yield f"{SUMMARIES[PROGRAM]}:\n"
    for word, schema in schemas.items():
        text = (schema.__doc__ or "").split("\n\n")[0]
        yield textwrap.fill(f"  {word:<9}{text}", 79, subsequent_indent=" " * 11)
    yield f"\n{PROGRAM} WORD --help says more of one. Documentation: docs/runs.md"


def _unknown(word: str) -> str:
    words = list(schemas_of_words())
    if not word or word.startswith("-"):
        return f"{PROGRAM}: expected one of {', '.join(words)} first, found {word or 'nothing'}"
    meant = closest(word, words, cutoff=0.5)
    suggestion = f" (did you mean {' or '.join(meant)}?)" if meant else f"; there are {', '.join(words)}"
    return f"{PROGRAM}: {word} is not one of its words{suggestion}"
