"""Files in the formats of the extra `data`, for tests."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet


def zstd(data: bytes) -> bytes:
    """Return bytes as a frame of Zstandard."""
    return bytes(pyarrow.compress(data, "zstd", asbytes=True))


def parquet_bytes(columns: dict[str, Any], *, as_text: bool = False, **options: Any) -> bytes:
    """Return columns as a Parquet file; with `as_text`, bytes are declared text without a check."""
    table = pyarrow.table(columns)
    if as_text:
        arrays = [
            pyarrow.Array.from_buffers(pyarrow.string(), len(chunk), chunk.buffers())
            for chunk in (column.combine_chunks() for column in table.columns)
        ]
        table = pyarrow.table(dict(zip(table.column_names, arrays, strict=True)))
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, **options)
    return sink.getvalue()


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    """Write columns as a Parquet file."""
    path.write_bytes(parquet_bytes(columns, **options))
    return path
