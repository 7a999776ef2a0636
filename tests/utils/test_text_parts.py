"""Text files cut into parts: put together again they are the file, wherever they were cut."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import random
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.utils.packed import write_parquet, zstd
from transformerlm.tokenizer.pretokenize import SpecialTokenSplitter
from transformerlm.tokenizer.reading import SafeCuts
from transformerlm.utils import text_files, text_parts
from transformerlm.utils.text_files import ReadStats, read_text
from transformerlm.utils.text_parts import DocumentEnds, TextPart, find_parts, read_part

EOT = "<|endoftext|>"
# Pieces of files: separators, beginnings of them, tokens that overlap them, damaged and cut UTF-8, marks, NUL, CRLF.
PIECES = [
    EOT.encode(), b"<|endof", b"<|", b"|>", b"text|>", b"word", b" a", b"don't", b"12", b"\r\n", b"\n\n", b"\0",
    b"\xef\xbb\xbf", b"\xff", b"\xe2\x82", b"\x80", b"\xf0\x9f", "€".encode(), "\U0001f600".encode(),
    "é".encode(), b"\xef\xbf\xbd", b"   ",
]  # fmt: skip
FILES = st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join)
OVERLAPS = [EOT + "x", "word" + EOT[:4], " a<", "|>  ", EOT + EOT]


@pytest.fixture
def blocks_of_seven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read and search in blocks of a few bytes, so that their edges are everywhere."""
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 7)
    monkeypatch.setattr(text_parts, "_BLOCK_BYTES", 7)


def _text_and_stats(path: Path, parts: list[TextPart] | None = None) -> tuple[str, ReadStats]:
    stats = ReadStats(sample_chars=20)
    blocks = read_text(path, stats=stats) if parts is None else (b for p in parts for b in read_part(p, stats=stats))
    text = "".join(block.text for block in blocks)
    stats.sample = ["".join(stats.sample)]
    return text, stats


def _document_ends(data: bytes, specials: list[str]) -> list[int]:
    """Return where separators end, in bytes, as the tokenizer's splitter sees them in the whole text."""
    text, place, ends = data.decode("utf-8", "surrogateescape"), 0, []
    for segment, is_special in SpecialTokenSplitter(specials).split(text):
        place += len(segment.encode("utf-8", "surrogateescape"))
        if is_special and segment == EOT:
            ends.append(place)
    return ends


@settings(max_examples=120, deadline=None)
@given(FILES, st.lists(st.sampled_from(OVERLAPS), max_size=2))
def test_parts_end_where_documents_do(tmp_path_factory: pytest.TempPathFactory, data: bytes, others: list[str]) -> None:
    """From each byte on, the first end of a document is found; one that another token may overlap is passed over."""
    path = tmp_path_factory.mktemp("parts") / "a.txt"
    path.write_bytes(data)
    ends = _document_ends(data, [EOT, *others])
    for find_cut in (DocumentEnds(EOT), DocumentEnds(EOT, others)):
        with path.open("rb") as file:
            found = [find_cut(file, at) for at in range(1, len(data) + 1)]
        if not find_cut._tokens[1:] and not others:
            assert found == [
                min([end for end in ends if end >= at], default=len(data)) for at in range(1, len(data) + 1)
            ]
        if find_cut._tokens[1:] or not others:
            assert set(found) <= {*ends, len(data)}
        assert found == sorted(found)


@settings(max_examples=120, deadline=None)
@given(FILES, st.integers(1, 60))
def test_parts_of_plain_text_are_the_text(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, part_bytes: int
) -> None:
    """Text, the count of invalid bytes, and the sample are the whole file's, for cuts of both kinds."""
    path = tmp_path_factory.mktemp("parts") / "a.txt"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "BLOCK_BYTES", 7)
        whole = _text_and_stats(path)
        for find_cut in (DocumentEnds(EOT), SafeCuts(SpecialTokenSplitter([EOT]))):
            parts = find_parts([path], part_bytes=part_bytes, find_cut=find_cut)
            assert _text_and_stats(path, parts) == whole
            assert [part.start for part in parts[1:]] == [part.end for part in parts[:-1]]
            assert sum(part.num_bytes for part in parts) == len(data)


def test_tokens_that_invalid_bytes_may_spell_are_never_cut(tmp_path: Path) -> None:
    """U+FFFD is read for invalid bytes, so where it is part of a special token the file is one part."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"one \xff two \xff three")
    token = "\ufffd t"
    for find_cut in (DocumentEnds(token), SafeCuts(SpecialTokenSplitter([token]))):
        assert len(find_parts([path], part_bytes=1, find_cut=find_cut)) == 1


def _safe() -> SafeCuts:
    return SafeCuts(SpecialTokenSplitter([EOT]))


def _rows_files(folder: Path) -> list[Path]:
    rng = random.Random(1)
    texts = ["".join(rng.choices(["word ", "é", EOT, "\n", "\ufffd"], k=rng.randint(0, 12))) for _ in range(40)]
    lines = b"\xef\xbb\xbf" + b"".join(json.dumps({"text": text}).encode() + b"\r\n" for text in texts)
    lines = lines.replace(b"word", b"\xff\xe2", 3) + b'\n  \n{"text": "\\ud83d no end"}'
    (folder / "rows.jsonl").write_bytes(lines)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "rows.txt.zst").write_bytes(zstd(lines.replace(b"text", b"t")))
    write_parquet(folder / "rows.parquet", {"text": texts}, row_group_size=3)
    (folder / "empty.txt").write_bytes(b"")
    (folder / "empty.jsonl").write_bytes(b"")
    return sorted(folder.iterdir())


def test_parts_of_every_format_are_the_files(tmp_path: Path, blocks_of_seven: None) -> None:
    """Documents and statistics are the same; lines and row groups are cut, packed text and empty files are not."""
    paths = _rows_files(tmp_path)
    for part_bytes in (1, 50, 300, 10**6):
        parts = find_parts(paths, part_bytes=part_bytes, find_cut=DocumentEnds(EOT))
        for path in paths:
            own = [part for part in parts if part.path == str(path)]
            whole, found = ReadStats(), ReadStats()
            blocks = [block for part in own for block in read_part(part, stats=found)]
            if path.suffix in (".jsonl", ".parquet"):
                assert blocks == list(read_text(path, stats=whole))
            else:
                assert "".join(b.text for b in blocks) == "".join(b.text for b in read_text(path, stats=whole))
            assert found == whole
            if path.suffix in (".gz", ".zst") or "empty" in path.name:
                assert own == [text_parts.whole_file(path)]
            elif part_bytes == 1:
                assert len(own) == (14 if path.suffix == ".parquet" else 43)


def test_no_part_is_further_than_its_size(tmp_path: Path) -> None:
    """What has been read of a part never counts what lies before it in the file."""
    path = tmp_path / "rows.parquet"
    write_parquet(path, {"text": [f"{number} {'word ' * 300}" for number in range(60)]}, row_group_size=3)
    parts = find_parts([path], part_bytes=path.stat().st_size // 8, find_cut=DocumentEnds(EOT))
    assert len(parts) > 2
    for part in parts:
        stats = ReadStats()
        assert all(stats.disk_bytes <= part.num_bytes for _ in read_part(part, stats=stats))
        assert stats.disk_bytes == part.num_bytes


def test_a_part_survives_json(tmp_path: Path) -> None:
    """A part is facts alone: another process finds the same by itself, or is told in JSON."""
    (path := tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    parts = find_parts([path], part_bytes=16, find_cut=_safe())
    assert len(parts) == 2
    told = json.loads(json.dumps([dataclasses.asdict(part) for part in parts]))
    assert [TextPart(**record) for record in told] == parts


@pytest.mark.parametrize("refuse", [False, True])
def test_errors_in_a_part_name_lines_and_bytes_of_the_file(tmp_path: Path, refuse: bool) -> None:
    """Whoever reads one part learns the same place as a reader of the whole file."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 5 + '{"text": 7}\n')
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "one"}\n' * 5 + b'{"text": "\xff"}\n')
    (tmp_path / "c.txt").write_bytes(b"one two<|endoftext|>" * 3 + b"four \xff")
    write_parquet(tmp_path / "d.parquet", {"text": ["one", "two", None]}, row_group_size=1)
    for path in sorted(tmp_path.iterdir()):
        messages = []
        for part in (None, find_parts([path], part_bytes=10, find_cut=DocumentEnds(EOT))[-1]):
            stats = ReadStats(refuse_invalid=refuse)
            try:
                list(read_text(path, stats=stats) if part is None else read_part(part, stats=stats))
            except ValueError as error:
                messages.append(str(error))
        assert len(set(messages)) == (1 if messages else 0)
        assert len(messages) == (2 if refuse or path.name[0] in "ad" else 0)


def test_a_file_that_shrank_is_refused(tmp_path: Path) -> None:
    """Text that was there when the file was cut is never missing in silence."""
    (path := tmp_path / "a.txt").write_text(f"one{EOT}" * 20)
    part = find_parts([path], part_bytes=100, find_cut=DocumentEnds(EOT))[-1]
    os.truncate(path, 280)
    with pytest.raises(ValueError, match=r"a\.txt: expected 320 bytes or more, found 280 \(the file has changed"):
        list(read_part(part))


def test_a_file_that_shrinks_while_it_is_cut_is_refused(tmp_path: Path) -> None:
    """The same end would be found for ever."""
    (path := tmp_path / "a.txt").write_text("x" * 1000)
    with pytest.raises(ValueError, match="the file has changed since"):
        find_parts([path], part_bytes=256, find_cut=lambda file, at: min(at, 500))


def test_a_pipe_is_one_part(tmp_path: Path) -> None:
    """What can be read only once cannot be cut."""
    os.mkfifo(path := tmp_path / "pipe")
    parts = find_parts([path], part_bytes=1, find_cut=_safe())
    assert parts == [TextPart(str(path), "file", 0, 0, 0)]
    writer = threading.Thread(target=path.write_text, args=("one two",))
    writer.start()
    assert "".join(block.text for block in read_part(parts[0])) == "one two"
    writer.join()
