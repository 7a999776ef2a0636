"""The words of `INSTEAD`: no page, docstring or comment uses a phrase that a native speaker would not say."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
INSTEAD = {
    r"tell(s)? whether": "return whether, say whether",
    r"likeliest": "most likely",
    r"(is|are|that is|was) no UTF-8": "invalid UTF-8",
    r"made ready": "prepared, packed",
    r"leaves? away|left away": "omit",
    r"makes? (it|them) again": "recompute",
    r"(is|are) dear\b": "expensive",
}
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FOLDERS = ("config", "transformerlm", "databuilder", "cli", "logger", "benchmarking", "profiling", "tests", "docs")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path != Path(__file__))


def prose_of(path: Path) -> Iterator[str]:
    """Yield a page as it is, or the docstrings and comments of a Python file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield text
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def test_the_words_are_those_that_one_says() -> None:
    """A phrase of the list is found nowhere; the message has what to say instead."""
    failures = []
    for path in PAGES + SOURCES:
        if re.search("|".join(INSTEAD), " ".join(path.read_text(encoding="utf-8").split()), re.IGNORECASE) is None:
            continue  # nor in its prose, which takes far longer to find
        prose = "\n".join(" ".join(part.split()) for part in prose_of(path))
        for phrase, instead in INSTEAD.items():
            found = re.search(phrase, prose, flags=re.IGNORECASE)
            if found is not None:
                failures.append(f"{path.relative_to(ROOT)}: {found[0]!r}; say: {instead}")
    assert not failures, "\n".join(failures)
