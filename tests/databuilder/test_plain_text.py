"""Cutting text without separators into documents."""

from __future__ import annotations

import itertools

import pytest

from databuilder import plain_text
from databuilder.plain_text import cut_into_documents, write_documents, write_part
from transformerlm.utils import text_files
from transformerlm.utils.text_files import ReadStats


def test_documents_end_at_blank_lines_and_lose_nothing():
    """Documents are about as long as asked, end at blank lines, and give the text again when joined."""
    text = "".join(f"line {i}\n" + ("\n" if i % 7 == 0 else "") for i in range(500))
    documents = list(cut_into_documents(text.splitlines(keepends=True), characters=200))
    assert "".join(documents) == text
    assert len(documents) > 5
    assert all(200 <= len(document) < 400 and document.endswith("\n\n") for document in documents[:-1])


def test_text_without_blank_lines_is_cut_at_line_ends():
    """Without a blank line, a document ends at a line's end after four times the length."""
    text = "one line\n" * 300
    documents = list(cut_into_documents(text.splitlines(keepends=True), characters=100))
    assert "".join(documents) == text
    assert all(400 <= len(document) < 420 for document in documents[:-1])


def test_files_are_written_with_separators(tmp_path):
    """Several files become one corpus; a document never spans two files; CRLF stays."""
    (tmp_path / "a.txt").write_bytes(b"first\r\n\r\nstill first")
    (tmp_path / "b.txt").write_bytes("zweités".encode())
    out = tmp_path / "corpus.txt"
    assert write_documents([tmp_path / "a.txt", tmp_path / "b.txt"], out, separator="<sep>") == 2
    assert out.read_bytes() == "first\r\n\r\nstill first\n<sep>\nzweités\n<sep>\n".encode()


def test_rows_are_not_glued_together(tmp_path):
    """Each row of JSON lines is cut by itself, however short it is."""
    (tmp_path / "a.jsonl").write_text('{"text": "The end."}\n{"text": "Once upon"}\n{"text": " "}\n')
    out = tmp_path / "corpus.txt"
    assert write_documents([tmp_path / "a.jsonl"], out, separator="<sep>") == 2
    assert out.read_text() == "The end.\n<sep>\nOnce upon\n<sep>\n"


def test_what_is_no_utf8_is_counted(tmp_path):
    """The corpus is valid UTF-8, so nobody after it could tell."""
    (tmp_path / "a.txt").write_bytes("très bien\n\n".encode("latin-1") * 3)
    for write, options in ((write_documents, {}), (write_part, {"fraction": 0.5})):
        stats = ReadStats()
        write([tmp_path / "a.txt"], tmp_path / "out.txt", separator="<sep>", stats=stats, **options)
        assert stats.invalid_utf8 == 3


def test_empty_files_are_refused(tmp_path):
    """Files without text are an error that names them."""
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"a\.txt: expected text"):
        write_documents([tmp_path / "a.txt"], tmp_path / "out.txt", separator="<sep>")


def test_one_string_is_no_list_of_lines():
    """Taken letter by letter, a text would be cut inside its words."""
    with pytest.raises(TypeError, match="lines: expected a list of strings"):
        list(cut_into_documents("one\ntwo\n"))


def test_a_part_of_a_text_is_whole_documents_from_all_over_it(tmp_path):
    """A tenth of the documents, evenly spread and in order, whole and with a separator after each; the first is one."""
    documents = [f"document {number}\n" + "line\n" * (number % 7) for number in range(1000)]
    (tmp_path / "a.txt").write_text("<|end|>".join(documents[:400]))
    (tmp_path / "b.txt").write_text("<|end|>".join(documents[400:]))
    inputs = [tmp_path / "a.txt", tmp_path / "b.txt"]
    number = write_part(inputs, tmp_path / "part.txt", fraction=0.1, separator="<|end|>")
    found = [one.removeprefix("\n") for one in (tmp_path / "part.txt").read_text().split("<|end|>")][:-1]
    assert len(found) == number == pytest.approx(100, abs=2)
    places = [documents.index(one) for one in found]
    assert places == sorted(places)
    assert places[0] == 0
    assert max(b - a for a, b in itertools.pairwise(places)) < 25


@pytest.mark.parametrize("block", [1, 2, 5, 7, 64])
def test_a_part_is_the_same_wherever_the_blocks_end(block, tmp_path, monkeypatch):
    """A separator that two blocks share is one; a document longer than a block is whole; blank ones are none."""
    (tmp_path / "a.txt").write_text("one<|end|>two, long\n\n and longer<|end|> \n <|end|>ż<|end|>four <|en <|end|>")
    expected = "one<|end|>\ntwo, long\n\n and longer<|end|>\n \n ż<|end|>\nfour <|en <|end|>\n"
    monkeypatch.setattr("transformerlm.utils.text_files.BLOCK_BYTES", block)
    assert write_part([tmp_path / "a.txt"], tmp_path / "part.txt", fraction=0.9999, separator="<|end|>") == 4
    assert (tmp_path / "part.txt").read_text() == expected


def test_a_part_of_json_lines_has_a_document_a_line(tmp_path):
    """A line is a document even without separators, and an input without text is refused."""
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "document {number}"}}\n' for number in range(10)))
    assert write_part([tmp_path / "a.jsonl"], tmp_path / "part.txt", fraction=0.5, separator="<|end|>") == 5
    assert (tmp_path / "part.txt").read_text().count("document") == 5
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="expected text, found none"):
        write_part([tmp_path / "empty.txt"], tmp_path / "part.txt", fraction=0.5, separator="<|end|>")


@pytest.mark.parametrize("block", [1, 2, 3, 7, 100])
def test_lines_are_the_same_wherever_the_blocks_end(block, tmp_path, monkeypatch):
    """Also where a block ends between the two characters of a line end, or is one line."""
    monkeypatch.setattr(text_files, "BLOCK_BYTES", block)
    text = "one\ntwo\r\nthree\rfour\n\n\nfive\u2028six " + "seven " * 9 + "\n\r\neight"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert list(plain_text._lines(tmp_path / "a.txt", None)) == text.splitlines(keepends=True)


@pytest.mark.parametrize("line", ["words and more words " * 5000, "x" * 100_000, "字" * 100_000])
def test_a_text_of_one_huge_line_is_cut_into_documents(line, tmp_path):
    """Where asked to, a line without an end is cut, after a space if it has some; nothing is lost."""
    (tmp_path / "a.txt").write_text(line, encoding="utf-8")
    number = write_documents([tmp_path / "a.txt"], tmp_path / "b.txt", separator="<|end|>", longest_line=4000)
    documents = (tmp_path / "b.txt").read_text(encoding="utf-8").split("\n<|end|>\n")[:-1]
    assert number == len(documents) > 5
    joined = " ".join(documents) if " " in line else "".join(documents)
    assert joined == line.rstrip()
    assert write_documents([tmp_path / "a.txt"], tmp_path / "c.txt", separator="<|end|>") == 1
