"""`transformerlm-init`: a folder with a TOML file for each step, made from the shipped ones."""

from __future__ import annotations

from config.special_tokens import END_OF_TEXT

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.init")

import shlex
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path

from cli.hints import command_line
from cli.stages import files_of
from cli.terminal import note, note_invalid_utf8
from cli.utils import Command
from cli.utils import main as run_command
from config.init import InitConfig
from config.io import SHIPPED

STEPS = ("train_tokenizer", "make_data", "train", "infer", "eval", "export")
# What --help shows.
SHORT = ("dir", "text")
EXAMPLES = (
    ("a project whose text comes later", "my-model"),
    ("one with the text of some files", "my-book --text book.txt"),
)
IGNORED = "/data/\n/runs/\n/exports/\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    command = Command(
        "transformerlm-init",
        InitConfig,
        init,
        first_word="dir",
        short=SHORT,
        examples=EXAMPLES,
    )
    run_command(command, argv)


def init(config: InitConfig) -> None:
    """Write the project, or nothing if one of its files exists already.

    Raises:
        FileExistsError: the project would replace a file.
        NotADirectoryError: the project's name is that of a file.
    """
    files = project_files(config.dir.resolve().name)
    corpus = Path("data/corpus.txt")
    taken = [str(path) for path in (*files, *([corpus] if config.text else [])) if (config.dir / path).exists()]
    if taken:
        names = ", ".join(taken[:3]) + (", ..." if len(taken) > 3 else "")
        raise FileExistsError(f"{config.dir}: holds {names} already; choose another directory")
    if config.dir.exists() and not config.dir.is_dir():
        raise NotADirectoryError(f"{config.dir}: expected a directory for the project, found a file")
    texts = _texts(config.text)
    (config.dir / corpus).parent.mkdir(parents=True, exist_ok=True)
    if texts:
        _write_corpus(texts, config.dir / corpus)
    _write(config.dir, files)
    with chdir(config.dir):
        command = command_line("train-tokenizer", "--config", "train_tokenizer.toml")
    note(f"{config.dir}: a project; its README.md has the commands in order. Next:\n")
    note(shlex.join(["cd", "--", str(config.dir)] if str(config.dir).startswith("-") else ["cd", str(config.dir)]))
    if not texts:
        note(f"# first put your text into {corpus}; README.md says how to get some")
    note(command)


def _write_corpus(texts: Sequence[Path], corpus: Path) -> None:
    """Write the text, whole or not at all: a part of it would look like all of it to the next command.

    Raises:
        ValueError, OSError: a text cannot be read to its end, or the corpus not written.
    """
    from databuilder.plain_text import write_documents
    from transformerlm.utils.files import whole_file
    from transformerlm.utils.text_files import ReadStats

    stats = ReadStats()
    with whole_file(corpus) as unfinished:
        number = write_documents(texts, unfinished, separator=END_OF_TEXT, stats=stats)
    note_invalid_utf8(stats.invalid_utf8)
    note(f"{corpus}: the text, cut into {number:,} documents")


def _write(project: Path, files: dict[Path, str]) -> None:
    """Write the files, or none of them if one cannot be written.

    Raises:
        OSError: a file cannot be written.
    """
    begun: list[Path] = []
    try:
        for path, content in files.items():
            (project / path).parent.mkdir(parents=True, exist_ok=True)
            begun.append(project / path)
            begun[-1].write_text(content, encoding="utf-8")
    except OSError:
        for path in begun:
            path.unlink(missing_ok=True)
        raise


def _texts(patterns: Sequence[str]) -> list[Path]:
    """Return the files of the text; a file that is not text is refused before anything is written.

    Raises:
        FileNotFoundError: a name without a file.
        ValueError: a file that is not text, or no text in any of them.
    """
    if not patterns:
        return []
    from transformerlm.utils.text_files import read_text

    paths = files_of(patterns, why="which are read twice")
    if not any(block.text.strip() for path in paths for block in read_text(path)):
        raise ValueError(f"{', '.join(map(str, paths))}: expected text, found none")
    return paths


def project_files(name: str) -> dict[Path, str]:
    """Return the contents of each file of a project; the shipped paths are relative, so they hold in its folder."""
    files = {Path("README.md"): (SHIPPED / "project/README.md").read_text(encoding="utf-8").format(name=name)}
    files[Path(".gitignore")] = IGNORED
    for step in STEPS:
        schema = f"{step}.schema.json"
        toml = (SHIPPED / f"{step}.toml").read_text(encoding="utf-8").replace("config/resources/", "")
        files[Path(f"{step}.toml")] = toml.replace(f"#:schema {schema}", f"#:schema .schemas/{schema}")
        files[Path(".schemas") / schema] = (SHIPPED / schema).read_text(encoding="utf-8")
    return files
