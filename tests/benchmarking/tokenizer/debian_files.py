"""Files as Debian's packages ship them, much smaller."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Sequence
from pathlib import Path


def write_messages(root: Path, language: str, translations: Sequence[str], *, name: str = "sw") -> Path:
    """Write one of LibreOffice's catalogues, whose originals are numbers; its first entry is the head."""
    pairs = [("", "Content-Type: text/plain; charset=UTF-8\n"), *((str(i), t) for i, t in enumerate(translations))]
    strings = [[pair[side].encode() for pair in pairs] for side in (0, 1)]
    start, tables, data = 28 + 16 * len(pairs), b"", b""
    for text in (text for side in strings for text in side):
        tables += struct.pack("<2I", len(text), start + len(data))
        data += text + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, start)
    path = root / f"usr/lib/libreoffice/program/resource/{language}/LC_MESSAGES/{name}.mo"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + tables + data)
    return path


def write_help(root: Path, language: str, pages: Sequence[str]) -> None:
    """Write pages of LibreOffice's help, each with its title in the head and in the text."""
    folder = root / "usr/share/libreoffice/help" / language / "text" / "shared"
    folder.mkdir(parents=True, exist_ok=True)
    for number, page in enumerate(pages):
        text = f"<html><head><title>{number}</title></head><body>{page}</body></html>"
        (folder / f"{number:03d}.html").write_text(text, encoding="utf-8")


def write_changes(root: Path, package: str, first_line: str) -> None:
    """Write the list of changes of a package."""
    path = root / "usr/share/doc" / package / "changelog.Debian.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(f"{first_line}\n\n  * A change.\n".encode()))
