"""Cutting text without separators into documents."""

from __future__ import annotations

import pytest

from databuilder.plain_text import cut_into_documents, write_documents


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


def test_empty_files_are_refused(tmp_path):
    """Files without text are an error that names them."""
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"a\.txt: expected text"):
        write_documents([tmp_path / "a.txt"], tmp_path / "out.txt", separator="<sep>")


def test_one_string_is_no_list_of_lines():
    """Taken letter by letter, a text would be cut inside its words."""
    with pytest.raises(TypeError, match="lines: expected a list of strings"):
        list(cut_into_documents("one\ntwo\n"))
