"""What every command shares: options made from its schema, one way to fail, and progress for people on stderr."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from pydantic import BaseModel

from config.io import SHIPPED, ConfigError, Key, dump_json_schema, dump_toml, iter_keys, load_config, suggest

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_SIGINT = 130

Schema = TypeVar("Schema", bound=BaseModel)


@dataclass(frozen=True)
class Command(Generic[Schema]):
    """A console script: its name, its schema, what it does with a checked configuration, and its default TOML, if any.

    `run` imports the heavy libraries itself, so that `--help`, `--print-config` and errors answer at once.
    """

    name: str
    schema: type[Schema]
    run: Callable[[Schema], int | None]
    default_config: str | None = None


def main(command: Command[Schema], argv: Sequence[str] | None = None) -> NoReturn:
    """Parse the command line, build the configuration, run the command, and exit with the code that DESIGN names.

    Exit codes: 0 done, 1 failed, 2 bad configuration or input, 130 interrupted.
    """
    try:
        config = configure(command, argv)
        code = command.run(config) if config is not None else 0
    except ConfigError as error:
        fail(error.lines, EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        fail(["interrupted"], EXIT_SIGINT)
    except BrokenPipeError:
        # The reader of stdout has gone (`| head`): nothing more to say, and nothing to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
    except (
        ValueError,
        FileNotFoundError,
        FileExistsError,
        IsADirectoryError,
        NotADirectoryError,
        PermissionError,
    ) as error:
        _fail_with(error, EXIT_BAD_INPUT)
    except (OSError, ImportError, RuntimeError, MemoryError) as error:
        _fail_with(error, EXIT_FAILED)
    sys.exit(code or 0)


def configure(command: Command[Schema], argv: Sequence[str] | None = None) -> Schema | None:
    """Return the command's configuration, or None when an option such as `--print-config` has answered already.

    Raises:
        ConfigError: anything in the file or on the command line is wrong.
    """
    keys = list(iter_keys(command.schema))
    options = vars(_build_parser(command, keys).parse_args(argv))
    path = options.pop("config") or (SHIPPED / command.default_config if command.default_config else None)
    if options.pop("print_schema"):
        print(dump_json_schema(command.schema))
        return None
    print_config = options.pop("print_config")
    config = load_config(command.schema, path, options)
    if print_config:
        print(dump_toml(config), end="")
        return None
    return config


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and suggest the nearest option."""

    def error(self, message: str) -> NoReturn:
        word = message.removeprefix("unrecognized arguments: ").split(" ")[0].split("=")[0]
        if message.startswith("unrecognized arguments") and word.startswith("--"):
            options = [
                option[2:] for action in self._actions for option in action.option_strings if option.startswith("--")
            ]
            message = f"{word} is not a known option{suggest(word[2:], options)}"
        raise ConfigError([f"{self.prog}: {message}", f"{self.prog}: see {self.prog} --help"])


def _build_parser(command: Command[Any], keys: list[Key]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=command.name,
        usage=f"{command.name} --config FILE.toml [--section.key=value ...]",
        description=(command.schema.__doc__ or "").split("\n\n")[0],
        epilog="Values come from the defaults, then the file, then the command line. none: not set.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    usual = f" (default: the shipped {command.default_config})" if command.default_config else ""
    parser.add_argument(
        "--config", type=Path, metavar="FILE.toml", default=None, help=f"the command's TOML file{usual}"
    )
    parser.add_argument(
        "--print-config", action="store_true", default=False, help="print the resolved configuration as TOML, and stop"
    )
    parser.add_argument(
        "--print-schema", action="store_true", default=False, help="print the JSON schema of the TOML file, and stop"
    )
    parser.add_argument("--version", action="version", version=f"transformerlm {_version()}")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for key in keys:
        section = key.name.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(f"[{section}]" if section else "keys")
        _add_key(groups[section], key)
    return parser


def _add_key(group: argparse._ArgumentGroup, key: Key) -> None:
    default = "required" if key.default is None else f"default: {key.default}"
    text = f"{key.description} ({key.expected}; {default})".replace("%", "%%")
    if key.is_list:
        group.add_argument(f"--{key.name}", nargs="+", metavar="VALUE", help=text)
    elif key.is_bool:
        group.add_argument(f"--{key.name}", nargs="?", const="true", metavar="true|false", help=text)
    else:
        group.add_argument(f"--{key.name}", metavar="VALUE", help=text)


def _version() -> str:
    try:
        return version("transformerlm")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "(not installed)"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return f"error: {text}"


def _fail_with(error: BaseException, code: int) -> NoReturn:
    """End with one line for the user, or with the traceback where TRANSFORMERLM_TRACEBACK=1 asks for it."""
    if os.environ.get("TRANSFORMERLM_TRACEBACK") == "1":
        raise error
    fail([_one_line(error)], code)


def fail(lines: Sequence[str], code: int) -> NoReturn:
    """Print the lines on stderr and exit with `code`."""
    for line in lines:
        print(line, file=sys.stderr)
    sys.exit(code)
