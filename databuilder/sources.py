"""Several texts in one training file, each as often as its weight says.

A weight is the number of times that each training document of a source appears in the training file: 2 is twice, 0.5
is every other document, 2.5 is twice, and every other one a third time. Validation documents are chosen first, appear
once, and are never in training.

The copies of a document are far apart, as in epochs: a source is written whole, then whole again, and finally the part
that the fraction asks for. With copies side by side, a model would learn to copy. Text is read and encoded once; the
other passes read ids from the token file itself, block by block.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from transformerlm.token_files.writer import TokenFileWriter
from transformerlm.utils.choice import are_chosen as are_chosen
from transformerlm.utils.text_files import expand_inputs, read_ahead, total_bytes
from transformerlm.utils.text_formats import format_of

Array = np.ndarray[Any, Any]
PathName = str | os.PathLike[str]


@dataclass(frozen=True)
class Source:
    """Text files and globs, and the number of times that each of their documents appears in the training file."""

    input: PathName | Sequence[PathName]
    weight: float = 1.0
    text_field: str | None = None


@dataclass(frozen=True)
class SourceReport:
    """What one token file holds from one source; `bytes` counts as in `SplitReport`."""

    input: list[str]
    weight: float
    documents: int
    tokens: int
    bytes: int


class SourceFiles:
    """A source whose files were found; `name` is for errors, `weighted` says whether it was given as a `Source`."""

    def __init__(self, name: str, source: Source, *, text_field: str, weighted: bool = True) -> None:
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise ValueError(f"expected a weight above 0, found {source.weight}")
        self.name = name
        self.weighted = weighted
        self.weight = source.weight
        self.text_field = source.text_field or text_field
        names = [source.input] if isinstance(source.input, str | os.PathLike) else source.input
        self.input = [os.fspath(name) for name in names]
        self.paths = expand_inputs(self.input)
        read_ahead(self.paths)
        self.disk_bytes = total_bytes(self.paths)

    def disk_bytes_like(self, path: Path) -> int:
        """Return how many bytes those of its files take that are packed as `path` is; others hold more or less text."""
        return total_bytes([one for one in self.paths if _packing(one) == _packing(path)])

    def check_documents(self, number: int) -> None:
        """Raise ValueError if the source has no document."""
        if not number:
            raise ValueError(f"{self.name}: expected text, found none in {', '.join(map(str, self.paths))}")


def _packing(path: Path) -> tuple[str | None, bool]:
    form = format_of(path)
    return form.compression, form.layout == "Parquet"


def find_sources(inputs: PathName | Sequence[PathName] | Sequence[Source], text_field: str) -> list[SourceFiles]:
    """Find the files of each source; inputs without weights are one source of weight 1.

    Raises:
        TypeError: names and sources in one list.
        ValueError: a weight that is not a number above 0, a file in two sources, or as `expand_inputs`.
        OSError: as `expand_inputs`; the message names the source.
    """
    if isinstance(inputs, Source):
        inputs = [inputs]
    items: Sequence[object] = [] if isinstance(inputs, str | os.PathLike) else inputs
    are_sources = [isinstance(item, Source) for item in items]
    if any(are_sources) and not all(are_sources):
        name = items[are_sources.index(False)]
        raise TypeError(
            f"inputs: expected names alone or sources alone, found both (Source({str(name)!r}) makes it one)"
        )
    if not any(are_sources):
        source = Source(cast("PathName | Sequence[PathName]", inputs))
        return [SourceFiles("input", source, text_field=text_field, weighted=False)]
    sources: list[SourceFiles] = []
    owners: dict[Path, str] = {}
    for number, source in enumerate(cast("Sequence[Source]", inputs)):
        name = f"sources.{number}"
        try:
            sources.append(SourceFiles(name, source, text_field=text_field))
        except (ValueError, OSError) as error:
            raise type(error)(f"{name}: {error}") from None
        for path in sources[-1].paths:
            owner = owners.setdefault(path.resolve(), name)
            if owner != name:  # a document held out of one would be trained on from the other
                raise ValueError(f"{name}: expected files of its own, found {path}, which is in {owner} too")
    return sources


class Thinner:
    """Takes an evenly spread fraction of the documents from a stream of ids, and counts what it takes."""

    def __init__(self, fraction: float, separator_id: int, num_bytes_of: Callable[[Array], int]) -> None:
        self.num_documents = 0
        self.num_bytes = 0
        self._fraction = fraction
        self._separator_id = separator_id
        self._num_bytes_of = num_bytes_of
        self._num_seen = 0

    def __call__(self, ids: Array) -> Array:
        """Return the ids of the chosen documents, with their separators."""
        ends = ids == self._separator_id  # (ids,)
        documents = np.cumsum(ends) - ends + self._num_seen  # the number of each id's document: (ids,)
        chosen = are_chosen(documents, self._fraction)
        self._num_seen += int(np.count_nonzero(ends))
        self.num_documents += int(np.count_nonzero(ends & chosen))
        taken: Array = ids[chosen]
        self.num_bytes += self._num_bytes_of(taken)
        return taken


class SourceWriter:
    """Appends the documents of one source to the token files, those for training as often as its weight says."""

    def __init__(self, source: SourceFiles, writers: Sequence[TokenFileWriter], thinner: Thinner) -> None:
        self._source = source
        self._writers = writers
        self._starts = [writer.tokens for writer in writers]
        self._whole_passes = int(source.weight)
        self._thinner = thinner

    def append(self, parts: Sequence[Array]) -> None:
        """Write the ids of documents for training and of those for validation."""
        train, valid = parts
        if not self._whole_passes:
            train = self._thinner(train)
        for writer, ids in zip(self._writers, (train, valid), strict=False):
            writer.append(ids)

    def finish(self, num_documents: Array, num_bytes: Array) -> list[SourceReport]:
        """Write the remaining passes, and return what each file holds from the source.

        Args:
            num_documents: the source's documents for training and for validation, each counted once, int `(2,)`.
            num_bytes: the bytes of these documents, int `(2,)`.

        Raises:
            ValueError: the source has no document.
        """
        source, train = self._source, self._writers[0]
        source.check_documents(int(num_documents.sum()))
        end = train.tokens
        for number in range(1, math.ceil(source.weight)):
            for ids in train.blocks(self._starts[0], end):
                train.append(ids if number < self._whole_passes else self._thinner(ids))
        passes = np.array([self._whole_passes, 1])
        documents = (num_documents * passes + [self._thinner.num_documents, 0]).tolist()
        sizes = (num_bytes * passes + [self._thinner.num_bytes, 0]).tolist()
        return [
            SourceReport(
                source.input, source.weight, documents[split], writer.tokens - self._starts[split], sizes[split]
            )
            for split, writer in enumerate(self._writers)
        ]
