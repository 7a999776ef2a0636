"""What every command shares: its configuration, and one way to fail."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from pydantic import BaseModel

from cli.entry import STOP_CODES
from cli.options import build_parser
from cli.terminal import LIVE, plain
from cli.terminal import clock as clock
from cli.terminal import note as note
from config.io import SHIPPED, ConfigError, dump_json_schema, dump_origins, dump_toml, read_layers, validate
from config.keys import iter_keys
from config.layers import Layer

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2

Schema = TypeVar("Schema", bound=BaseModel)


@dataclass(frozen=True)
class Command(Generic[Schema]):
    """A console script: its name, its schema, what it does with a checked configuration, and its default TOML, if any.

    `run` imports the heavy libraries itself, so that `--help`, `--print-config` and errors answer at once. `place_of`
    returns what the place of the last TOML file says better than the file; the command line goes before it.
    """

    name: str
    schema: type[Schema]
    run: Callable[[Schema], int | None]
    default_config: str | None = None
    place_of: Callable[[Path], dict[str, Any]] = lambda path: {}


def main(command: Command[Schema], argv: Sequence[str] | None = None) -> NoReturn:
    """Parse the command line, build the configuration, run the command, and exit with the code that DESIGN names.

    Exit codes: 0 done, 1 failed, 2 bad configuration or input, 130 interrupted.
    """
    _open_streams()
    _wait_politely()
    logging.lastResort = _Notes(logging.WARNING)
    try:
        config = configure(command, argv)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: note(plain(f"warning: {message}"))
            code = command.run(config) if config is not None else 0
    except ConfigError as error:
        fail(error.lines, EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        fail(["interrupted"], STOP_CODES["SIGINT"])
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
    except (OSError, ImportError, RuntimeError, MemoryError, FloatingPointError) as error:
        _fail_with(error, EXIT_FAILED)
    sys.exit(code or 0)


class _Notes(logging.Handler):
    """Shows what libraries log as other messages are shown, above the live line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one message."""
        note(plain(record.getMessage()))


def _open_streams() -> None:
    """Give the process the standard streams that it lacks, and let no character that one cannot spell end the command.

    A service or `2>&-` starts a process without some of them: Python has None there, `print` would go to stdout, and
    the next file to be opened would get the number 2, on which libraries write their warnings.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _wait_politely() -> None:
    """Let torch's threads spin only for a moment while they wait for each other, unless the environment says how.

    By default they spin for so long that two runs side by side hardly move; threads that sleep at once cost a run that
    is alone a quarter of its speed (docs/LOG.md). OpenMP reads this when torch is imported, which no command has done
    yet. `GOMP_SPINCOUNT`, for GNU's OpenMP, goes before the policy, which is for the others.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def configure(command: Command[Schema], argv: Sequence[str] | None = None) -> Schema | None:
    """Return the command's configuration, or None when an option such as `--print-config` has answered already.

    Raises:
        ConfigError: anything in a file or on the command line is wrong.
    """
    keys = list(iter_keys(command.schema))
    parser = build_parser(
        keys,
        prog=command.name,
        description=(command.schema.__doc__ or "").split("\n\n")[0],
        default_config=command.default_config,
    )
    options = vars(parser.parse_args(argv))
    paths = options.pop("config") or ([SHIPPED / command.default_config] if command.default_config else [])
    if options.pop("print_schema"):
        print(dump_json_schema(command.schema))
        return None
    print_config, snippets = options.pop("print_config"), options.pop("toml")
    if not paths and not options and not snippets and any(key.default is None and not key.in_list for key in keys):
        shipped = SHIPPED / f"{command.schema.__module__.rpartition('.')[2]}.toml"
        raise ConfigError([f"{command.name}: expected --config FILE.toml, for example {shipped}"])
    layers = read_layers(command.schema, paths, options, snippets=snippets)
    if paths and (place := command.place_of(paths[-1])):
        layers.insert(len(paths), Layer(f"the place of {paths[-1].name}", place))
    config = validate(command.schema, layers)
    if print_config:
        text = dump_origins(config, layers) if print_config == "origin" else dump_toml(config)
        print(_in_encoding(text, getattr(sys.stdout, "encoding", None) or "utf-8"), end="")
        return None
    return config


def _in_encoding(text: str, encoding: str) -> str:
    """Return TOML in which a character that an encoding lacks is written by its number, as TOML's strings may."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(char if char.isascii() else f"\\U{ord(char):08x}" for char in text)
    return text


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
    LIVE.show(None)
    for line in lines:
        note(plain(line))
    sys.exit(code)
