"""What README and docs tell people to type is accepted; the commands by hand and the library example run."""

from __future__ import annotations

import functools
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from keyword import iskeyword
from pathlib import Path

import pytest

from tests.pages import FENCE, blocks

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKING = [*PAGES, *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG"))]
TOMLS = [path for folder in ("config/resources", "docs/recipes") for path in sorted((ROOT / folder).rglob("*.toml"))]
BY_HAND = ("train-tokenizer", "make-data", "train", "infer")
# Commands whose lines are checked by appending an option that prints and runs nothing: --print-config, but for these.
PRINTS = {"benchmarking.gpu_suite": "--dry-run"}
# Those without a configuration, which only running them can check (tests/test_docs.py).
PLAIN = ("benchmarking.plot_tokenizer", "benchmarking.lm_eval", "benchmarking.fit_rows")
ENDS = ("|", ">", ">>", "2>", "<", "&&", ";", "&", "$@", "$@;")  # "$@" is what a function of the shell was given
COMMAND = re.compile(r"transformerlm-([\w-]+)|(?:cli|benchmarking)\.(\w+)")


def blocks_of(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a page in this language."""
    return [block.text for block in blocks(page) if block.language == language]


def commands_of(page: Path) -> list[str]:
    """Return the lines of a page's shell blocks, continued lines joined; of a TOML file, those of its comments.

    A block that has a test of its own is omitted: its commands may need what only that test makes.
    """
    if page.suffix == ".toml":
        return re.findall(
            r"^#  +(.*(?:transformerlm-|benchmarking\.).*)$", page.read_text(encoding="utf-8"), flags=re.M
        )
    shell = [block.text for block in blocks(page) if block.language in ("bash", "sh") and not block.has_own_test]
    lines = [line for text in shell for line in text.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split()) for line in lines if line.strip() and not line.strip().startswith("#")]


def our_part(line: str) -> tuple[str, list[str]] | None:
    """Return the module of a command line of ours and its arguments, up to a pipe or redirection."""
    words = shlex.split(line, comments=True)
    for index, word in enumerate(words):
        found = COMMAND.fullmatch(word.removeprefix("$(which ").removesuffix(")"))
        if found and (found[1] or words[index - 1] == "-m"):
            module = f"cli.{found[1].replace('-', '_')}{'_' * iskeyword(found[1])}" if found[1] else word
            arguments = words[index + 1 :]
            ends = [place for place, one in enumerate(arguments) if one in ENDS]
            return module, arguments[: min(ends, default=len(arguments))]
    return None


LINES = [
    pytest.param(line, id=f"{page.relative_to(ROOT)}: {line}")
    for page in (*PAGES, *TOMLS)
    for line in dict.fromkeys(commands_of(page))
    if (part := our_part(line)) and part[0] not in PLAIN
]


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """Go to a directory that looks like a fresh clone, with the shipped TOMLs under short names, too."""
    for name in ("config", "docs", "databuilder", "benchmarking"):
        (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    for toml in (ROOT / "config/resources").glob("*.toml"):
        (tmp_path / toml.name).write_bytes(toml.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", LINES)
def test_the_command_is_accepted(line, checkout):
    """The line's options and values are valid: the command prints its configuration or plan instead of running."""
    module, arguments = our_part(line)
    for place, word in enumerate(arguments):
        if word.endswith(("/config.toml", "/train.toml")) and not Path(word).exists():  # that of a run, or for one
            arguments[place] = "train.toml"
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as done:
        importlib.import_module(module).main([*arguments, PRINTS.get(module, "--print-config")])
    assert (done.value.code or 0) == 0, stderr.getvalue()
    assert stdout.getvalue()


def test_readme_starts_with_what_a_newcomer_needs():
    """README's first shell lines: the clone, the small download before any other, the main job, and the quick tests."""
    clone, *commands = commands_of(ROOT / "README.md")
    assert clone.startswith("git clone")
    cpu, quickstart, tests = (
        next(index for index, line in enumerate(commands) if found in line)
        for found in ("export UV_FIND_LINKS=", "uv run transformerlm-quickstart", "uv run --extra dev pytest -m quick")
    )
    assert cpu < quickstart < tests < 5


def test_readme_shows_every_command():
    """Each console script is in README."""
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    text = (ROOT / "README.md").read_text()
    assert [script for script in scripts if script not in text] == []


@functools.cache
def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them of their words."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    words = [re.sub(r"\]\([^)]*\)", "", heading) for heading in re.findall(r"^#+ +(.+?) *$", text, flags=re.M)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in words}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Every relative link and picture of a page is a file of the repository, and its anchor a heading there."""
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors_of(path), f"{page.name}: {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_examples_import_what_exists(page):
    """Python blocks compile, and every name they import is there."""
    for block in blocks_of(page, "python"):
        compile(block, page.name, "exec")
        for line in re.findall(r"^(?:from|import) .*$", block, flags=re.M):
            exec(line, {})


@pytest.mark.slow
def test_the_commands_by_hand_and_the_library_example_run(checkout):
    """README's block of the four commands runs from top to bottom, then README's Python, in a fresh directory.

    Only the number of training steps is cut down.
    """
    block = next(
        block
        for block in blocks_of(ROOT / "README.md", "bash")
        if all(re.search(rf"transformerlm-{verb}\b(?!-)", block) for verb in BY_HAND)
    )
    if "data/corpus.txt" not in block.split("transformerlm-train-tokenizer")[0]:
        from databuilder.docstring_corpus import write_corpus

        (checkout / "data").mkdir()
        write_corpus(checkout / "data/corpus.txt", max_bytes=1_000_000)
    short = r"\1 --training.max_steps=20 --training.eval_tokens=1000"
    script = re.sub(r"^(.*transformerlm-train (?:[^\n\\]|\\\n)*?)(?=\s*(?:#.*)?$)", short, block, count=1, flags=re.M)
    script = script.replace("uv run ", "")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    for command in (
        ["bash", "-euc", script],
        [sys.executable, "-c", "\n".join(blocks_of(ROOT / "README.md", "python"))],
    ):
        done = subprocess.run(
            command,
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            timeout=3600,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr[-3000:]
