"""Runs as points of a scaling law: parameters, tokens and the loss at the end; and the reading of them from a CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from transformerlm.utils.json_files import read_limited

Array = np.ndarray
FLOPS_PER_PARAMETER = 6  # and token: two in the forward pass, four in the backward pass
_SAME_BUDGET = 1.1
_MOST_BYTES = 50_000_000
_MOST_NAME_CHARS = 200
# What the columns of a CSV may be called, in any case; the names of the extracted Chinchilla points are among them.
_COLUMNS = {
    "parameters": ("parameters", "model size", "params", "n"),
    "tokens": ("tokens", "training tokens", "d"),
    "flops": ("flops", "training flop", "training flops", "c"),
    "losses": ("loss", "val_loss", "l"),
    "body": ("parameters_without_embeddings",),
    "seconds": ("seconds",),
    "names": ("name", "run"),
}


@dataclass(frozen=True, kw_only=True)
class Points:
    """Finished runs: `parameters`, `tokens`, `losses` and `flops`, all (n,) fp64 and positive, and their `names`.

    `body` are the parameters without embedding and head, `seconds` the times that the runs took; NaN: not known.
    """

    names: Array
    parameters: Array
    tokens: Array
    losses: Array
    flops: Array
    body: Array
    seconds: Array

    def __len__(self) -> int:
        return len(self.losses)

    def where(self, mask: Array) -> Points:
        """Return the points that a mask (n,), or an array of numbers, chooses."""
        return Points(**{one.name: getattr(self, one.name)[mask] for one in fields(self)})

    def without_embeddings(self) -> Points | None:
        """Return the points with the parameters of their bodies alone as sizes; None where these are not known."""
        return None if np.isnan(self.body).any() else replace(self, parameters=self.body)

    def without_highest(self, number: int) -> Points:
        """Return the points without the `number` of them that have the highest losses."""
        return self.where(np.sort(np.argsort(self.losses, kind="stable")[: len(self) - number]))

    def budgets(self) -> Array:
        """Return the number of each point's budget (n,), 0 for the lowest.

        A point begins a new budget if its FLOPs exceed those of the first point of the budget by more than 10 %.
        """
        order = np.argsort(self.flops, kind="stable")
        numbers, first, number = np.zeros(len(self), dtype=np.int64), np.inf, -1
        for place in order:
            if number < 0 or self.flops[place] > first * _SAME_BUDGET:
                number, first = number + 1, self.flops[place]
            numbers[place] = number
        return numbers


def read_points(path: Path) -> Points:
    """Return the points of a CSV file with a line of names first.

    Columns: `parameters`, `loss`, and `tokens` or `flops` (then tokens are flops / (6 parameters), and the other way
    round). `name`, `parameters_without_embeddings` and `seconds` may be there; other columns are ignored.

    Raises:
        ValueError: a column is missing, or a number is not positive.
        OSError: the file cannot be read.
    """
    try:
        text = read_limited(path, max_bytes=_MOST_BYTES).decode("utf-8-sig")
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: expected a CSV file in UTF-8 ({error})") from None
    places = _places(path, rows[0] if rows else [])
    if len(rows) < 2:
        raise ValueError(f"{path}: expected a line for each run below the names of the columns, found none")
    columns = {name: _numbers(path, rows[1:], place) for name, place in places.items() if name != "names"}
    unknown = np.full(len(rows) - 1, np.nan)
    per_token = FLOPS_PER_PARAMETER * columns["parameters"]
    tokens, flops = columns.get("tokens"), columns.get("flops")
    tokens = flops / per_token if tokens is None and flops is not None else tokens
    assert tokens is not None
    names = [_name(row, places.get("names"), number) for number, row in enumerate(rows[1:], 1)]
    return Points(
        names=np.array(names, dtype=object),
        parameters=columns["parameters"],
        tokens=tokens,
        losses=columns["losses"],
        flops=tokens * per_token if flops is None else flops,
        body=columns.get("body", unknown),
        seconds=columns.get("seconds", unknown),
    )


def _name(row: Sequence[str], place: int | None, number: int) -> str:
    name = row[place].strip()[:_MOST_NAME_CHARS] if place is not None and place < len(row) else ""
    return name or f"run {number}"


def _places(path: Path, head: Sequence[str]) -> dict[str, int]:
    """Return the place of each column that a head names."""
    words = [word.strip().lower() for word in head]
    places = {
        name: next(words.index(other) for other in others if other in words)
        for name, others in _COLUMNS.items()
        if any(other in words for other in others)
    }
    missing = [name for name in ("parameters", "losses") if name not in places]
    if missing or not {"tokens", "flops"} & places.keys():
        found = ", ".join(words[:20]) or "none"
        raise ValueError(f"{path}: expected the columns parameters, loss, and tokens or flops; found {found[:300]}")
    return places


def _numbers(path: Path, rows: Sequence[Sequence[str]], place: int) -> Array:
    numbers = np.empty(len(rows))
    for at, row in enumerate(rows):
        text = row[place].strip() if place < len(row) else ""
        try:
            numbers[at] = float(text)
        except ValueError:
            numbers[at] = np.nan
        if not 0 < numbers[at] < 1e300:
            raise ValueError(
                f"{path}: run {at + 1}, column {place + 1}: expected a positive number, found {text[:40]!r}"
            )
    return numbers
