"""The formats of text files: what a name promises, and gzip, Zstandard and Parquet unpacked a piece at a time.

A file's name says which format it has. pyarrow, the extra `data`, reads Zstandard and Parquet.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from config.extras import how_to_install

MAX_ROW_BYTES = 1 << 26
MAX_WINDOW_MIB = 128  # of the decompressor
_COMPRESSIONS: dict[str, Literal["gzip", "Zstandard"]] = {".gz": "gzip", ".zst": "Zstandard"}
_NEEDS_PYARROW = ("Zstandard", "Parquet")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_TABLES = (".csv", ".tsv")
_NOT_TEXT = (".xz", ".bz2", ".zip", ".tar", ".tgz", ".arrow", ".npy", ".npz", ".safetensors", ".gguf", ".pt")
_READ_BYTES = 1 << 20
_BATCH_ROWS = 4  # together in memory, and each may be as long as its writer pleased


@dataclass(frozen=True)
class Format:
    """What the end of a file's name says of it; `format_of` is the one place that looks.

    `layout` is how the file holds documents, and `compression` how its bytes are packed. `refusal` is empty, or says
    why a file of such a name is not read; `{}` in it stands for the path.
    """

    layout: Literal["text", "JSON lines", "Parquet"]
    compression: Literal["gzip", "Zstandard"] | None = None
    refusal: str = ""

    @property
    def holds_rows(self) -> bool:
        """Whether the file holds documents one by one, as JSON lines or in Parquet, rather than running text.

        A row ends its document by itself, so a special token spelled in its text is plain text unless the caller asks
        otherwise. In running text, only special tokens say where documents end.
        """
        return self.layout != "text"

    @property
    def is_plain(self) -> bool:
        """Whether the file's bytes are its text."""
        return self.layout == "text" and self.compression is None

    @property
    def packing(self) -> str | None:
        """What has to be unpacked to reach the text, by the name that people use; None: nothing."""
        return "Parquet" if self.layout == "Parquet" else self.compression

    def unpacked(self, raw: io.BufferedReader) -> BinaryIO:
        """Return the stream of a file's decompressed bytes.

        Raises:
            EOFError: a packed file without a byte, which no packer writes.
        """
        if self.compression is not None and not raw.peek(1):
            raise EOFError("it is empty")
        if self.compression == "gzip":
            return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
        if self.compression == "Zstandard":
            import pyarrow

            stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
            return io.BufferedReader(stream, _READ_BYTES)
        return raw


def format_of(path: Path) -> Format:
    """Return the format that a file's name promises; any name that says nothing else is plain text."""
    name = path.name.lower()
    compression = next((kind for suffix, kind in _COMPRESSIONS.items() if name.endswith(suffix)), None)
    inner = name[: name.rindex(".")] if compression else name
    refusal = ""
    if inner.endswith(_NOT_TEXT):
        readable = "plain text, .jsonl, either as .gz or .zst, or .parquet"
        refusal = f"expected {readable}, found {{}} (unpack or convert it first)"
    elif name.endswith(".ipynb"):  # JSON, with pictures spelled out
        refusal = "expected text, found the notebook {} (export it as Markdown)"
    elif inner.endswith(_TABLES):
        refusal = "expected text, found the table {} (convert it to JSON lines or Parquet)"
    if name.endswith(".parquet"):
        return Format("Parquet", None, refusal)
    return Format("JSON lines" if inner.endswith(_JSON_SUFFIXES) else "text", compression, refusal)


def check_can_unpack(path: Path, form: Format) -> None:
    """Refuse a file whose format needs a library that is not installed.

    Raises:
        ValueError: pyarrow is missing.
    """
    if form.packing in _NEEDS_PYARROW and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{path}: {path.suffix} files need pyarrow: {how_to_install('data')}")


@contextmanager
def damage_named(path: Path, form: Format) -> Iterator[None]:
    """Turn what the unpackers raise into one line that names the file.

    Raises:
        ValueError: the file is cut off, altered, in another format than its name says, or packed with a window of
            Zstandard that the decompressor refuses.
    """
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, form.packing or "gzip", error) from error
    except OSError as error:
        # pyarrow's own errors have no number; a disk that cannot be read gives one.
        if error.errno is not None or form.packing not in _NEEDS_PYARROW:
            raise
        if "too much memory" in str(error):
            raise _too_wide_window(path) from error
        raise _damaged(path, form.packing, error) from error


def parquet_groups(path: Path, raw: BinaryIO) -> list[int]:
    """Return how many bytes each row group of a Parquet file takes, packed.

    Raises:
        ValueError: a damaged file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        facts = pyarrow.parquet.ParquetFile(pyarrow.PythonFile(raw, mode="r"), pre_buffer=False).metadata
        groups = [facts.row_group(number) for number in range(facts.num_row_groups)]
        return [sum(group.column(n).total_compressed_size for n in range(group.num_columns)) for group in groups]
    except pyarrow.ArrowException as error:
        raise _damaged(path, "Parquet", error) from error


def parquet_rows(
    path: Path, raw: BinaryIO, text_field: str, *, groups: range | None = None
) -> Iterator[tuple[str, bytes]]:
    """Yield the place of each row, as `file: row N`, and the bytes of its text; of some row groups, or of all.

    Memory: one page of the column, as large as its writer made it, and a few rows.

    Raises:
        ValueError: no such column, a column that is not text, a row without text or with too much, or a damaged file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.PythonFile(raw, mode="r"), buffer_size=_READ_BYTES, pre_buffer=False)
        _check_column(path, file.schema_arrow, text_field)
        groups = range(file.num_row_groups) if groups is None else groups
        number = sum(file.metadata.row_group(before).num_rows for before in range(groups.start))
        for batch in file.iter_batches(
            batch_size=_BATCH_ROWS, row_groups=groups, columns=[text_field], use_threads=False
        ):
            column = batch.column(0)
            if pyarrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            for value in column.cast(pyarrow.large_binary()):
                number += 1
                yield (where := f"{path}: row {number:,}"), _row_bytes(value, where, text_field)
    except pyarrow.ArrowException as error:
        raise _damaged(path, "Parquet", error) from error


def _row_bytes(value: Any, where: str, text_field: str) -> bytes:
    data = value.as_buffer()
    if data is None:
        raise ValueError(f"{where}: expected text under {text_field!r}, found null")
    if data.size > MAX_ROW_BYTES:
        raise ValueError(f"{where}: expected text of at most {MAX_ROW_BYTES:,} bytes, found {data.size:,}")
    return bytes(data)


def _check_column(path: Path, schema: Any, text_field: str) -> None:
    from pyarrow import types

    names = list(schema.names)
    if names.count(text_field) != 1:
        found = [name[:80] for name in names[:8]]
        raise ValueError(f"{path}: expected the column {text_field!r} once, found {found} (set text_field)")
    kind = schema.field(text_field).type
    plain = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)):
        raise ValueError(f"{path}: expected text in the column {text_field!r}, found {str(kind)[:80]}")


def _too_wide_window(path: Path) -> ValueError:
    """Return the error for `zstd --long=28` and more, whose window is in the frame's header (RFC 8878, 3.1.1.1)."""
    window = ""
    if path.is_file():
        with path.open("rb") as file:
            header = file.read(6)
        is_single_segment = len(header) < 6 or header[4] & 0x20
        if not is_single_segment:
            base = 1 << (10 + (header[5] >> 3))
            window = f", here {(base + base // 8 * (header[5] & 7)) >> 20:,} MiB"
    return ValueError(
        f"{path}: expected a Zstandard window of at most {MAX_WINDOW_MIB} MiB, found a wider one{window} (the file is "
        "whole; zstd --long=31 -dc FILE | zstd -o NEW.zst packs it anew)"
    )


def _damaged(path: Path, kind: str, error: BaseException) -> ValueError:
    return ValueError(f"{path}: expected a whole {kind} file, found a damaged one ({str(error)[:200]})")
