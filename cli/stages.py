"""What the commands that run other commands share: a fresh directory, a text that they can all read, and the stages.

Nothing here trains or generates: each stage is a command that a user would type, and it is shown before it runs.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cli.entry import STOP_CODES, heard_signals
from cli.hints import command_line, from_here, hint_lines
from cli.terminal import note, note_invalid_utf8, working
from cli.utils import EXIT_BAD_INPUT, EXIT_FAILED
from config.io import SHIPPED, dump_settings
from config.special_tokens import END_OF_TEXT

MIN_DOCUMENTS = 20
MIN_TEXT_BYTES = 20_000
MAX_DOCUMENT_SHARE = 0.2  # of the text, for one document; it is kept for validation as a whole, or not at all
MAX_FILES = 1_000  # listed one by one in a TOML
RUN_NAME = "run"


# --- a fresh directory -------------------------------------------------------------------------------------------


def free_directory(wanted: Path) -> Path:
    """Return `wanted`, or the first of wanted-2, wanted-3, ... that does not exist yet."""
    number, free = 1, wanted
    while free.exists():
        number += 1
        free = wanted.with_name(f"{wanted.name}-{number}")
    return free


@contextmanager
def fresh_directory(home: Path) -> Iterator[None]:
    """Make a directory; if it stays empty or the text is refused, remove it with the parents made for it."""
    made = [path for path in (home, *home.parents) if not path.exists()]
    home.mkdir(parents=True)
    try:
        yield
    except BaseException as error:
        is_refused = isinstance(error, ValueError) or getattr(error, "returncode", 0) == EXIT_BAD_INPUT
        if is_refused or not any(home.iterdir()):
            shutil.rmtree(home)
            with suppress(OSError):  # somebody else uses it by now
                for parent in made[1:]:
                    parent.rmdir()
        raise


@contextmanager
def naming_what_stays(home: Path) -> Iterator[None]:
    """If Ctrl-C or a full disk ends the work between two stages, say where everything is."""
    try:
        yield
    except (KeyboardInterrupt, OSError):
        if home.exists():
            note(f"everything so far is in {home}")
        raise


def exit_code_of(error: subprocess.CalledProcessError, home: Path) -> int:
    """Say which stage has failed, what there is and how to go on with it; return the exit code to end with."""
    kept = f"; everything so far is in {home}" if home.exists() else ""
    note(f"{error.cmd} ended with exit code {error.returncode}{kept}")
    if error.cmd == "transformerlm-train" and (home / RUN_NAME / "checkpoints").is_dir():
        again = command_line("fit", f"--resume={home}")
        note("\n".join(hint_lines([("go on with the training where it stopped", again)])))
    by_signal = {-getattr(signal, name): code for name, code in STOP_CODES.items() if hasattr(signal, name)}
    return int(error.returncode) if error.returncode > 0 else by_signal.get(error.returncode, EXIT_FAILED)


# --- the text ------------------------------------------------------------------------------------------------------


def text_files(patterns: Sequence[str]) -> list[str]:
    """Return the user's files; unsuitable ones are refused before anything is written.

    Raises:
        FileNotFoundError: a name without a file.
        ValueError: too little text to train on, a file that is not text, or a pipe, which can be read only once.
    """
    from transformerlm.utils.text_files import total_bytes

    if not patterns:
        return []
    paths = files_of(patterns, why="as several commands read them")
    if (size := total_bytes(paths)) < MIN_TEXT_BYTES:
        raise ValueError(f"text: expected at least {MIN_TEXT_BYTES:,} bytes to train on, found {size:,}")
    return [str(path) for path in paths]


def files_of(patterns: Sequence[str], *, why: str) -> list[Path]:
    """Return the files of a text that is read more than once; `why` follows "expected files" where one is a pipe.

    Raises:
        FileNotFoundError: a name without a file.
        ValueError: a pipe.
    """
    from transformerlm.utils.text_files import expand_inputs

    paths = expand_inputs(list(patterns))
    if pipes := [path for path in paths if not path.is_file()]:
        raise ValueError(f"text: expected files, {why}, found the pipe {pipes[0]} (save it first)")
    return paths


def in_documents(files: Sequence[str], corpus: Path) -> tuple[list[str], int]:
    """Return the user's files, or `corpus` with their text cut into documents, which a validation split needs.

    It needs many documents of which none is a great part of the text. Beside them is how many bytes of text they hold,
    unpacked.
    """
    from transformerlm.utils.text_files import ReadStats, read_text

    paths, stats = [Path(file) for file in files], ReadStats()
    ends = size = longest = document = 0  # the last one: bytes of the document in hand
    with working("reading the text"):
        for block in (block for path in paths for block in read_text(path, stats=stats)):
            first, *others = (len(piece.encode()) for piece in block.text.split(END_OF_TEXT))
            longest = max(longest, document + first, *others)
            document = 0 if block.ends_document else others[-1] if others else document + first
            ends += len(others) + block.ends_document
            size += first + sum(others) + len(others) * len(END_OF_TEXT)
    if ends >= MIN_DOCUMENTS and len(files) <= MAX_FILES and longest <= MAX_DOCUMENT_SHARE * size:
        return list(files), size
    number = write_short_documents(paths, corpus)
    note_invalid_utf8(stats.invalid_utf8)  # later stages read the corpus, which is
    note(f"{corpus}: the text, cut at blank lines into {number:,} documents")
    return [str(corpus)], size


def write_short_documents(paths: Sequence[Path], corpus: Path) -> int:
    """Write the text of some files to `corpus`, cut into documents of some 4,000 characters; return their number."""
    from databuilder.plain_text import DOCUMENT_CHARACTERS, write_documents

    return write_documents(paths, corpus, separator=END_OF_TEXT, longest_line=DOCUMENT_CHARACTERS)


# --- commands ------------------------------------------------------------------------------------------------------


def run_stage(
    home: Path, verb: str, settings: Mapping[str, Any], *, config: str = "", name: str = "", quiet: bool = False
) -> str:
    """Run `transformerlm-<verb>` with its shipped TOML, or another one, and a TOML of `settings`; return its stdout.

    The settings have dotted keys; their TOML is called `name`, or as the command. What a `quiet` command says on stderr
    is shown only if it fails.

    Raises:
        subprocess.CalledProcessError: it ended with another exit code than 0.
    """
    module = verb.replace("-", "_")
    own = home / f"{name or module}.toml"
    words = [f"--config={path}" for path in (shipped(config or module), own)]
    line = f"transformerlm-{verb} {shlex.join(words)}"
    own.write_text(f"# {line}\n\n{dump_settings(settings)}", encoding="utf-8")
    return run_with(verb, words, quiet=quiet)


def run_with(verb: str, words: Sequence[str], *, quiet: bool = False) -> str:
    """Run `transformerlm-<verb>` with these words, say so, and return its stdout.

    Raises:
        subprocess.CalledProcessError: it ended with another exit code than 0.
    """
    note(f"\n$ transformerlm-{verb} {shlex.join(words)}")
    # -P: do not import a folder called `config` from the working directory.
    command = [sys.executable, "-P", "-m", f"cli.{verb.replace('-', '_')}", *words]
    code, out, err = wait_for(command, quiet=quiet)
    if code:
        if err:
            note(err.rstrip())
        raise subprocess.CalledProcessError(code, f"transformerlm-{verb}")
    return out


def wait_for(command: Sequence[str], *, quiet: bool) -> tuple[int, str, str]:
    """Run a command; return its exit code, its stdout and, if quiet, its stderr.

    Ctrl-C reaches the command, too, which may want to save what it has; other requests to end are passed on to it. What
    this process ignores, the command ignores. Its exit code says how it ended.
    """
    from transformerlm.utils.interrupts import ctrl_c_held_back

    environment = {**os.environ, "TRANSFORMERLM_HINTS": "0"}  # ours come at the end
    pipe = subprocess.PIPE
    heard = {number for number in heard_signals() if number.name != "SIGUSR1"}
    previous: dict[signal.Signals, Any] = {}
    if signal.SIGINT in heard:
        previous[signal.SIGINT] = signal.signal(
            signal.SIGINT, lambda *_: None
        )  # which is not inherited, unlike SIG_IGN
    with ctrl_c_held_back():  # the command hears it from `cli.entry` on: Python that only starts would crash
        child = subprocess.Popen(
            command,
            stdout=pipe,
            stderr=pipe if quiet else None,
            encoding="utf-8",
            errors="replace",  # it writes in the encoding of its locale; what is read of it is ASCII
            env=environment,
        )
    for number in heard - {signal.SIGINT}:
        previous[number] = signal.signal(number, lambda number, _: child.send_signal(number))
    try:
        out, err = child.communicate()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return child.returncode, out, err or ""


def shipped(name: str) -> str:
    """Return the path of a shipped TOML, relative to the working directory if that is shorter."""
    return from_here(SHIPPED / f"{name}.toml")


def read_json(path: Path) -> Any:
    """Return what a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))
