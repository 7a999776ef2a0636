"""What every command shares: its configuration, one way to fail, and progress for people on stderr."""

from __future__ import annotations

import io
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from pydantic import BaseModel

from cli.entry import STOP_CODES
from cli.options import build_parser
from config.io import SHIPPED, ConfigError, dump_json_schema, dump_origins, dump_toml, read_layers, validate
from config.keys import iter_keys
from config.layers import Layer

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
_MAX_LINE_CHARS = 2_000

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
    if "torch" not in sys.modules:  # a program that calls a command has it, and its threads are its own
        from transformerlm.utils.threads import wait_politely

        wait_politely()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: note(plain(f"warning: {message}"))
            config = configure(command, argv)
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


def note(line: str, *, end: str = "\n") -> None:
    """Say something to the person at the terminal, on stderr; a terminal that has gone does not stop the work."""
    with suppress(OSError):
        print(line, end=end, file=sys.stderr, flush=True)


class Progress:
    """Progress for people on stderr: one line that is rewritten on a terminal, a line now and then elsewhere.

    Args:
        total: the units of the whole job.
        start: units that were done before this process began.
        unit: the word for them; "B" shows megabytes.
        began: the monotonic time at which the job began; now, by default.
        limit: the seconds after which it ends in any case.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        unit: str = "step",
        began: float | None = None,
        limit: float | None = None,
    ) -> None:
        self._total, self._start, self._unit = total, start, unit
        self._limit = math.inf if limit is None else limit
        self._began = time.monotonic() if began is None else began
        self._shown = self._began  # not at once: the first rate would mean nothing
        self._finished = False
        self._live = sys.stderr.isatty()

    def __call__(self, done: int, facts: Mapping[str, float] | None = None) -> None:
        """Show that `done` units are done, with some numbers beside; a validation is always shown on its own line."""
        now = time.monotonic()
        if self._finished:
            return
        self._finished = done >= self._total
        important = self._finished or "val_loss" in (facts or {})
        if not important and now - self._shown < (0.2 if self._live else 10.0):
            return
        self._shown = now
        line = self._line(done, facts or {}, now - self._began)
        end = "\n" if important or not self._live else ""
        note(f"\r\x1b[K{line}" if self._live else line, end=end)

    def _line(self, done: int, facts: Mapping[str, float], seconds: float) -> str:
        rate = (done - self._start) / seconds if seconds > 0 else 0.0
        eta = min((self._total - done) / rate, max(0.0, self._limit - seconds)) if rate > 0 else 0.0
        left = f"ETA {clock(eta)}" if rate > 0 and done < self._total else clock(seconds)
        if self._unit == "B":
            scale, name = (1e6, "MB") if self._total >= 1e6 else (1e3, "kB")
            return f"{done / scale:,.1f}/{self._total / scale:,.1f} {name}  {rate / 1e6:.1f} MB/s  {left}"
        numbers = [text.format(facts[name]) for name, text in _SHOWN.items() if name in facts]
        return "  ".join([f"{self._unit} {done:,}/{self._total:,}", *numbers, left])


_SHOWN = {
    "loss": "loss {:.3f}",
    "val_loss": "val loss {:.3f}",
    "val_bits_per_byte": "{:.3f} bits/byte",
    "bits_per_byte": "{:.3f} bits/byte",
    "bits_per_byte_difference": "second - first {:+.3f} bits/byte",
    "margin": "+- {:.3f}",
    "tokens_per_second": "{:,.0f} tokens/s",
}


class StageProgress:
    """Progress of a job that has several stages, each with its unit; called with (stage, done, total)."""

    def __init__(self, units: Mapping[str, str]) -> None:
        self._units = units
        self._stages: dict[str, Progress] = {}
        self._last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` units of a stage are done."""
        if stage not in self._stages:
            # A stage is first heard of when its first part is done; it began when the one before was last heard of.
            self._stages[stage] = Progress(total, unit=self._units[stage], began=self._last)
        self._stages[stage](done)
        self._last = time.monotonic()


def clock(seconds: float) -> str:
    """Return a length of time as people read it: 0:42, 12:05, 3:07:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def plain(text: str) -> str:
    """Return a message as one line of printable characters, cut where it is very long: it may quote a hostile file."""
    shown = text if len(text) <= _MAX_LINE_CHARS else f"{text[:_MAX_LINE_CHARS]}..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in shown)


def fail(lines: Sequence[str], code: int) -> NoReturn:
    """Print the lines on stderr and exit with `code`."""
    for line in lines:
        note(plain(line))
    sys.exit(code)
