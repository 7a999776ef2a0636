"""Tables for people: columns as wide as their cells, and numbers that are short enough to compare by eye."""

from __future__ import annotations

from collections.abc import Sequence
from unicodedata import combining, east_asian_width

Cells = Sequence[str]


def table_lines(heads: Cells, rows: Sequence[Cells], *, left: Sequence[int] = (0,), gap: str = "  ") -> list[str]:
    """Return a line for the heads and one for each row; columns in `left` are flush left, all others flush right."""
    widths = [max(map(columns_of, column)) for column in zip(heads, *rows, strict=True)]

    def line(cells: Cells) -> str:
        padded = (
            cell + " " * (width - columns_of(cell)) if number in left else " " * (width - columns_of(cell)) + cell
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return gap.join(padded).rstrip()

    return [line(heads), *map(line, rows)]


def columns_of(text: str) -> int:
    """Return how many columns of a terminal a text takes: a Chinese sign two, an accent by itself none."""
    if text.isascii():
        return len(text)
    return sum((2 if east_asian_width(char) in "WF" else 1) * (not combining(char)) for char in text)


def columns_that_fit(heads: Cells, rows: Sequence[Cells], *, width: int, drop: Sequence[int]) -> list[int]:
    """Return the numbers of the columns that fit a width: those in `drop` go, the first of them first."""
    widths = [max(map(columns_of, column)) + 2 for column in zip(heads, *rows, strict=True)]
    kept = list(range(len(heads)))
    for number in drop:
        if sum(widths[one] for one in kept) - 2 <= width:
            break
        kept.remove(number)
    return kept


def shortened(text: str, most: int) -> str:
    """Return a text of at most `most` characters: its beginning and its end, which mostly tell it from others."""
    end = (most - 3) // 2
    return text if len(text) <= most else f"{text[: most - 3 - end]}...{text[len(text) - end :]}"


def short_number(value: float | None) -> str:
    """Return a count in at most five characters: 512, 5.3M, 12.9G; nothing for None."""
    if value is None:
        return ""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scaled = value / (1e3 if letter == "k" else size)
            return f"{scaled:.0f}{letter}" if abs(scaled) >= 99.95 else f"{scaled:.1f}{letter}"
    return f"{value:.0f}"


def short_bytes(value: float | None) -> str:
    """Return a size in words: 0 B, 12 kB, 3.4 MB, 1.2 GB."""
    if value is None:
        return ""
    for size, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            scaled = value / size
            return f"{scaled:.0f} {name}" if scaled >= 9.95 else f"{scaled:.1f} {name}"
    return f"{value:.0f} B"


def short_time(seconds: float | None) -> str:
    """Return a length of time by its largest unit: 42 s, 7 min, 3.2 h, 12 d."""
    if seconds is None:
        return ""
    for size, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            scaled = seconds / size
            return f"{scaled:.0f} {name}" if scaled >= 9.95 or name == "min" else f"{scaled:.1f} {name}"
    return f"{seconds:.0f} s"


def real(value: float | None, digits: int = 3) -> str:
    """Return a number with a fixed number of decimals; nothing for None."""
    return "" if value is None else f"{value:.{digits}f}"
