"""Kinds of text to measure on, built from what Debian's and pip's packages ship: the same packages, the same text.

    chinese, japanese, korean, european, russian   LibreOffice's help, the text of its pages
    thai                                            LibreOffice's messages: its help is not translated
    code                                            Python files of torch and numpy
    tables                                          Python files that are one long table: encodings, names, code points
    json_logs                                       lines of a web server that never was, drawn with a seed
    indented                                        what `python -m ast` prints of the standard library

Files come in the order of a hash of their names, so the first megabytes are a fair sample of all. A line that was there
before is omitted, except in source code and logs, where people's files repeat lines as well.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import html
import importlib.metadata
import importlib.util
import json
import platform
import random
import re
import struct
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from http import HTTPStatus
from pathlib import Path

_HELP = "usr/share/libreoffice/help"
_MESSAGES = "usr/lib/libreoffice/program/resource"
_LINES_A_LOG, _NUM_LOGS = 1000, 1000
_LONGEST_SOURCE = 100_000
_FIRST_SECOND = datetime(2026, 1, 1, tzinfo=UTC)

_PARAGRAPH = re.compile(r"<(p|h[1-6])\b[^>]*>(.*?)</\1>", re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
_MO_MAGIC = 0x950412DE


@dataclass(frozen=True)
class Corpus:
    """A kind of text: its documents, given the folder where Debian's packages are, and the packages that ship it."""

    documents: Callable[[Path], Iterator[str]]
    debian: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()

    def sources(self, root: Path) -> list[str]:
        """Return the packages with their versions, where these are known."""
        found = [f"{name} {_debian_version(root, name)}".strip() for name in self.debian]
        found += [f"{name} {importlib.metadata.version(name)}" for name in self.pip if importlib.util.find_spec(name)]
        return found or [f"Python {platform.python_version()}"]


def help_pages(root: Path, *, languages: tuple[str, ...]) -> Iterator[str]:
    """Yield the paragraphs of each page of LibreOffice's help."""
    pages = (path for language in languages for path in (root / _HELP / language / "text").rglob("*.html"))
    lines = (_paragraphs(path.read_text(encoding="utf-8", errors="replace")) for path in _mixed(pages))
    yield from _without_repeats(lines)


def messages(root: Path, *, language: str) -> Iterator[str]:
    """Yield the translated messages of each of LibreOffice's parts."""
    catalogues = (root / _MESSAGES / language / "LC_MESSAGES").glob("*.mo")
    yield from _without_repeats(_translations(path.read_bytes()) for path in _mixed(catalogues))


def code(root: Path) -> Iterator[str]:
    """Yield the Python files of torch and numpy."""
    files = (path for name in ("torch", "numpy") for path in _package_files(name, "**/*.py"))
    yield from _texts(_mixed(files))


def tables(root: Path) -> Iterator[str]:
    """Yield source files that are little more than a table; packages that are not installed have none."""
    files = [*(Path(sysconfig.get_paths()["stdlib"]) / "encodings").glob("*.py")]
    files += _package_files("pygments", "lexers/_*.py")
    files += _package_files("wcwidth", "table_*.py")
    files += _package_files("idna", "*data.py")
    files += _package_files("tzdata", "zoneinfo/*.zi")
    yield from _texts(_mixed(files))


def json_logs(root: Path) -> Iterator[str]:
    """Yield logs of a thousand lines, a JSON object a line, after a heading as `tail` prints it."""
    rng = random.Random(0)
    names, seconds = sorted(sys.stdlib_module_names), 0.0
    for number in range(_NUM_LOGS):
        lines = [f"==> server.{number}.log <=="]  # else the text were taken for JSON lines, and refused
        for _ in range(_LINES_A_LOG):
            seconds += rng.expovariate(20)
            status = rng.choice([*[HTTPStatus.OK] * 20, *HTTPStatus])
            name = rng.choice(names).strip("_")
            record = {
                "time": (_FIRST_SECOND + timedelta(seconds=seconds)).isoformat(timespec="milliseconds"),
                "level": "INFO" if status < 400 else "WARNING" if status < 500 else "ERROR",
                "logger": f"server.{name}",
                "message": f"{rng.choice(['GET', 'GET', 'POST'])} /{name}/{rng.randrange(500)}: {status.phrase}",
                "status": status.value,
                "duration_ms": round(rng.lognormvariate(2, 1), 3),
                "request_id": f"{rng.getrandbits(64):016x}",
            }
            lines.append(json.dumps(record))
        yield "\n".join(lines)


def indented(root: Path) -> Iterator[str]:
    """Yield the syntax tree of each module of the standard library, four blanks for each level."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for text in _texts(_mixed(path for path in folder.rglob("*.py") if "site-packages" not in path.parts)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            try:
                if len(text) < _LONGEST_SOURCE:
                    yield ast.dump(ast.parse(text), indent=4)
            except (SyntaxError, ValueError, RecursionError):  # files that test the parser
                continue


def _help(*languages: str) -> Corpus:
    packages = tuple(f"libreoffice-help-{language.lower()}" for language in languages)
    return Corpus(partial(help_pages, languages=languages), debian=packages)


CORPORA: dict[str, Corpus] = {
    "chinese": _help("zh-CN"),
    "japanese": _help("ja"),
    "korean": _help("ko"),
    "thai": Corpus(partial(messages, language="th"), debian=("libreoffice-l10n-th",)),
    "european": _help("de", "es", "fr"),
    "russian": _help("ru"),
    "code": Corpus(code, pip=("torch", "numpy")),
    "tables": Corpus(tables, pip=("pygments", "wcwidth", "idna", "tzdata")),
    "json_logs": Corpus(json_logs),
    "indented": Corpus(indented),
}
"""Kind -> where its text comes from."""


def _paragraphs(page: str) -> Iterator[str]:
    """Yield the text of each paragraph and heading of a help page on one line, without what only its authors need."""
    for match in _PARAGRAPH.finditer(page.partition('id="DEBUG"')[0]):
        yield " ".join(html.unescape(_TAG.sub("", match[2])).split())


def _translations(catalogue: bytes) -> Iterator[str]:
    """Yield the translations of a gettext `.mo` file: after its head a table of lengths and places.

    Raises:
        ValueError: a file of another kind.
    """
    if len(catalogue) < 20 or struct.unpack_from("<I", catalogue)[0] != _MO_MAGIC:
        raise ValueError("messages: expected a little-endian .mo file of gettext, found something else")
    number, _, place = struct.unpack_from("<3I", catalogue, 8)
    for row in range(1, number):  # the first is the head
        length, start = struct.unpack_from("<2I", catalogue, place + 8 * row)
        yield from catalogue[start : start + length].decode("utf-8", "replace").split("\0")


def _without_repeats(pages: Iterable[Iterable[str]]) -> Iterator[str]:
    """Yield pages as text, each line only where it is met for the first time."""
    seen = {""}
    for page in pages:
        lines = [line for line in page if not (line in seen or seen.add(line))]  # type: ignore[func-returns-value]
        if lines:
            yield "\n".join(lines)


def _texts(paths: Iterable[Path]) -> Iterator[str]:
    """Yield the files that are UTF-8."""
    for path in paths:
        try:
            yield path.read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            continue


def _package_files(package: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return [path for folder in folders for path in Path(folder).glob(pattern)]


def _mixed(paths: Iterable[Path]) -> list[Path]:
    """Return files in the order of a hash of their names and their folders' names, wherever the packages are."""
    return sorted(paths, key=lambda path: (hashlib.sha256("/".join(path.parts[-4:]).encode()).digest(), path))


def _debian_version(root: Path, package: str) -> str:
    """Return the version that a package's list of changes begins with, nothing where it has none."""
    changes = root / "usr/share/doc" / package / "changelog.Debian.gz"
    if not changes.exists():
        return ""
    with gzip.open(changes, "rt", encoding="utf-8", errors="replace") as file:
        return file.readline().partition("(")[2].partition(")")[0]
