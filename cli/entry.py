"""Where every command begins: it handles signals first, and only then imports anything that takes time."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from types import FrameType

# The signals that stop a training run, and its exit codes. SIGHUP: the terminal was closed. With SIGUSR1 a batch system
# says that time is nearly over: nothing has failed, and the job should be queued again.
STOP_CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGUSR1": 0}
_PACKAGES = ("benchmarking", "cli", "config", "databuilder", "logger", "profiling", "transformerlm")


def run(module: str) -> None:
    """Import a command's module and call its `main`, which ends by SystemExit; a signal at any time prints one line.

    A Python that is too old or too new is refused first. A file of the user with the name of one of our packages, such
    as a `config.py`, is ignored.

    Training handles all of `STOP_CODES` (Windows lacks some), a server and what starts servers handle SIGTERM, and
    all commands handle Ctrl-C. A signal that is ignored stays so, as Ctrl-C in what a script starts in the background.
    """
    if not (3, 11) <= sys.version_info[:2] <= (3, 14):
        found = ".".join(map(str, sys.version_info[:2]))
        leave(f"transformerlm needs Python 3.11 to 3.14, found {found} ({sys.executable})", 1)
    can_interrupt = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    handlers = {signal.SIGINT: _interrupt} if can_interrupt else {}
    if module == "cli.train":
        handlers = dict.fromkeys(heard_signals(), _stop_training)
    elif module in _HANDLE_SIGTERM:
        handlers[signal.SIGTERM] = _HANDLE_SIGTERM[module]
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        if signal.SIGINT in handlers and hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # `stages.wait_for` holds it back until now
        _put_ours_first()
        os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # for which it would search all that is installed
        import_module(module).main()
    except KeyboardInterrupt:  # a second one, while the command cleaned up after the first
        leave("interrupted", STOP_CODES["SIGINT"])
    finally:  # Python takes itself apart now: what a handler raised there would be shown as a traceback
        for number in handlers:
            over = number in (signal.SIGINT, signal.SIGTERM)
            signal.signal(number, signal.SIG_DFL if over else signal.SIG_IGN)


def transformerlm() -> None:
    """Run the command that the first word names, as its own console script does; without a word, list the commands."""
    scripts = {name.rstrip("_").replace("_", "-"): one for name, one in globals().items() if isinstance(one, partial)}
    if len(sys.argv) > 1 and sys.argv[1] in scripts:
        scripts[sys.argv.pop(1)]()
    else:
        run("cli.overview")


def heard_signals() -> list[signal.Signals]:
    """Return those of `STOP_CODES` that this process does not ignore; Windows lacks some."""
    numbers = [getattr(signal, name) for name in STOP_CODES if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def _put_ours_first() -> None:
    """Move the directories that hide one of our packages to the end of the import path.

    `PYTHONPATH` may name one with a `config.py`, and `python -m` starts with the working directory. Processes that the
    command starts inherit the path.
    """
    home = Path(__file__).resolve().parents[1]
    others = [entry for entry in sys.path if Path(entry).resolve() != home]
    found = {entry: [PathFinder.find_spec(name, [entry]) for name in _PACKAGES] for entry in others}
    # A module without an origin is a directory without __init__.py, which hides nothing.
    hiding = [entry for entry in others if any(spec and spec.origin for spec in found[entry])]
    sys.path[:] = [*(entry for entry in sys.path if entry not in hiding), *hiding]


def leave(line: str, code: int) -> None:
    """End the process at once, with a line on stderr.

    During an import nothing else is certain to work: the exception may arise in a callback that drops it, or in a
    library that takes it to mean that something optional is missing.
    """
    live_line = getattr(sys.modules.get("cli.terminal"), "LIVE", None)  # None also where it is half imported
    if live_line is not None:
        live_line.words = None  # its thread draws no more
    try:
        over_a_live_line = "\r\x1b[K" if os.isatty(2) else ""
        os.write(2, f"{over_a_live_line}{line}\n".encode())
    finally:
        os._exit(code)


def is_importing(frame: FrameType | None) -> bool:
    """Return whether an `import` led to this frame."""
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def _stop_training(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    leave(f"{name}: stopped before the first step", STOP_CODES[name])


def _stop_serving(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    leave(f"{name}: stopped before the server was ready", STOP_CODES[name])


def _interrupt(number: int, frame: FrameType | None) -> None:
    if is_importing(frame):
        leave("interrupted", STOP_CODES["SIGINT"])
    raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(STOP_CODES[signal.Signals(number).name])


# A service is ended by SIGTERM, and its exit code says so. What measures servers ends them with itself.
_HANDLE_SIGTERM = {"cli.serve": _stop_serving, "benchmarking.bench_serve": _end}

quickstart = partial(run, "cli.quickstart")
init = partial(run, "cli.init")
download = partial(run, "cli.download")
train_tokenizer = partial(run, "cli.train_tokenizer")
make_data = partial(run, "cli.make_data")
adopt = partial(run, "cli.adopt")
add_tokens = partial(run, "cli.add_tokens")
plan = partial(run, "cli.plan")
sweep = partial(run, "cli.sweep")
scaling = partial(run, "cli.scaling")
fit = partial(run, "cli.fit")
train = partial(run, "cli.train")
runs = partial(run, "cli.runs")
infer = partial(run, "cli.infer")
chat = partial(run, "cli.chat")
serve = partial(run, "cli.serve")
export = partial(run, "cli.export")
import_ = partial(run, "cli.import_")
eval = partial(run, "cli.eval")
