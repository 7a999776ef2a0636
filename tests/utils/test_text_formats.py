"""Decompression is bounded, and a file that is not what its name says gets one line."""

from __future__ import annotations

import gzip
import importlib.util
import os
from pathlib import Path

import pytest

from tests.utils.packed import parquet_bytes, write_parquet, zstd
from transformerlm.utils import text_formats
from transformerlm.utils.text_files import expand_inputs, read_text


def _read(path: Path) -> str:
    return "".join(block.text for block in read_text(path))


@pytest.mark.parametrize("damage", ["cut", "cut in its head", "flipped", "not zstd", "garbage behind"])
def test_a_damaged_zstd_file_is_named(tmp_path: Path, damage: str) -> None:
    """A file that is cut off, altered, in another format or followed by other data is an error, not the text's end."""
    data = zstd(os.urandom(5000) + bytes(5000))
    flipped = data[:2] + bytes([data[2] ^ 255]) + data[3:]
    content = {
        "cut": data[:3000],
        "cut in its head": data[:2],
        "flipped": flipped,
        "not zstd": b"plain text",
        "garbage behind": data + b"garbage",
    }
    (tmp_path / "a.zst").write_bytes(content[damage])
    with pytest.raises(ValueError, match=r"a\.zst: expected a whole Zstandard file, found a damaged one") as caught:
        _read(tmp_path / "a.zst")
    assert "\n" not in str(caught.value)


def test_zstd_with_a_huge_window_is_refused(tmp_path: Path) -> None:
    """A frame that asks for a window of gigabytes is refused; it is not called damaged, and the error says why."""
    (tmp_path / "a.zst").write_bytes(bytes.fromhex("28b52ffd00a800010000"))
    message = (
        r"a\.zst: expected a Zstandard window of at most 128 MiB, found a wider one, here 2,048 MiB \(.*zstd --long"
    )
    for read in (expand_inputs, _read):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "a.zst")


@pytest.mark.parametrize(
    ("name", "kind"), [("a.txt.gz", "gzip"), ("a.jsonl.gz", "gzip"), ("a.zst", "Zstandard"), ("a.parquet", "Parquet")]
)
def test_a_packed_file_without_a_byte_is_no_empty_text(tmp_path: Path, name: str, kind: str) -> None:
    """A copy that failed at once is refused; a packed text without a character is read."""
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name}: expected a whole {kind} file, found a damaged one"):
        _read(tmp_path / name)
    packed = {"gzip": gzip.compress(b""), "Zstandard": zstd(b""), "Parquet": parquet_bytes({"text": [""]})}[kind]
    (tmp_path / name).write_bytes(packed)
    assert _read(tmp_path / name) == ""


@pytest.mark.parametrize("damage", ["cut", "broken footer", "not parquet", "empty"])
def test_a_damaged_parquet_file_is_named(tmp_path: Path, damage: str) -> None:
    """A file without its end, with a broken end, or without a beginning gets one line."""
    data = parquet_bytes({"text": ["some text"] * 100})
    content = {
        "cut": data[:-9],
        "broken footer": data[:-60] + bytes(40) + data[-20:],
        "not parquet": b"text",
        "empty": b"",
    }
    (tmp_path / "a.parquet").write_bytes(content[damage])
    with pytest.raises(ValueError, match=r"a\.parquet: expected a whole Parquet file, found a damaged one") as caught:
        _read(tmp_path / "a.parquet")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"]}, r"expected the column 'text' once, found \['body'\] \(set text_field\)"),
        ({"text": [1, 2]}, "expected text in the column 'text', found int64"),
        ({"text": [["a"]]}, "expected text in the column 'text', found list"),
        ({"text": ["a", None]}, "row 2: expected text under 'text', found null"),
        ({"text": ["a", "b" * 30]}, "row 2: expected text of at most 20 bytes, found 30"),
    ],
)
def test_a_column_or_row_that_cannot_be_is_named(
    tmp_path: Path, columns: dict[str, list[object]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing column, another type, a row without text and an endless row are errors that say where."""
    monkeypatch.setattr(text_formats, "MAX_ROW_BYTES", 20)
    with pytest.raises(ValueError, match=r"a\.parquet: " + message):
        _read(write_parquet(tmp_path / "a.parquet", columns))


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize("use_dictionary", [True, False])
def test_parquet_reads_alike_however_it_was_written(tmp_path: Path, compression: str, use_dictionary: bool) -> None:
    """The codec and the encoding of the column change no row."""
    rows = ["same"] * 20 + [f"row {number}" for number in range(50)]
    options = {"compression": compression, "use_dictionary": use_dictionary}
    assert _read(write_parquet(tmp_path / "a.parquet", {"text": rows}, **options)) == "".join(rows)


def test_a_parquet_column_may_be_of_any_kind_of_text(tmp_path: Path) -> None:
    """Columns with long offsets or dictionaries hold text, too."""
    import pyarrow

    rows = ["one", "two", "one"]
    for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())):
        column = pyarrow.array(rows).cast(kind) if kind == pyarrow.large_string() else pyarrow.array(rows, kind)
        assert _read(write_parquet(tmp_path / "a.parquet", {"text": column})) == "onetwoone"


@pytest.mark.parametrize("name", ["a.zst", "a.jsonl.zst", "a.parquet", "A.PARQUET"])
def test_a_missing_library_is_one_line_that_says_how_to_get_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without pyarrow the file is refused before any work, with the command that installs it; text needs none."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for one in (name, "a.txt"):
        (tmp_path / one).write_bytes(b"")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match=r'files need pyarrow: in the clone, pip install -e ".\[data\]"'):
        expand_inputs(tmp_path / name)
    assert len(expand_inputs([tmp_path / "a.txt", tmp_path / "a.txt.gz"])) == 2


def test_an_error_of_the_disk_is_not_called_damage(tmp_path: Path) -> None:
    """An error with a number comes from the system, and is passed on as it is."""
    path = tmp_path / "a.zst"
    with (
        pytest.raises(OSError, match="Input/output") as caught,
        text_formats.damage_named(path, text_formats.format_of(path)),
    ):
        raise OSError(5, "Input/output error")
    assert caught.value.errno == 5


@pytest.mark.parametrize(
    ("name", "layout", "compression", "is_plain"),
    [
        ("a.txt", "text", None, True),
        ("a", "text", None, True),
        ("A.TXT.GZ", "text", "gzip", False),
        ("a.zst", "text", "Zstandard", False),
        ("a.jsonl", "JSON lines", None, False),
        ("a.NDJSON.zst", "JSON lines", "Zstandard", False),
        ("a.json.gz", "JSON lines", "gzip", False),
        ("a.parquet", "Parquet", None, False),
    ],
)
def test_a_name_says_its_format_once(name: str, layout: str, compression: str | None, is_plain: bool) -> None:
    """Layout, compression and what follows from them are answers of one object, whatever the case of the letters."""
    form = text_formats.format_of(Path(name))
    assert (form.layout, form.compression, form.is_plain, form.refusal) == (layout, compression, is_plain, "")
    assert form.holds_rows == (layout != "text")
    assert form.packing == ("Parquet" if layout == "Parquet" else compression)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.npy", "a.csv", "a.tsv.zst", "a.ipynb"])
def test_a_name_that_is_not_read_says_what_to_do(name: str) -> None:
    """The refusal has the place of the path in it."""
    assert text_formats.format_of(Path(name)).refusal.format("PATH").count("PATH") == 1
