"""The command line of a command: an option for each key of its schema, and words that say what to write instead."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from config.io import ConfigError
from config.keys import Key
from config.suggest import hint, nearest


def build_parser(
    keys: Sequence[Key], *, prog: str, description: str, default_config: str | None = None
) -> argparse.ArgumentParser:
    """Return the parser of a command: an option for each key, and those that all commands have.

    What it refuses it raises as a ConfigError.
    """
    parser = _Parser(
        prog=prog,
        usage=f"{prog} --config FILE.toml [--section.key=value ...]",
        description=description,
        epilog="Values come from the defaults, then the files in their order, then --toml, then the other options. "
        "none: not set.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    _add_common(parser, f" (default: the shipped {default_config})" if default_config else "")
    parser.add_argument("--version", action="version", version=f"transformerlm {_version()}")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for key in keys:
        section = key.name.rpartition(".")[0]
        if section not in groups:
            title = f"[[{section}]]" if key.in_list else f"[{section}]" if section else "keys"
            groups[section] = parser.add_argument_group(title)
        _add_key(groups[section], key)
    return parser


def _add_common(parser: argparse.ArgumentParser, usual: str) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        metavar="FILE.toml",
        default=[],
        help=f"the command's TOML file{usual}; of several, each is laid over those before it",
    )
    parser.add_argument(
        "--toml",
        action="append",
        metavar="TEXT",
        default=[],
        help="TOML to lay over the file: --toml 'prompt = [\"[a]\"]'",
    )
    parser.add_argument(
        "--print-config",
        nargs="?",
        choices=["values", "origin"],
        const="values",
        default=None,
        help="print the resolved configuration as TOML, and stop; --print-config=origin: say for each value whether it "
        "is from the defaults, a file, the environment or the command line",
    )
    parser.add_argument(
        "--print-schema", action="store_true", default=False, help="print the JSON schema of the TOML file, and stop"
    )


def _add_key(group: argparse._ArgumentGroup, key: Key) -> None:
    default = "required" if key.default is None else f"default: {key.default}"
    text = f"{key.description} ({key.expected}; {default})".replace("%", "%%")
    if key.in_list:  # no option, but something to read
        group.description = f"{group.description or ''} {key.name.rpartition('.')[2]}: {text}."
    elif key.is_list:
        group.add_argument(f"--{key.name}", nargs="+", action="extend", metavar="VALUE", help=text)
    elif key.is_bool:
        group.add_argument(f"--{key.name}", nargs="?", const="true", metavar="true|false", help=text)
    else:
        group.add_argument(f"--{key.name}", metavar="VALUE", help=text)


def _version() -> str:
    try:
        return version("transformerlm")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "(not installed)"


class _Parser(argparse.ArgumentParser):
    """An argument parser that tells all unknown words at once, each with what was meant most likely."""

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """Return the options of a command line.

        Raises:
            ConfigError: a word is no option, or an option lacks its value.
        """
        self._words = list(sys.argv[1:] if args is None else args)
        options, rest = self.parse_known_args(self._words, namespace)
        if rest:
            self._refuse([self._unknown(word) for word in _without_values(rest)])
        return options

    def error(self, message: str) -> NoReturn:
        """Refuse the command line for a reason of argparse's; a value that looks like an option is told so."""
        option = re.search(r"argument (--[\w.-]+): expected", message)
        if option and option[1] in self._words[:-1]:
            value = self._words[self._words.index(option[1]) + 1]
            if value.startswith("-"):
                message += f"; a value that begins with - is joined to it: {option[1]}={value}"
        self._refuse([message])

    def _refuse(self, reasons: list[str]) -> NoReturn:
        raise ConfigError([*(f"{self.prog}: {reason}" for reason in reasons), f"{self.prog}: see {self.prog} --help"])

    def _unknown(self, word: str) -> str:
        names = [option[2:] for action in self._actions for option in action.option_strings if option[:2] == "--"]
        name, joined, value = word.partition("=")
        if word.startswith("--"):
            return f"{name} is not a known option{hint(name[2:], names, sections=False, prefix='--')}"
        if word.startswith("-"):
            return f"{word} is not a known option; a value that begins with - is joined to its option: --key={word}"
        if joined and re.fullmatch(r"[A-Za-z_][\w.-]*", name):
            found = [name] if name in names else nearest(name, names, sections=False)
            return f"{word} needs -- before it: {' or '.join(f'--{one}={value}' for one in found or [name])}"
        if word.endswith(".toml"):
            return f"{word}: a file of settings is given as --config {word}"
        return f"{word} is not a known word; a setting is given as --section.key=value, a file as --config FILE.toml"


def _without_values(words: Sequence[str]) -> Iterator[str]:
    """Yield what is unknown, without the word that follows an unknown option: it is its value."""
    before = ""
    for word in words:
        is_value = before.startswith("--") and "=" not in before and not word.startswith("-")
        if not is_value:
            yield word
        before = word
