"""`transformerlm-quickstart`: the commands in order, with shipped TOMLs, on stories from our grammar or on your text.

Nothing here trains or generates: each stage is a command that a user would type, and it is shown before it runs.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.quickstart")

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import fitting
from cli.fitting import Task
from cli.hints import command_line, hint_lines
from cli.stages import (
    RUN_NAME,
    exit_code_of,
    free_directory,
    fresh_directory,
    in_documents,
    naming_what_stays,
    run_stage,
    shipped,
    text_files,
)
from cli.terminal import note, working
from cli.utils import Command
from cli.utils import main as run_command
from config.quickstart import QuickstartConfig
from config.schemas import duration_seconds

if TYPE_CHECKING:
    from transformerlm.experiments.fit.results import Statement

# What --help shows.
SHORT = ("text", "corpus", "time", "dir", "prompt", "device")
EXAMPLES = (
    ("stories, in three minutes", ""),
    ("your own text, files or folders, for longer", "--text README.md docs --time 10m"),
)
CORPUS_BYTES = 6_000_000
DOCSTRING_PROMPTS = ["Return the", "Create a new", "Raise"]
STORY_CONTEXT = 512  # two or three stories, so that most windows see how one begins
STORY_TOKENS, STORY_TEMPERATURE = 300, 0.6  # a grammar leaves fewer choices than text by people
TEXT_TOKENS, TEXT_TEMPERATURE = 160, 0.8
NUM_STORIES = 20  # generated at the end, to be checked by the grammar
NUM_SHOWN = 3


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    command = Command(
        "transformerlm-quickstart",
        QuickstartConfig,
        quickstart,
        default_config="quickstart.toml",
        short=SHORT,
        examples=EXAMPLES,
    )
    run_command(command, argv)


def quickstart(config: QuickstartConfig) -> int:
    """Run the pipeline in a fresh directory, and return the exit code of the first command that fails, or 0."""
    files = text_files(config.text)
    home = free_directory(config.dir)
    try:
        with naming_what_stays(home):
            _quickstart_in(config, files, home)
    except subprocess.CalledProcessError as error:
        return exit_code_of(error, home)
    return 0


def _quickstart_in(config: QuickstartConfig, files: list[str], home: Path) -> None:
    with fresh_directory(home):
        task = _task(config, files, home)
        encoded = fitting.encode(task)
    _, said = fitting.prepare(task, *encoded)
    fitting.state(home, said)
    fitting.train(home, said)
    _show(config, _generate(config, home))
    _say_what_next(config, home, said)


def _task(config: QuickstartConfig, files: list[str], home: Path) -> Task:
    """Return what the shared stages are asked for; without files of the user, write a text for them."""
    from transformerlm.experiments.fit.prediction import STORY_RUNS

    text, num_bytes = in_documents(files, home / "corpus.txt") if files else _write_corpus(config, home)
    return Task(
        home=home,
        files=text,
        corpus=Path(files[0]).name if files else config.corpus,
        num_bytes=num_bytes,
        seconds=duration_seconds(config.time),
        device=config.device,
        prompts=[_prompts(config)[0]],
        most_context=STORY_CONTEXT if _tells_stories(config) else None,
        past_runs=STORY_RUNS if _tells_stories(config) else None,
    )


def _write_corpus(config: QuickstartConfig, home: Path) -> tuple[list[str], int]:
    corpus = home / "corpus.txt"
    size = round(CORPUS_BYTES * max(1.0, min(10.0, duration_seconds(config.time) / 90)))
    from databuilder import docstring_corpus, stories

    with working(f"writing {config.corpus}"):
        module = stories if config.corpus == "stories" else docstring_corpus
        report = module.write_corpus(corpus, max_bytes=size)
    what = "stories" if config.corpus == "stories" else "docstrings of the installed Python, torch and numpy"
    note(f"{corpus}: {report.documents:,} {what}, {report.bytes / 1e6:.1f} MB, {report.seconds:.1f} s")
    return [str(corpus)], report.bytes


# --- its texts -----------------------------------------------------------------------------------------------------


def _prompts(config: QuickstartConfig) -> list[str]:
    if config.prompt:
        return config.prompt
    if config.text:
        return [""]
    from databuilder.stories import PROMPTS

    return [PROMPTS[0]] if _tells_stories(config) else DOCSTRING_PROMPTS


def _generate(config: QuickstartConfig, home: Path) -> list[dict[str, Any]]:
    """Return the trained model's samples, as the infer command writes them."""
    prompts, tells_stories = _prompts(config), _tells_stories(config)
    number = NUM_STORIES if _is_checked(config) else -(-NUM_SHOWN // len(prompts))
    settings = {
        "checkpoint": home / RUN_NAME,
        "prompt": prompts,
        "num_samples": number,
        "batch_size": number,
        "output.format": "json",
        "sampling.max_new_tokens": STORY_TOKENS if tells_stories else TEXT_TOKENS,
        "sampling.temperature": STORY_TEMPERATURE if tells_stories else TEXT_TEMPERATURE,
        "device": config.device,
    }
    with working("writing"):
        out = run_stage(home, "infer", settings, quiet=True)
    return [record for record in map(json.loads, out.splitlines()) if record.get("event") == "sample"]


def _tells_stories(config: QuickstartConfig) -> bool:
    return config.corpus == "stories" and not config.text


def _is_checked(config: QuickstartConfig) -> bool:
    return _tells_stories(config) and not config.prompt


def _show(config: QuickstartConfig, samples: list[dict[str, Any]]) -> None:
    """Print some of the texts, and how many texts the grammar accepts."""
    texts = [sample["text.prompt"] + sample["text.output"] for sample in samples]
    print(("\n" + "-" * 72 + "\n").join(text.rstrip() for text in texts[:NUM_SHOWN]), flush=True)
    if _is_checked(config):
        from databuilder.stories import summarize

        found = summarize(texts)
        note(
            f"\nOf {len(texts)} new stories, {found.keeps_hero:.0%} keep their hero's name and {found.grammatical:.0%} "
            "are grammatical from end to end, by the grammar that wrote the corpus."
        )


def _say_what_next(config: QuickstartConfig, home: Path, said: Statement) -> None:
    run = home / RUN_NAME
    hints = [
        ("talk to it: it goes on from the line you type", command_line("infer", f"--checkpoint={run}")),
        *fitting.hints_of_more_time(run, said, f"{2 * duration_seconds(config.time):g}s"),
        ("hand it on, in the format of Hugging Face", _export(run, home / "export")),
        (
            "a model of other text: --text takes your files and folders",
            command_line("quickstart", "--corpus=docstrings", "--time=5m"),
        ),
        ("every setting of the training, with its default", command_line("train", "--help-all")),
        (
            "serve it, to a browser and to programs that speak OpenAI's API",
            command_line("serve", f"--checkpoint={run}", "--limits.overflow=slide"),
        ),
    ]
    note("\n".join(["", f"Everything is in {home}. Next:", "", *hint_lines(hints)]))


def _export(run: Path, output: Path) -> str:
    return command_line("export", "--config", shipped("export"), f"--checkpoint={run}", f"--output={output}")
