"""A file is recognised by its first bytes: no text is refused, and nothing else is taken for text."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.utils.packed import parquet_bytes, zstd
from transformerlm.utils.text_files import TextBlock, expand_inputs, read_text

TEXT = "One document here.<|endoftext|>Two documents there."
CYRILLIC = b" ".join([bytes(range(0xC0, 0x100))] * 3)  # only letters, in an encoding of the nineties


def _zip() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("word/document.xml", TEXT)
    return sink.getvalue()


def _npy() -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.arange(100, dtype=np.uint16))
    return sink.getvalue()


def _gpt2_ids() -> bytes:
    """Return ids as another program keeps them, without a header: small ones are frequent, as in any text."""
    rng = random.Random(0)
    return np.array([int(50_000 ** rng.random()) for _ in range(5000)], dtype="<u2").tobytes()


FOREIGN = {
    "utf-16": (TEXT.encode("utf-16"), r"found UTF-16 \(iconv -f utf-16 -t utf-8"),
    "utf-16be": (b"\xfe\xff" + TEXT.encode("utf-16be"), "found UTF-16 "),
    "utf-32": (TEXT.encode("utf-32"), r"found UTF-32 \(iconv -f utf-32 -t utf-8"),
    "utf-16le without a mark": (TEXT.encode("utf-16le"), r"may be UTF-16 \(if so, iconv -f utf-16le -t utf-8"),
    "utf-16be without a mark": (TEXT.encode("utf-16be"), r"may be UTF-16 \(if so, iconv -f utf-16be -t utf-8"),
    "old encoding": (CYRILLIC, r"characters invalid \(iconv -f ENCODING -t utf-8"),
    "gzip": (gzip.compress(TEXT.encode()), r"found gzip data \(give it a name that ends in \.gz"),
    "zstd": (zstd(TEXT.encode()), r"found Zstandard data \(give it a name that ends in \.zst"),
    "docx": (_zip(), r"found a zip archive, as \.docx, .* save the document as plain text"),
    "pdf": (b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\n", "found a PDF .*pdftotext"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "found a picture"),
    "parquet": (parquet_bytes({"text": [TEXT] * 50}), r"found Parquet data \(give it a name that ends in \.parquet"),
    "npy": (_npy(), "found numpy's ids"),
    "token file": (_gpt2_ids(), "binary data, such as another program's token file"),
    "token file of 32 bits": (np.arange(400, dtype=np.uint32).tobytes(), "found binary data"),
    "random": (random.Random(0).randbytes(5000), "found binary data"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", ["a.txt", "part-00000", "notes.md.gz", "a.jsonl", "a.txt.zst"])
def test_data_that_is_no_text_is_refused_whatever_its_name(tmp_path: Path, kind: str, name: str) -> None:
    """The first bytes decide, also under compression; one line says what was found and what to do."""
    data, message = FOREIGN[kind]
    pack = {".gz": gzip.compress, ".zst": zstd}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(data))
    with pytest.raises(ValueError, match=message) as caught:
        expand_inputs(tmp_path / name)
    assert f"{name}: expected UTF-8 text, found " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xef\xbb\xbfa byte order mark",
        b"PAR1 is a gene. " * 20,
        b"GIF89a is the name of a format, BZh the beginning of another",
        "naïve café, déjà vu ".encode("latin-1") * 50,
        b"a page with one NUL\0 in it. " * 40,
        b"\x1b[31mred\x1b[0m on a terminal\x08\x08\n" * 40,
        b"\xff\xfdshort",
        "漢字かな交じり文 ".encode() * 10_000,
    ],
)
def test_text_with_a_few_strange_bytes_is_still_text(tmp_path: Path, data: bytes) -> None:
    """A byte order mark, escapes, a NUL, Latin-1 accents and words that begin other formats are still text."""
    (tmp_path / "a.txt").write_bytes(data)
    assert expand_inputs(tmp_path / "a.txt") == [tmp_path / "a.txt"]
    assert "".join(block.text for block in read_text(tmp_path / "a.txt")) == data.decode("utf-8", "replace")


@pytest.mark.parametrize(("suffix", "pack"), [(".json", bytes), (".json.gz", gzip.compress), (".json.zst", zstd)])
def test_json_files_that_hold_lines_are_json_lines(tmp_path: Path, suffix: str, pack: type) -> None:
    """Many JSON lines files have this name: each line is a document, and no brace is trained on."""
    path = tmp_path / f"d{suffix}"
    path.write_bytes(pack(b'{"text": "first"}\n{"text": "second"}\n'))
    assert expand_inputs(path) == [path]
    assert list(read_text(path)) == [TextBlock("first", True), TextBlock("second", True)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (' \n[{"text": "one"}, {"text": "two"}]', r"expected JSON lines, .* found an array \(jq -c '\.\[\]'"),
        (json.dumps({"text": "one"}, indent=2), r"found an object over several lines \(jq -c \."),
    ],
)
def test_other_json_is_refused_with_the_way_to_lines(tmp_path: Path, name: str, text: str, message: str) -> None:
    """One array, or an object over several lines, is refused before any work."""
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        expand_inputs(tmp_path / name)


def test_a_first_line_longer_than_the_head_is_left_to_the_reader(tmp_path: Path) -> None:
    """A long document in the first line is no reason to refuse the file."""
    long = "word " * 50_000
    (tmp_path / "a.json").write_text(json.dumps({"text": long}) + "\n" + json.dumps({"text": "two"}) + "\n")
    (path,) = expand_inputs(tmp_path / "a.json")
    assert [block.text for block in read_text(path)] == [long, "two"]


_ROW = json.dumps({"text": "one"}) + "\n"
_LONG_ROW = json.dumps({"text": "word " * 8000}) + "\n"


@pytest.mark.parametrize("name", ["jl.txt", "part-00000", "a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize("text", [_ROW, _ROW.strip(), _ROW * 3, "\ufeff\n" + _ROW + "\r\n" + _ROW, _LONG_ROW * 2])
def test_json_lines_under_another_name_are_refused(tmp_path: Path, name: str, text: str) -> None:
    """Read as plain text, a model would learn their syntax; the one line says to rename the file."""
    pack = {".gz": gzip.compress, ".zst": zstd}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(text.encode()))
    with pytest.raises(ValueError, match=rf"{name}: .*looks like JSON lines: rename it to \.jsonl"):
        expand_inputs(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        _ROW + "A line of JSON, and what it means.\n" + _ROW,
        "What it means:\n" + _ROW * 2,
        "[1]\n[2]\n",
        "1\n2\n",
        '"a"\n"b"\n',
        "{}\n{}\n",
        "{a: 1}\n{b: 2}\n",
        '{\n  "text": 1\n}\n',
        _LONG_ROW + "word " * 8000,
    ],
)
def test_text_with_some_json_in_it_is_still_text(tmp_path: Path, text: str) -> None:
    """A line of JSON among others, values that are not objects, and braces of a program are read as text."""
    (tmp_path / "a.txt").write_text(text)
    assert expand_inputs(tmp_path / "a.txt") == [tmp_path / "a.txt"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_tables_are_refused_by_name(tmp_path: Path, name: str) -> None:
    """Commas and quotes of a table are not text."""
    (tmp_path / name).write_bytes(b"id,text\n1,one\n")
    with pytest.raises(ValueError, match=rf"found the table .*{name} \(convert it to JSON lines or Parquet\)"):
        expand_inputs(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TEXT.encode(), ""),
        (TEXT.encode("utf-16"), "expected UTF-8 text, found UTF-16"),
        (_ROW.encode() * 2, "looks like JSON lines"),
    ],
)
def test_a_pipe_is_told_by_its_first_block(tmp_path: Path, data: bytes, message: str) -> None:
    """A pipe can be read only once, so its data is checked while it is read."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,), daemon=True)
    writer.start()
    (path,) = expand_inputs(pipe)
    if not message:
        assert "".join(block.text for block in read_text(path)) == TEXT
    else:
        with pytest.raises(ValueError, match=f"pipe: .*{message}"):
            list(read_text(path))
    writer.join(10)
