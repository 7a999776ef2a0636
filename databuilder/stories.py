"""Children's stories from a grammar of our own: text to train on that shows at a glance what a model has learned.

A story takes a plot (`databuilder/story_plots.py`) and a row of each table of words that the plot needs
(`databuilder/story_words.py`), picks one form of each beat, and fills the slots. The same seed gives the same stories
on any machine. `databuilder/story_check.py` says whether a text is such a story. To make a file by hand, and to check
the texts that a model wrote:

    python -m databuilder.stories data/stories.txt --max-bytes 6000000 --seed 0
    python -m databuilder.stories --check samples.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from config.special_tokens import END_OF_TEXT
from databuilder.docstring_corpus import DOCUMENT_END, CorpusReport
from databuilder.story_check import StoryCheck, StorySummary, check_story, summarize
from databuilder.story_plots import PLOTS, Beat, parse_plot, slots_of
from databuilder.story_words import WORLDS, Row, Table
from transformerlm.utils.files import write_whole
from transformerlm.utils.strings import in_words

__all__ = [
    "PROMPTS",
    "StoryCheck",
    "StorySummary",
    "check_story",
    "count_stories",
    "read_stories",
    "summarize",
    "tell_scenes",
    "tell_stories",
    "write_corpus",
]

PROMPTS = (
    "Once upon a time, there was a",
    "Once upon a time, there was a girl named",
    "Once upon a time, there was a brave little rabbit named",
)
DEFAULT_BYTES = 6_000_000
OPTIONAL_SHARE = 0.5
MAX_FAULTS = 10


def tell_stories(*, seed: int = 0) -> Iterator[str]:
    """Yield stories for ever, the same for the same seed."""
    return (story for story, _ in tell_scenes(seed=seed))


def tell_scenes(*, seed: int = 0) -> Iterator[tuple[str, Row]]:
    """Yield the stories of `tell_stories`, each with the words that fill its slots: what is true in it."""
    plots = [parse_plot(plot) for plot in PLOTS.values()]
    casts = [[_cast(plot, world) for world in WORLDS] for plot in plots]
    draw = random.Random(seed).random  # the only method whose numbers Python promises not to change
    while True:
        number = int(draw() * len(plots))
        tables = casts[number][int(draw() * len(WORLDS))]
        yield _tell_story(plots[number], tables, draw)


def _tell_story(plot: list[list[Beat]], tables: list[Table], draw: Callable[[], float]) -> tuple[str, Row]:
    """Take a row of each table and a form of each beat, and fill the slots; `draw` returns numbers in [0, 1)."""
    scene: Row = {}
    for table in tables:
        scene |= table[int(draw() * len(table))]
    paragraphs = []
    for paragraph in plot:
        told = [beat.forms for beat in paragraph if not beat.is_optional or draw() < OPTIONAL_SHARE]
        paragraphs.append(" ".join(forms[int(draw() * len(forms))] for forms in told))
    return "\n\n".join(paragraphs).format_map(scene), scene


def _cast(plot: list[list[Beat]], world: dict[str, Table]) -> list[Table]:
    """Return the tables from which a plot takes a row."""
    needed = {slot for beat in itertools.chain(*plot) for form in beat.forms for slot in slots_of(form)}
    return [table for table in world.values() if needed & table[0].keys()]


def count_stories() -> int:
    """Return how many stories the grammar can tell, counting each way to choose rows and forms once."""
    total = 0
    for plot in map(parse_plot, PLOTS.values()):
        tellings = math.prod(len(beat.forms) + beat.is_optional for beat in itertools.chain(*plot))
        total += sum(tellings * math.prod(map(len, _cast(plot, world))) for world in WORLDS)
    return total


def write_corpus(path: str | os.PathLike[str], *, max_bytes: int = DEFAULT_BYTES, seed: int = 0) -> CorpusReport:
    """Write stories to a text file, each followed by a line with the separator, up to `max_bytes` of them.

    Raises:
        ValueError: `max_bytes` is too small for a story.
    """
    start = time.perf_counter()
    path = Path(path)
    stories, size = [], 0
    for story in tell_stories(seed=seed):
        size += len(story) + len(DOCUMENT_END)  # every character is one byte
        if size > max_bytes:
            break
        stories.append(story)
    if not stories:
        raise ValueError(f"max_bytes: expected room for at least one story, some 1,000 bytes, found {max_bytes:,}")
    data = "".join(f"{story}{DOCUMENT_END}" for story in stories).encode("ascii")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data)
    return CorpusReport(path, len(data), len(stories), time.perf_counter() - start)


def main(argv: Sequence[str] | None = None) -> None:
    """Write stories to the file named on the command line, or check those in it."""
    parser = argparse.ArgumentParser(
        prog="python -m databuilder.stories",
        description="Write children's stories to a text file, or check the stories that a model wrote.",
    )
    parser.add_argument("path", metavar="FILE", help="the text file to write; with --check, the one to read, or -")
    parser.add_argument(
        "--max-bytes", type=int, default=DEFAULT_BYTES, metavar="N", help="stop at this size (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the stories (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="check stories: text, or the lines of transformerlm-infer")
    parser.add_argument("--known", metavar="FILE", help="with --check: the stories that the model was trained on")
    arguments = parser.parse_args(argv)
    try:
        if arguments.check:
            _check(arguments.path, arguments.known)
        else:
            report = write_corpus(arguments.path, max_bytes=arguments.max_bytes, seed=arguments.seed)
            said = f"{report.bytes / 1e6:.1f} MB of text, {report.documents:,} stories, {report.seconds:.1f} s"
            sys.stderr.write(f"{report.path}: {said}\n")
    except (ValueError, OSError) as error:
        parser.error(in_words(error))


def _check(path: str, known: str | None) -> None:
    """Write the shares of a file's stories that pass the check, and what is wrong with the first of them.

    Raises:
        ValueError: there is no story.
    """
    texts = read_stories(path)
    summary = summarize(texts, known=read_stories(known) if known else None)
    lines = [str(summary)]
    for number, text in enumerate(texts, 1):
        lines += [f"story {number}: {fault}" for fault in check_story(text).faults]
    shown = lines[: 1 + MAX_FAULTS]
    more = [f"... and {len(lines) - len(shown):,} more"] * (len(lines) > len(shown))
    sys.stdout.write("\n".join(shown + more) + "\n")


def read_stories(path: str | os.PathLike[str]) -> list[str]:
    """Return the stories of a text file with separators, or of JSON lines with one text each; `-` is stdin.

    Raises:
        ValueError: the file has no story, or a line of JSON has no text.
        OSError: it cannot be read.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        found = f"the byte 0x{error.object[error.start]:02x} after {error.start} others"
        raise ValueError(f"{path}: expected stories in UTF-8, found {found}") from None
    if text.lstrip().startswith("{"):
        lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        stories = [_text_of(line, f"{path}: line {number}") for number, line in lines]
    else:
        stories = [story.strip() for story in text.split(END_OF_TEXT) if story.strip()]
    if not any(stories):
        raise ValueError(f"{path}: expected stories, found none")
    return stories


def _text_of(line: str, where: str) -> str:
    """Return the text of a JSON line from a corpus, or from `transformerlm-infer`, where the prompt belongs to it."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON object, found {error}") from None
    for keys in (("text",), ("text.prompt", "text.output")):
        if isinstance(record, dict) and all(isinstance(record.get(key), str) for key in keys):
            return "".join(record[key] for key in keys).split(END_OF_TEXT)[0].strip()
    found = ", ".join(record) if isinstance(record, dict) else line[:40]
    raise ValueError(f'{where}: expected "text", or "text.prompt" and "text.output", found {found}')


if __name__ == "__main__":
    main(sys.argv[1:])
