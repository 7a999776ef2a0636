"""The corpus of docstrings is real text from this installation, the same each time, and nothing is executed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from databuilder import docstring_corpus
from databuilder.docstring_corpus import collect_docstrings, write_corpus

EOT = "<|endoftext|>"
LONG = "A docstring that is long enough to be worth keeping"

SOURCE = f'''
"""{LONG} in a module.

    Indented.
"""
raise SystemExit("this file must not be run")

class Shape:
    """{LONG} in a class."""

    def area(self, scale, *rest, unit="m", **options):
        """{LONG} in a method."""

if True:
    def hidden(a, /, b):
        """{LONG} under an if."""

def short():
    """Too short."""

def again():
    """{LONG} in a class."""

def separator():
    """{LONG} but with {EOT}."""
'''


@pytest.fixture
def _small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "library"
    for name, text in {
        "pkg/__init__.py": SOURCE,
        "pkg/broken.py": "def (",
        "pkg/latin.py": "\xff",
        "pkg/tests/test_it.py": f'"""{LONG} in a test."""',
    }.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(text, encoding="latin-1")
    monkeypatch.setattr(docstring_corpus.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    monkeypatch.setattr(docstring_corpus, "PACKAGES", ("no_such_package",))


@pytest.mark.usefixtures("_small_library")
def test_docstrings_come_under_their_names() -> None:
    """It has cleaned docstrings of modules, classes, methods, also under an `if`, without short or repeated ones."""
    assert set(collect_docstrings()) == {
        f"pkg\n\n{LONG} in a module.\n\nIndented.",
        f"pkg.Shape\n\n{LONG} in a class.",
        f"pkg.Shape.area(scale, *rest, unit, **options)\n\n{LONG} in a method.",
        f"pkg.hidden(a, b)\n\n{LONG} under an if.",
    }


@pytest.mark.usefixtures("_small_library")
def test_a_corpus_file_ends_each_document_with_a_separator_line(tmp_path: Path) -> None:
    """The file is documents, each followed by a line with the separator; the report counts what was written."""
    report = write_corpus(tmp_path / "deep/corpus.txt")
    text = (tmp_path / "deep/corpus.txt").read_text(encoding="utf-8")
    assert text.endswith(f"\n{EOT}\n")
    assert text.split(f"\n{EOT}\n")[:-1] == list(collect_docstrings())
    assert (report.bytes, report.documents) == (len(text.encode()), 4)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["corpus.txt"]


def test_an_installation_without_sources_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any text there is an error, not an empty corpus."""
    monkeypatch.setattr(docstring_corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "none")})
    monkeypatch.setattr(docstring_corpus, "PACKAGES", ())
    with pytest.raises(ValueError, match="expected the standard library's sources, found none"):
        write_corpus(tmp_path / "corpus.txt")


def test_too_small_a_bound_is_no_lack_of_sources(tmp_path: Path) -> None:
    """The error says which number was too small."""
    with pytest.raises(ValueError, match="max_bytes: expected room for at least one docstring, found 5"):
        write_corpus(tmp_path / "corpus.txt", max_bytes=5)


def test_the_real_corpus_is_text_within_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This installation gives as much text as asked for, the same for any number of workers, and imports no module."""
    monkeypatch.setattr(docstring_corpus, "_FILES_PER_TASK", 16)
    before = set(sys.modules)
    report = write_corpus(tmp_path / "corpus.txt", max_bytes=100_000)
    assert 80_000 < report.bytes <= 100_000
    documents = list(collect_docstrings(max_bytes=100_000, num_workers=1))
    assert (tmp_path / "corpus.txt").read_text(encoding="utf-8") == "".join(f"{text}\n{EOT}\n" for text in documents)
    assert len(set(documents)) == len(documents) == report.documents
    assert not {name for name in set(sys.modules) - before if name.startswith(("tkinter", "idlelib", "distutils"))}


@pytest.mark.usefixtures("_small_library")
def test_the_module_is_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m databuilder.docstring_corpus FILE` writes the corpus and says on stderr what it wrote."""
    docstring_corpus.main([str(tmp_path / "corpus.txt")])
    assert (tmp_path / "corpus.txt").stat().st_size > 0
    captured = capsys.readouterr()
    assert "4 documents" in captured.err
    assert captured.out == ""
