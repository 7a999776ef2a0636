"""The command line of a command: an option for each key of its schema, and errors that say what to write instead."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from cli.completion import COMMON, SHELLS
from cli.hints import command_line, hint_lines
from config.errors import ConfigError
from config.io import SHIPPED
from config.keys import Key
from config.shipped import shipped_files
from config.suggest import hint, nearest


@dataclass(frozen=True)
class Guide:
    """What the command line and the help of a command say beyond its keys.

    Args:
        prog: the command's name.
        description: what it does.
        default_config: the shipped TOML that it reads without `--config`.
        shipped: its shipped TOML, with comments.
        first_word: the key that a word without an option sets.
        words: the list to which all words without an option belong, such as "runs".
        short: the keys that `--help` shows, in this order; none: all.
        examples: what each does, and its arguments.
    """

    prog: str
    description: str
    default_config: str | None = None
    shipped: Path | None = None
    first_word: str | None = None
    words: str | None = None
    short: Sequence[str] = ()
    examples: Sequence[tuple[str, str]] = ()


def build_parser(keys: Sequence[Key], guide: Guide) -> argparse.ArgumentParser:
    """Return the parser of a command: an option for each key, and those that all commands have.

    It raises a ConfigError for what it refuses.
    """
    parser = _new_parser(keys, guide)
    parser.short_help = lambda: short_help(keys, guide)
    parser.words = guide.words
    parser.takes_words = bool(guide.words or guide.first_word)
    _add_common(parser, guide)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for key in keys:
        section = key.name.rpartition(".")[0]
        if section not in groups:
            title = f"[[{section}]]" if key.in_list else f"[{section}]" if section else "keys"
            groups[section] = parser.add_argument_group(title)
        _add_key(groups[section], key)
    return parser


def short_help(keys: Sequence[Key], guide: Guide) -> str:
    """Return the short help of a command: the keys that people need most, examples, and where to find more."""
    if not guide.short:
        return build_parser(keys, guide).format_help()
    parser = _new_parser(keys, guide)
    parser.formatter_class = partial(argparse.RawDescriptionHelpFormatter, max_help_position=36)
    parser.description = textwrap.fill(guide.description, max(40, shutil.get_terminal_size().columns - 2))
    parser.epilog = "\n".join(_ending(guide, number=len(keys)))
    _add_common(parser, guide, brief=True)
    group = parser.add_argument_group("the settings that one needs most")
    named = {key.name: key for key in keys}
    for name in guide.short:
        _add_key(group, named[name], brief=True)
    return parser.format_help()


def _ending(guide: Guide, *, number: int) -> Iterator[str]:
    yield "examples:"
    command = command_line(*guide.prog.removeprefix("transformerlm-").split(" "))
    for line in hint_lines((what, f"{command} {arguments}".rstrip()) for what, arguments in guide.examples):
        yield f"  {line}"
    if number > len(guide.short):
        yield f"\n--help-all lists all {number} settings."
    yield f"The shipped file, with comments: {guide.shipped}"
    docs = SHIPPED.parents[1] / "docs"
    yield f"Documentation: {docs / 'usage.md'}" if docs.is_dir() else "Documentation: docs/usage.md of the source"


def usage_word(key: str) -> str:
    """Return how a usage line names the word, or the words, that a key takes: RUN, or RUN... for the list `runs`."""
    return f"{key.upper()[:-1]}..." if key.endswith("s") else key.upper()


def _usage(keys: Sequence[Key], guide: Guide) -> str:
    name = guide.first_word or guide.words
    config = "[--config FILE.toml]" if guide.default_config or name else "--config FILE.toml"
    is_optional = any(key.name == name and key.default is not None for key in keys)
    word = f" [{usage_word(name)}]" if name and is_optional else f" {usage_word(name)}" if name else ""
    return f"{guide.prog}{word} {config} [--key=value ...]"


def _new_parser(keys: Sequence[Key], guide: Guide) -> _Parser:
    return _Parser(
        prog=guide.prog,
        usage=_usage(keys, guide),
        description=guide.description,
        epilog="Values come from the defaults, then the files in their order, then --toml, then the other options. "
        "none: not set.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )


class _ShortHelp(argparse.Action):
    """`--help`: the short help of a command."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        """Print it and stop."""
        assert isinstance(parser, _Parser)
        print(parser.short_help(), end="")
        parser.exit()


class _Version(argparse.Action):
    """`--version`: the version, looked up only then, which takes a while."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        """Print it and stop."""
        print(f"transformerlm {package_version()}")
        parser.exit()


def _add_common(parser: argparse.ArgumentParser, guide: Guide, *, brief: bool = False) -> None:
    """Add the options that all commands have; the brief help shows those that a beginner needs."""
    more = {name: argparse.SUPPRESS if brief else text for name, (_, text) in COMMON.items()}
    usual = f" (default: the shipped {guide.default_config})" if guide.default_config else ""
    if guide.first_word:
        parser.add_argument(guide.first_word, nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", nargs=0, action=_ShortHelp, help=COMMON["help"][1])
    parser.add_argument("--help-all", action="help", help=COMMON["help-all"][1])
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        metavar="FILE.toml",
        default=[],
        help=f"{COMMON['config'][1]}, or the name of a shipped one{usual}; of several, each is laid over those before",
    )
    example = "" if brief else ": --toml 'prompt = [\"[a]\"]'"
    parser.add_argument("--toml", action="append", metavar="TEXT", default=[], help=more["toml"] + example)
    origin = (
        "; --print-config=origin: say for each value whether it is from the defaults, a file, the environment or the "
        "command line"
    )
    parser.add_argument(
        "--print-config",
        nargs="?",
        choices=COMMON["print-config"][0],
        const="values",
        default=None,
        help=COMMON["print-config"][1] + ("" if brief else origin),
    )
    parser.add_argument("--print-schema", action="store_true", default=False, help=more["print-schema"])
    parser.add_argument("--print-completion", choices=SHELLS, default=None, help=more["print-completion"])
    parser.add_argument("--version", nargs=0, action=_Version, help=more["version"])


def _add_key(group: argparse._ArgumentGroup, key: Key, *, brief: bool = False) -> None:
    default = "required" if key.default is None else f"default: {key.default}"
    takes = "" if brief and not key.choices else f"{key.takes}; "  # a list of choices says more than a type
    text = f"{key.description} ({takes}{default})".replace("%", "%%")
    if key.in_list:  # not an option, but worth reading
        group.description = f"{group.description or ''} {key.name.rpartition('.')[2]}: {text}."
    elif key.is_list:
        group.add_argument(f"--{key.name}", nargs="+", action="extend", metavar="VALUE", help=text)
    elif key.is_bool:
        group.add_argument(f"--{key.name}", nargs="?", const="true", metavar="true|false", help=text)
    else:
        group.add_argument(f"--{key.name}", metavar="VALUE", help=text)
    if key.short and not brief:
        flag: dict[str, Any] = {"nargs": "?", "const": "true"} if key.is_bool else {}
        group.add_argument(f"--{key.short}", dest=key.name, metavar="VALUE", help=f"short for --{key.name}", **flag)


def as_typed(lines: Iterable[str], keys: Iterable[Key], words: Sequence[str] | None) -> list[str]:
    """Return lines about the options of a command line, in which an option has the short name that was typed."""
    typed = {word.partition("=")[0] for word in (sys.argv[1:] if words is None else words)}
    shorts = [key for key in keys if key.short and f"--{key.short}" in typed]
    for key in shorts:
        lines = [line.replace(f"--{key.name}", f"--{key.short}") for line in lines]
    return list(lines)


def package_version() -> str:
    """Return the version that is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("transformerlm")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "(not installed)"


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports all unknown words at once, each with what was most likely meant."""

    short_help: Callable[[], str]
    words: str | None = None
    takes_words = False

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """Return the options of a command line.

        Raises:
            ConfigError: a word is not an option, or an option lacks its value.
        """
        self._words = list(sys.argv[1:] if args is None else args)
        options, rest = self.parse_known_args(list(self._with_flags_apart()), namespace)
        unknown = list(_without_values(rest))
        if self.words and (free := [word for word in unknown if self._is_free(word)]):
            unknown = [word for word in unknown if word not in free]
            setattr(options, self.words, [*getattr(options, self.words, []), *free])
        if unknown:
            self._refuse([self._unknown(word) for word in unknown])
        return options

    def _with_flags_apart(self) -> Iterator[str]:
        """Yield the words, where some may be free; a bare flag before one of them does not take it for its value."""
        for word, after in pairwise([*self._words, "--"]):
            action = self._option_string_actions.get(word)
            is_flag = self.takes_words and action is not None and action.const == "true"
            yield f"{word}=true" if is_flag and after not in ("true", "false") and not after.startswith("-") else word

    def _is_free(self, word: str) -> bool:
        """Return whether a word is no option, nor one without its dashes."""
        return not word.startswith("-") and f"--{word.partition('=')[0]}" not in self._option_string_actions

    def error(self, message: str) -> NoReturn:
        """Refuse the command line for argparse's reason; for a value that looks like an option, say how to write it."""
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
        if word.endswith(".toml") or word in shipped_files():
            return f"{word}: a file of settings is given as --config {word}"
        return f"{word} is not a known word; a setting is given as --section.key=value, a file as --config FILE.toml"


def _without_values(words: Sequence[str]) -> Iterator[str]:
    """Yield the unknown words, without the word after an unknown option, which is its value."""
    before = ""
    for word in words:
        is_value = before.startswith("--") and "=" not in before and not word.startswith("-")
        if not is_value:
            yield word
        before = word
