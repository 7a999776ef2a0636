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
from typing import Any, Generic, NoReturn, TextIO, TypeVar

from pydantic import BaseModel

from cli.completion import Completed, completion_script
from cli.entry import STOP_CODES
from cli.hints import from_here
from cli.options import Guide, as_typed, build_parser, usage_word
from cli.terminal import LIVE, note, plain
from config.errors import ConfigError
from config.io import SHIPPED, dump_json_schema, dump_origins, dump_toml, read_layers, validate
from config.keys import iter_keys
from config.layers import Layer
from config.shipped import find_config

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2

Schema = TypeVar("Schema", bound=BaseModel)


@dataclass(frozen=True)
class Command(Generic[Schema]):
    """A console script: its name, its schema, what it does with a checked configuration, and its default TOML, if any.

    `run` imports the heavy libraries itself, so that `--help`, `--print-config` and errors answer at once. `place_of`
    returns settings that follow from the place of a TOML file; they override the file, and files after it and the
    command line override them. `short`, `examples`, `first_word` and `words` are those of `Guide`.
    """

    name: str
    schema: type[Schema]
    run: Callable[[Schema], int | None]
    default_config: str | None = None
    place_of: Callable[[Path], dict[str, Any]] = lambda path: {}
    first_word: str | None = None
    words: str | None = None
    short: tuple[str, ...] = ()
    examples: tuple[tuple[str, str], ...] = ()

    @property
    def shipped(self) -> Path:
        """The TOML file that comes with the package for this command."""
        return SHIPPED / f"{self.schema.__module__.rpartition('.')[2]}.toml"


def main(command: Command[Schema], argv: Sequence[str] | None = None) -> NoReturn:
    """Parse the command line, build the configuration, run the command, and exit with the code of `exit_after`."""

    def work() -> int | None:
        config = configure(command, argv)
        return command.run(config) if config is not None else 0

    exit_after(work)


def exit_after(work: Callable[[], int | None]) -> NoReturn:
    """Run a command, say in one line what went wrong, and exit with its code.

    Exit codes: 0 done, 1 failed, 2 bad configuration or input, 130 interrupted.
    """
    _open_streams()
    if "torch" not in sys.modules:  # a program that calls a command has it, and its threads are its own
        from transformerlm.utils.threads import wait_politely

        wait_politely()
    logging.lastResort = _Notes(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: note(plain(f"warning: {message}"))
            code = _written_out(work)
    except ConfigError as error:  # the ranks of a machine read one file: one of them says what is wrong with it
        fail(error.lines if speaks_for_machine() else [], EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        fail(["interrupted"], STOP_CODES["SIGINT"])
    except BrokenPipeError:
        _drop_what_waits(sys.stdout)  # the reader of stdout has gone (`| head`): there is nobody to say anything to
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
    finally:
        _drop_what_waits(sys.stderr)  # where its reader has gone, the exit code is ours all the same
    sys.exit(code or 0)


def _written_out(work: Callable[[], int | None]) -> int | None:
    """Run a command and write its stdout out, which would fail while Python ends, with words and a code of its own."""
    try:
        code = work()
    except SystemExit:  # of --help and --version, too
        _flush()
        raise
    _flush()
    return code


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "stdout") from None


def _drop_what_waits(stream: TextIO) -> None:
    """Drop what a stream cannot take, so that Python does not try it again at its end."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def speaks_for_machine() -> bool:
    """Return whether this process says what all processes of its machine would say: torchrun's first one does."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


class _Notes(logging.Handler):
    """Shows what libraries log like other messages, above the live line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one message."""
        note(plain(record.getMessage()))


def _open_streams() -> None:
    """Open the standard streams that the process lacks, and let no character that a stream cannot encode end a command.

    A service or `2>&-` starts a process without some of them. Then Python has None there, `print` would go to stdout,
    and the next file to be opened would get the number 2, to which libraries write their warnings.
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


def configure(command: Command[Schema], argv: Sequence[str] | None = None) -> Schema | None:
    """Return the command's configuration, or None if an option such as `--print-config` has already been answered.

    Raises:
        ConfigError: anything in a file or on the command line is wrong.
    """
    keys = list(iter_keys(command.schema))
    options = vars(build_parser(keys, _guide(command)).parse_args(argv))
    shell, print_schema = options.pop("print_completion"), options.pop("print_schema")
    if shell and command.name.startswith("python "):
        raise ConfigError([f"{command.name}: only the programs transformerlm-... have completions"])
    if shell or print_schema:
        completed = [Completed(name, iter_keys(schema)) for name, schema in _of_program(command).items()]
        print(completion_script(shell, completed) if shell else dump_json_schema(command.schema))
        return None
    paths = [_found(path) for path in options.pop("config")]
    paths = paths or ([SHIPPED / command.default_config] if command.default_config else [])
    print_config, snippets = options.pop("print_config"), options.pop("toml")
    if not paths and not options and not snippets and any(key.default is None and not key.in_list for key in keys):
        name = command.shipped.stem.replace("_", "-").rstrip("-")
        word = command.first_word or command.words
        wanted = f"{usage_word(word)}, or " if word else ""
        raise ConfigError([f"{command.name}: expected {wanted}--config FILE.toml; --config {name} is the shipped one"])
    layers = read_layers(command.schema, paths, options, snippets=snippets)
    for number, path in reversed([*enumerate(paths, 1)]):
        if place := command.place_of(path):
            layers.insert(number, Layer(f"the place of {path.name}", place))
    try:
        config = validate(command.schema, layers)
    except ConfigError as error:
        raise ConfigError(as_typed(error.lines, keys, argv)) from None
    if print_config:
        text = dump_origins(config, layers) if print_config == "origin" else dump_toml(config)
        print(_in_encoding(text, getattr(sys.stdout, "encoding", None) or "utf-8"), end="")
        return None
    return config


def _of_program(command: Command[Schema]) -> dict[str, type[BaseModel]]:
    """Return the command, or all those of its program: a shell completes a program whole."""
    program, _, word = command.name.partition(" ")
    if not word or program == "python":
        return {command.name: command.schema}
    from config.commands import COMMANDS

    return {name: schema for name, schema in COMMANDS.items() if name.startswith(f"{program} ")}


def _guide(command: Command[Schema]) -> Guide:
    return Guide(
        command.name,
        (command.schema.__doc__ or "").split("\n\n")[0],
        command.default_config,
        shipped=command.shipped,
        first_word=command.first_word,
        words=command.words,
        short=command.short,
        examples=command.examples,
    )


def _found(path: Path) -> Path:
    """Return the file that `--config` means, and say which it is if it is a shipped one."""
    found = find_config(path)
    if found != path:
        note(f"--config {path}: {from_here(found)}")
    return found


def _in_encoding(text: str, encoding: str) -> str:
    """Return TOML in which a character that an encoding lacks is an escape with its number, as TOML allows."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(char if char.isascii() else f"\\U{ord(char):08x}" for char in text)
    return text


def _fail_with(error: BaseException, code: int) -> NoReturn:
    """End with one line for the user, or with the traceback if TRANSFORMERLM_TRACEBACK=1 asks for it."""
    from transformerlm.utils.strings import in_words

    if os.environ.get("TRANSFORMERLM_TRACEBACK") == "1":
        raise error
    fail([f"error: {in_words(error)}"], code)


def fail(lines: Sequence[str], code: int) -> NoReturn:
    """Print the lines on stderr and exit with `code`."""
    LIVE.show(None)
    for line in lines:
        note(plain(line))
    _drop_what_waits(sys.stdout)
    sys.exit(code)
