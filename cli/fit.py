"""`transformerlm-fit`: the best model that a text and a time can give, and how good it will be, told beforehand."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.fit")

import shutil
import subprocess
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import fitting
from cli.fitting import PREDICTION, Task
from cli.hints import command_line, hint_lines
from cli.stages import (
    RUN_NAME,
    exit_code_of,
    free_directory,
    fresh_directory,
    in_documents,
    naming_what_stays,
    text_files,
)
from cli.terminal import clock, note
from cli.utils import EXIT_FAILED, Command
from cli.utils import main as run_command
from config.fit import FitConfig
from config.schemas import duration_seconds

if TYPE_CHECKING:
    from transformerlm.experiments.fit.choice import Chosen
    from transformerlm.experiments.fit.results import Statement

# What --help shows.
SHORT = ("text", "time", "dir", "dry_run", "resume", "device", "prompt", "past_runs")
EXAMPLES = (
    ("files and folders, half an hour", "README.md docs"),
    ("five minutes: settings and prediction only", "book.txt --time 5m --dry-run"),
)
MAX_WIDTH = 120


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-fit", FitConfig, fit, words="text", short=SHORT, examples=EXAMPLES), argv)


def fit(config: FitConfig) -> int:
    """Choose, predict, train and judge in a fresh directory; return the exit code of the first failure, or 0.

    Raises:
        ValueError: what cannot be trained on, or the directory to go on with has no prediction.
    """
    files = text_files(config.text)
    _check_past_runs(config.past_runs)
    home = config.resume or free_directory(config.dir)
    try:
        with naming_what_stays(home):
            said = _said_before(home) if config.resume else _choose_in(config, files, home)
            if config.dry_run:
                _say_how_to_begin(home, said)
                return 0
            is_judged = fitting.train(home, said)
            _say_what_next(home, said)
            return 0 if is_judged else EXIT_FAILED
    except subprocess.CalledProcessError as error:
        return exit_code_of(error, home)


def _choose_in(config: FitConfig, files: Sequence[str], home: Path) -> Statement:
    with fresh_directory(home):
        text, num_bytes = in_documents(files, home / "corpus.txt")
        corpus = "/".join(Path(files[0]).resolve().parts[-2:])  # many projects have a README.md
        task = _task(config, home, text, num_bytes, corpus=corpus)
        encoded = fitting.encode(task)
    plan, said = fitting.prepare(task, *encoded)
    note("\n" + "\n".join(_table(plan.settings)) + "\n")
    fitting.state(home, said)
    return said


def _said_before(home: Path) -> Statement:
    from transformerlm.experiments.fit.results import read_statement

    if not (home / PREDICTION).exists():
        raise ValueError(
            f"resume: expected the directory of a fit that has come to its training, found no {PREDICTION} in {home}"
        )
    return read_statement(home / PREDICTION)


def _check_past_runs(path: Path | None) -> None:
    from transformerlm.experiments.fit.prediction import read_rows

    if path is not None:
        read_rows(path)


def _task(config: FitConfig, home: Path, files: Sequence[str], num_bytes: int, *, corpus: str) -> Task:
    return Task(
        home=home,
        files=files,
        corpus=corpus,
        num_bytes=num_bytes,
        seconds=duration_seconds(config.time),
        device=config.device,
        prompts=config.prompt,
        seed=config.seed,
        past_runs=config.past_runs,
    )


# --- what people read ----------------------------------------------------------------------------------------------


def _table(settings: Mapping[str, Chosen]) -> Iterator[str]:
    """Yield the chosen settings with their reasons; neighbours with one reason share it."""
    width = min(MAX_WIDTH, shutil.get_terminal_size().columns)
    groups: list[tuple[list[str], str]] = []
    for key, chosen in settings.items():
        table, _, name = key.rpartition(".")
        is_in_group = bool(groups) and groups[-1][1] == chosen.why
        is_in_table = is_in_group and groups[-1][0][0].startswith(f"{table}.")
        pair = f"{name if is_in_table else key} = {_short(chosen.value)}"
        if is_in_group:
            groups[-1][0].append(pair)
        else:
            groups.append(([pair], chosen.why))
    for pairs, why in groups:
        yield ", ".join(pairs)
        yield textwrap.fill(why, width, initial_indent="    ", subsequent_indent="    ")


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _say_how_to_begin(home: Path, said: Statement) -> None:
    words = f"train it: about {clock(said.seconds)}; {home / 'train.toml'} says why each setting was chosen"
    hints = hint_lines([(words, command_line("fit", f"--resume={home}"))])
    note("\n".join(["", f"Everything is in {home}. Next:", "", *hints]))


def _say_what_next(home: Path, said: Statement) -> None:
    run = home / RUN_NAME
    hints = [
        ("talk to it: it goes on from the line you type", command_line("infer", f"--checkpoint={run}")),
        *fitting.hints_of_more_time(run, said, f"{2 * said.seconds:.0f}s"),
        (
            "try other settings: change them in this file, then",
            command_line("train", f"--config={home / 'train.toml'}", "--logging.run_name=other"),
        ),
        (
            "serve it, to a browser and to programs that speak OpenAI's API",
            command_line("serve", f"--checkpoint={run}", "--limits.overflow=slide"),
        ),
    ]
    note("\n".join(["", f"Everything is in {home}. Next:", "", *hint_lines(hints)]))
