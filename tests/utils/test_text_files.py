"""Which files the text reader accepts, and that it changes no character of them."""

from __future__ import annotations

import gzip
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.utils.packed import write_parquet, zstd
from transformerlm.utils import text_files
from transformerlm.utils.text_files import ReadStats, TextBlock, expand_inputs, read_ahead, read_text, total_bytes


def _read_all(path: Path, **options: object) -> str:
    return "".join(block.text for block in read_text(path, **options))


def test_names_and_globs_become_files_in_order(tmp_path: Path) -> None:
    """Names keep their order, a glob's matches are sorted, `**` goes into folders, and folders are not matches."""
    for name in ("b.txt", "a.txt", "sub/c.txt", "[x].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert expand_inputs([tmp_path / "b.txt", f"{tmp_path}/a*"]) == [tmp_path / "b.txt", tmp_path / "a.txt"]
    assert expand_inputs(f"{tmp_path}/**/c.txt") == [tmp_path / "sub/c.txt"]
    assert expand_inputs(tmp_path / "[x].txt") == [tmp_path / "[x].txt"]
    assert tmp_path / "sub" not in expand_inputs(f"{tmp_path}/*")
    assert total_bytes([tmp_path / "a.txt", tmp_path / "b.txt"]) == 8


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no such advice")
def test_the_system_reads_the_beginnings_of_files_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of regular files alone, and not more than its memory may hold; one that is gone is no error here."""
    paths = [tmp_path / name for name in ("a", "gone", "pipe", "b", "c")]
    for path, size in ((paths[0], 70), (paths[3], 50), (paths[4], 9)):
        path.write_bytes(b"x" * size)
    os.mkfifo(paths[2])
    found: list[tuple[int, int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *rest: found.append((os.fstat(file).st_size, *rest)))
    monkeypatch.setattr(text_files, "_MOST_AHEAD", 100)
    read_ahead(paths)
    for thread in threading.enumerate():
        if thread.name == "read-ahead":
            thread.join(60)
    assert found == [(70, 0, 100, os.POSIX_FADV_WILLNEED), (50, 0, 30, os.POSIX_FADV_WILLNEED)]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ([], ValueError, "at least one text file"),
        (["missing.txt"], FileNotFoundError, "found nothing at .*missing.txt"),
        (["*.missing"], FileNotFoundError, "none that match"),
        (["sub"], FileNotFoundError, r"expected text files in .*sub, found no file"),
        (["a.txt", "a.*"], ValueError, "named twice"),
        (["a.txt", "sub/../a.txt"], ValueError, "named twice"),
        (["data.arrow"], ValueError, r"expected plain text.*data\.arrow"),
        (["data.tar.gz"], ValueError, r"expected plain text.*data\.tar\.gz"),
        (["link.txt"], FileNotFoundError, "broken link"),
    ],
)
def test_inputs_that_cannot_be_are_refused(tmp_path: Path, names: list[str], error: type, message: str) -> None:
    """Each bad input gives one line that names it."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("text")
    for name in ("data.arrow", "data.tar.gz"):
        (tmp_path / name).write_text("no text")
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(error, match=message) as caught:
        expand_inputs([f"{tmp_path}/{name}" for name in names])
    assert "\n" not in str(caught.value)


def test_a_folder_stands_for_the_text_files_below_it(tmp_path: Path) -> None:
    """Files are sorted, from all folders below except hidden ones; if all are text, there is no warning."""
    for name in ("b.md", "a/z.txt", "a/rows.jsonl", ".hidden", ".git/config", "[odd]/c.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text('{"text": "t"}' if "rows" in name else "text")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert expand_inputs(tmp_path / "in") == [
            tmp_path / "in" / name for name in ("[odd]/c.txt", "a/rows.jsonl", "a/z.txt", "b.md")
        ]
        assert expand_inputs([f"{tmp_path}/in/[odd]/", tmp_path / "in/b.md"]) == [
            tmp_path / "in/[odd]/c.txt",
            tmp_path / "in/b.md",
        ]


def test_a_folder_leaves_out_what_is_no_text_and_says_so(tmp_path: Path) -> None:
    """They are skipped by name or by content; one warning counts the texts and names the first few others."""
    for name, content in {
        "a.txt": b"text",
        "b.txt": b"\x89PNG\r\n\x1a\n",
        "c.npy": b"text",
        "d.csv": b"a,b",
        "e.json": b'[{"text": "t"}]',
    }.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "f").symlink_to(tmp_path / "gone")
    others = rf"{tmp_path}/b.txt, {tmp_path}/c.npy, {tmp_path}/d.csv, 2 more"
    with pytest.warns(UserWarning, match=f"{tmp_path}: 1 text file; left out as no text: {others}"):
        assert expand_inputs(tmp_path) == [tmp_path / "a.txt"]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(FileNotFoundError, match=f"expected text files in {tmp_path}, found {others}"):
        expand_inputs(tmp_path)


def test_a_folder_leaves_out_what_our_commands_write(tmp_path: Path) -> None:
    """A tokenizer beside the text would be trained on, and the parts of a killed build would change its input.

    Of the files in a tokenizer's folder only its own are left out, with what a save that was killed has left.
    """
    for name in (
        "a.txt",
        "b/merges.txt",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens.json",
        "tokenizer/notes.txt",
        "gpt2-vocab.json",
        "gpt2-merges.txt",
        "gpt2-special_tokens.json",
        "other-merges.txt",
        "tokenizer/merges.txt.tmp-old",
        "begun/merges.txt.tmp",
        "half/merges.txt",
        "half/special_tokens.json",
        "half/vocab.json.tmp",
        "c.txt.part",
        "c.txt.part.json",
        "d.part",
        "train.npy.parts/plan.json",
        "t.shards/x.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts = ("a.txt", "b/merges.txt", "d.part", "other-merges.txt", "tokenizer/notes.txt")
        assert expand_inputs(tmp_path) == [tmp_path / name for name in texts]


def test_a_folder_below_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text would be missing without a word."""
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "sub/b.txt"):
        (tmp_path / name).write_text("text")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=r"expected a folder that can be read, found .*sub \(Permission denied\)"):
        expand_inputs(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("name", ["", "*.txt", "b*"])
def test_a_name_that_is_not_utf8_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    """No sidecar could name such an input; it is found by a folder or a glob."""
    (tmp_path / "a.txt").write_text("text")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.txt")).write_text("text")
    with pytest.raises(ValueError, match=r"^input: expected text in UTF-8, found '.*b\\udcff\.txt'; a file"):
        expand_inputs(f"{tmp_path}/{name}")


def test_a_folder_does_not_hide_a_damaged_file(tmp_path: Path) -> None:
    """Text that is lost to damage is an error, not something to skip."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"b\.txt\.gz: expected a whole gzip file"):
        expand_inputs(tmp_path)


def test_a_file_without_read_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be read is refused before any work."""
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=r"a\.txt without read permission"):
        expand_inputs(tmp_path / "a.txt")


@settings(deadline=None, max_examples=60)
@given(data=st.binary(max_size=60), block=st.integers(1, 9))
def test_any_bytes_read_as_one_decode_would_for_any_block_size(
    data: bytes, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Blocks that cut a character in two change neither the text nor the count of invalid bytes."""
    path = tmp_path_factory.mktemp("bytes") / "a.txt"
    path.write_bytes(data)
    stats = ReadStats()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "BLOCK_BYTES", block)
        blocks = list(read_text(path, stats=stats))
    expected = data.decode("utf-8", "replace")
    assert "".join(block.text for block in blocks) == expected
    assert stats.invalid_utf8 == expected.count("\ufffd") - data.count("\ufffd".encode())
    assert [block.ends_document for block in blocks] == [False] * (len(blocks) - 1) + [True] * bool(blocks)
    assert stats.disk_bytes == len(data)


def test_text_is_not_touched(tmp_path: Path) -> None:
    """CRLF, a lone CR, a byte order mark and U+FFFD itself stay unchanged."""
    text = "\ufeffone\r\ntwo\rthree\n\ufffd"
    (tmp_path / "a.txt").write_bytes(text.encode())
    stats = ReadStats()
    assert _read_all(tmp_path / "a.txt", stats=stats) == text
    assert stats.invalid_utf8 == 0


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".txt.zst", zstd), (".TXT.ZST", zstd)])
def test_compressed_text_reads_like_plain_text(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    """A compressed file gives the same text, also in several frames; its progress is counted in bytes on disk."""
    text = "some téxt\r\n" * 1000
    path = tmp_path / f"a{suffix}"
    path.write_bytes(compress(text.encode()) + compress(b"more"))
    stats = ReadStats()
    assert _read_all(path, stats=stats) == text + "more"
    assert stats.disk_bytes == path.stat().st_size
    assert not text_files.is_plain_text(path)


def test_each_row_of_a_parquet_file_is_a_document(tmp_path: Path) -> None:
    """The named column's rows are documents, whatever their row groups; progress ends at the file's size."""
    rows = ["one\r\n", "", "zwei ü", *map(str, range(100))]
    path = write_parquet(tmp_path / "a.parquet", {"n": list(range(103)), "body": rows}, row_group_size=7)
    stats = ReadStats()
    seen = []
    for block in read_text(path, text_field="body", stats=stats):
        assert block.ends_document
        seen.append((block.text, stats.disk_bytes))
    assert [text for text, _ in seen] == rows
    assert [done for _, done in seen] == sorted(done for _, done in seen)
    assert stats.disk_bytes == path.stat().st_size
    assert not text_files.is_plain_text(path)


def test_rows_that_are_no_utf8_are_replaced_and_counted_or_refused(tmp_path: Path) -> None:
    """The same rule applies to a column's bytes as to a file's."""
    path = write_parquet(tmp_path / "a.parquet", {"text": [b"fine", b"a\xffb"]}, as_text=True)
    stats = ReadStats()
    assert _read_all(path, stats=stats) == "finea\ufffdb"
    assert stats.invalid_utf8 == 1
    with pytest.raises(ValueError, match=r"a\.parquet: row 2: expected UTF-8, found byte 0xff at offset 1"):
        _read_all(path, stats=ReadStats(refuse_invalid=True))


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip"])
def test_a_damaged_gzip_is_named(tmp_path: Path, damage: str) -> None:
    """A gzip file that is cut off, altered or not gzip at all is an error, not the end of the text."""
    data = bytearray(gzip.compress(os.urandom(5000)))
    if damage == "flipped":
        data[2000] ^= 255
    (tmp_path / "a.gz").write_bytes({"cut": data[:3000], "flipped": data, "not gzip": b"plain text"}[damage])
    with pytest.raises(ValueError, match=r"a\.gz: expected a whole gzip file"):
        _read_all(tmp_path / "a.gz")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".JSONL", ".jsonl.zst"])
def test_each_json_line_is_a_document(tmp_path: Path, suffix: str) -> None:
    """The named field of each line is one document; blank lines and a byte order mark are skipped."""
    lines = b'\xef\xbb\xbf{"body": "one\\r\\n", "n": 1}\n\n{"body": "two"}\r\n{"body": ""}'
    path = tmp_path / f"a{suffix}"
    compress = {".gz": gzip.compress, ".zst": zstd}.get(path.suffix, bytes)
    path.write_bytes(compress(lines))
    expected = [TextBlock("one\r\n", True), TextBlock("two", True), TextBlock("", True)]
    assert list(read_text(path, text_field="body")) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected a JSON object, found a line that is no JSON"),
        ("[1]", "expected a JSON object, found an array"),
        ('{"txt": "a"}', r"expected the field 'text', found \['txt'\] \(set text_field\)"),
        ('{"text": 3}', "expected text under 'text', found a number"),
        ('{"text": null}', "expected text under 'text', found null"),
        ("null", "expected a JSON object, found null"),
        ('{"text": {"a": true}}', "found an object"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    """Each error says file and line."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*" + message):
        _read_all(tmp_path / "a.jsonl")


def test_json_half_characters_and_bad_bytes_are_replaced_and_counted(tmp_path: Path) -> None:
    """What JSON allows but UTF-8 cannot encode becomes U+FFFD."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\ud800b\xffc"}\n')
    stats = ReadStats()
    assert _read_all(tmp_path / "a.jsonl", stats=stats) == "a\ufffdb\ufffdc"
    assert stats.invalid_utf8 == 2


def test_an_endless_json_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line beyond the limit is an error; it does not use up all memory."""
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 20)
    (tmp_path / "a.jsonl").write_text('{"text": "much longer than twenty bytes"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:1: expected a line of at most 20 bytes"):
        _read_all(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors"])
def test_weights_are_not_read_as_text(tmp_path: Path, name: str) -> None:
    """They are refused by name: read as text, they would be millions of U+FFFD."""
    (tmp_path / name).write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=f"expected plain text, .* found .*{name}"):
        expand_inputs([str(tmp_path / name)])


def test_links_in_a_folder_lead_round_no_loop_and_name_no_file_twice(tmp_path):
    """A folder is walked without following links to folders; a file with two names is read once."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/one.txt").write_text("one")
    (tmp_path / "a/two.txt").symlink_to(tmp_path / "a/one.txt")
    (tmp_path / "a/up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "b").symlink_to(tmp_path, target_is_directory=True)
    assert expand_inputs(tmp_path) == [tmp_path / "a/one.txt"]


def test_a_notebook_is_no_text(tmp_path):
    """A model should not learn its JSON and encoded pictures; in a folder it is skipped."""
    (tmp_path / "a.ipynb").write_text('{"cells": []}')
    with pytest.raises(ValueError, match=r"found the notebook .*a\.ipynb \(export it as Markdown\)"):
        expand_inputs(tmp_path / "a.ipynb")
    (tmp_path / "b.md").write_text("text")
    with pytest.warns(UserWarning, match=r"left out as no text: .*a\.ipynb"):
        assert expand_inputs(tmp_path) == [tmp_path / "b.md"]
