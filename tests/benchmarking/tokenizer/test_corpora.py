"""The kinds of text: what is taken from the packages' files, in the same order each time."""

from __future__ import annotations

import ast
import gettext
import json
from itertools import islice
from pathlib import Path
from typing import get_args

import pytest

from benchmarking.tokenizer.corpora import CORPORA
from config.bench_tokenizer import Kind
from tests.benchmarking.tokenizer.debian_files import write_changes, write_help, write_messages


def test_each_kind_of_the_configuration_has_a_corpus() -> None:
    """The schema and the corpora name the same kinds."""
    assert set(CORPORA) == set(get_args(Kind))


def test_help_pages_are_their_paragraphs(tmp_path: Path) -> None:
    """Marks of HTML are gone, references to characters are characters, and a line that was there is omitted."""
    first = '<h1 id="a">見出し</h1><p class="x">第一&amp;<b>段落</b>\n  続き</p><footer id="DEBUG"><p>作者</p>'
    write_help(tmp_path, "ja", [first, "<p>第一&amp;段落 続き</p>", "<p>第三</p>"])
    documents = list(CORPORA["japanese"].documents(tmp_path))
    assert sorted("\n".join(documents).split("\n")) == ["第一&段落 続き", "第三", "見出し"]
    assert documents == list(CORPORA["japanese"].documents(tmp_path))


def test_messages_are_the_translations(tmp_path: Path) -> None:
    """Every translation is there, forms of the plural too, but neither the originals nor the file's head."""
    path = write_messages(tmp_path, "th", ["หนึ่ง", "สอง\0สาม", "หนึ่ง"])
    with path.open("rb") as file:
        assert gettext.GNUTranslations(file).gettext("0") == "หนึ่ง"  # a file as gettext reads it
    assert list(CORPORA["thai"].documents(tmp_path)) == ["หนึ่ง\nสอง\nสาม"]
    path.write_bytes(b"no catalogue, but a text of some length")
    with pytest.raises(ValueError, match=r"expected a little-endian \.mo file"):
        list(CORPORA["thai"].documents(tmp_path))


def test_the_sources_are_named_with_their_versions(tmp_path: Path) -> None:
    """A Debian package's version is in its list of changes, which need not be there; pip knows its own."""
    write_changes(tmp_path, "libreoffice-help-de", "libreoffice (4:7.4.7-1+deb12u14) bookworm; urgency=medium")
    expected = ["libreoffice-help-de 4:7.4.7-1+deb12u14", "libreoffice-help-es", "libreoffice-help-fr"]
    assert CORPORA["european"].sources(tmp_path) == expected
    assert [source.split()[0] for source in CORPORA["code"].sources(tmp_path)] == ["torch", "numpy"]
    assert CORPORA["json_logs"].sources(tmp_path)[0].startswith("Python 3.")


@pytest.mark.parametrize("kind", ["chinese", "thai", "european"])
def test_without_its_packages_a_kind_has_no_text(kind: str, tmp_path: Path) -> None:
    """Nothing is made up."""
    assert list(CORPORA[kind].documents(tmp_path)) == []


def test_logs_are_json_in_the_order_of_time(tmp_path: Path) -> None:
    """Each line is an object, the times rise, and a second run writes the same."""
    first, second = islice(CORPORA["json_logs"].documents(tmp_path), 2)
    records = [json.loads(line) for log in (first, second) for line in log.split("\n")[1:]]
    times = [record["time"] for record in records]
    assert len(records) == 2000
    assert times == sorted(times)
    assert {record["level"] for record in records} == {"INFO", "WARNING", "ERROR"}
    assert next(CORPORA["json_logs"].documents(tmp_path)) == first


@pytest.mark.parametrize("kind", ["code", "tables"])
def test_source_code_is_that_of_the_packages(kind: str, tmp_path: Path) -> None:
    """Documents are whole files, which Python can read."""
    documents = list(islice((text for text in CORPORA[kind].documents(tmp_path) if "def " in text), 3))
    assert len(documents) == 3
    for document in documents:
        ast.parse(document)


def test_trees_are_indented(tmp_path: Path) -> None:
    """More than a third of the characters are blanks."""
    text = "".join(islice(CORPORA["indented"].documents(tmp_path), 5))
    assert text.count(" ") > len(text) / 3
