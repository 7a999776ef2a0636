"""A corpus that every installation already has: the docstrings of the standard library, torch and numpy.

Files are read and parsed with `ast`, never imported or run. A document is a docstring under its name, such as
`json.dumps(obj, skipkeys, ...)`. The same installation gives the same documents in the same order. Files are sorted by
a hash of their name, so that a smaller corpus is a fair sample of a larger one; then documents are mixed by a hash of
their text. To make the file by hand:

    python -m databuilder.docstring_corpus data/corpus.txt --max-bytes 6000000
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from config.special_tokens import END_OF_TEXT
from transformerlm.tokenizer.parallel import map_in_order, resolve_num_workers
from transformerlm.utils.files import write_whole
from transformerlm.utils.strings import in_words

PACKAGES = ("torch", "numpy")
MIN_CHARS = 40

_SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_FILES_PER_TASK = 64
DOCUMENT_END = f"\n{END_OF_TEXT}\n"

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class CorpusReport:
    """What was written where, and how long it took."""

    path: Path
    bytes: int
    documents: int
    seconds: float


def collect_docstrings(*, max_bytes: int | None = None, num_workers: int | None = None) -> Iterator[str]:
    """Yield documents, at most `max_bytes` of them as `write_corpus` writes them (by default all, about 10 MB).

    Very short docstrings, repeated ones, and those that hold the separator are omitted.
    """
    files = sorted(_source_files(), key=lambda named: _digest(named[0]))
    tasks = [files[start : start + _FILES_PER_TASK] for start in range(0, len(files), _FILES_PER_TASK)]
    workers = resolve_num_workers(num_workers, sum(path.stat().st_size for _, path in files))
    seen: set[bytes] = set()
    kept: list[tuple[bytes, str]] = []
    size = 0
    with closing(map_in_order(_documents_of, tasks, num_workers=workers)) as results:
        for heading, text in (document for documents in results for document in documents):
            if (digest := _digest(text)) in seen:
                continue
            document = f"{heading}\n\n{text}"
            size += len(f"{document}{DOCUMENT_END}".encode())
            if max_bytes is not None and size > max_bytes:
                if not kept:
                    raise ValueError(f"max_bytes: expected room for at least one docstring, found {max_bytes:,}")
                break
            seen.add(digest)
            kept.append((digest, document))
    for _, document in sorted(kept):
        yield document


def write_corpus(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> CorpusReport:
    """Write the documents to a text file, each followed by a line with the separator.

    Raises:
        ValueError: no docstrings were found, as in an installation without sources, or `max_bytes` has no room for one.
    """
    start = time.perf_counter()
    path = Path(path)
    documents = list(collect_docstrings(max_bytes=max_bytes))
    if not documents:
        raise ValueError(
            "docstrings: expected the standard library's sources, found none (train on a text file instead)"
        )
    text = "".join(f"{document}{DOCUMENT_END}" for document in documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return CorpusReport(path, len(text.encode()), len(documents), time.perf_counter() - start)


def _source_files() -> list[tuple[str, Path]]:
    """Return each source file with the name of its module."""
    files = _files_below(Path(sysconfig.get_paths()["stdlib"]), "")
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            files += _files_below(Path(folder), package)
    return files


def _files_below(root: Path, package: str) -> list[tuple[str, Path]]:
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        inside = [package, *Path(folder).relative_to(root).parts]
        for name in names:
            if name.endswith(".py"):
                parts = inside if name == "__init__.py" else [*inside, name.removesuffix(".py")]
                files.append((".".join(filter(None, parts)), Path(folder) / name))
    return files


def _documents_of(files: list[tuple[str, Path]]) -> list[tuple[str, str]]:
    documents = []
    for module, path in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # other people's invalid escapes
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue  # a template or a damaged file
        documents += [found for found in _docstrings(tree, module) if _is_worth_keeping(found[1])]
    return documents


def _docstrings(node: ast.Module | Definition, heading: str) -> Iterator[tuple[str, str]]:
    """Yield heading and docstring of a module or definition, and of everything it defines."""
    if docstring := ast.get_docstring(node, clean=False):
        yield heading, inspect.cleandoc(docstring)
    prefix = heading.split("(")[0]
    for child in _definitions(node):
        yield from _docstrings(child, f"{prefix}.{child.name}{_signature(child)}".removeprefix("."))


def _definitions(node: ast.AST) -> Iterator[Definition]:
    """Yield the classes and functions of a body, also those under `if` and `try`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _definitions(child)


def _signature(node: Definition) -> str:
    """Return the names of a function's parameters, as a reader would write the call; nothing for a class."""
    if isinstance(node, ast.ClassDef):
        return ""
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    names = names[1:] if names[:1] in (["self"], ["cls"]) else names
    names += [f"*{node.args.vararg.arg}"] if node.args.vararg else []
    names += [argument.arg for argument in node.args.kwonlyargs]
    names += [f"**{node.args.kwarg.arg}"] if node.args.kwarg else []
    return f"({', '.join(names)})"


def _is_worth_keeping(text: str) -> bool:
    has_surrogates = any("\ud800" <= character <= "\udfff" for character in text)
    return len(text) >= MIN_CHARS and END_OF_TEXT not in text and not has_surrogates


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def main(argv: Sequence[str] | None = None) -> None:
    """Write the corpus to the file named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m databuilder.docstring_corpus",
        description="Write the docstrings of the installed Python, torch and numpy to a text file.",
    )
    parser.add_argument("path", type=Path, metavar="FILE.txt", help="the text file to write")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="stop at this size (default: all there is)")
    arguments = parser.parse_args(argv)
    try:
        report = write_corpus(arguments.path, max_bytes=arguments.max_bytes)
    except (ValueError, OSError) as error:
        parser.error(in_words(error))
    sys.stderr.write(f"{report.path}: {report.bytes / 1e6:.1f} MB of text, {report.documents:,} documents\n")


if __name__ == "__main__":
    main(sys.argv[1:])
