"""Conversations as questions with one right answer: what the assistant should say after what was said before it.

Each message of an assistant is a question: the messages before it, as they are in the file, and the text that it holds.
An answer is right if it is that text exactly. So this measures answers of which there is one, such as a number, and
nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transformerlm.evaluation.documents import Array
from transformerlm.evaluation.statistics import Metrics, interval, resampled_sums
from transformerlm.tokenizer.chat import Message
from transformerlm.utils.conversations import conversation_as_text, messages_of
from transformerlm.utils.json_files import json_kind, parse_json_object
from transformerlm.utils.text_files import expand_inputs
from transformerlm.utils.text_formats import check_can_unpack, damage_named, format_of

_BOM = "\ufeff"


@dataclass(frozen=True)
class Question:
    """The messages before an answer, the right answer, and which kind of question it is, "" if nothing says so.

    `conversation` is the number of the row, from 0 on, and `where` names file and line.
    """

    messages: tuple[Message, ...]
    reference: str
    kind: str
    conversation: int
    where: str


def read_questions(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    messages_field: str = "messages",
    kind_field: str = "kind",
    refuse_invalid: bool = False,
) -> list[Question]:
    """Return the questions of JSON lines of conversations, in order.

    Invalid UTF-8 is read as U+FFFD unless `refuse_invalid` is given.

    Raises:
        ValueError: a file of another kind, a row that is no conversation, or no message of an assistant at all.
        FileNotFoundError: a name or glob without a match.
    """
    paths = expand_inputs(inputs)
    rows = (row for path in paths for row in _rows(path, "strict" if refuse_invalid else "replace"))
    questions: list[Question] = []
    for number, (where, record) in enumerate(rows):
        if messages_field not in record:
            found = f"{sorted(record)[:8]} (set chat.messages_field)"
            raise ValueError(f"{where}: expected the field {messages_field!r}, found {found}")
        kind = record.get(kind_field)
        if not isinstance(kind, str | None):
            raise ValueError(f"{where}: expected text under {kind_field!r}, found {json_kind(kind)} (set kind_field)")
        messages = messages_of(conversation_as_text(record[messages_field], where=where)[0])
        questions += [
            Question(tuple(messages[:place]), content, kind or "", number, where)
            for place, (role, content) in enumerate(messages)
            if role == "assistant"
        ]
    if not questions:
        raise ValueError(f"input: expected messages of an assistant, found none in {', '.join(map(str, paths))}")
    return questions


def _rows(path: Path, errors: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and contents of each line of a file that is not empty."""
    form = format_of(path)
    if form.layout != "JSON lines":
        raise ValueError(f"{path}: expected conversations as JSON lines (.jsonl), found another kind of file")
    check_can_unpack(path, form)
    with damage_named(path, form), path.open("rb") as raw:
        for number, line in enumerate(form.unpacked(raw), 1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8", errors).removeprefix(_BOM)
            except UnicodeDecodeError as error:
                found = f"byte {line[error.start]:#04x} at offset {error.start:,} of the line"
                raise ValueError(f'{where}: expected UTF-8, found {found} (invalid_utf8 = "replace")') from None
            if text.strip():
                yield where, parse_json_object(text.strip(), where=where)


def count_out_of_reach(questions: Sequence[Question], end_strings: Sequence[str]) -> int:
    """Return how many right answers no model can give, as a string that ends an answer comes before their end.

    That is one that holds the string, or whose end and the string after it do.
    """
    return sum(
        any((question.reference + end).index(end) < len(question.reference) for end in end_strings)
        for question in questions
    )


def score_answers(
    questions: Sequence[Question], right: Sequence[bool], *, resamples: int = 1000, seed: int = 0
) -> Metrics:
    """Return the share of right answers, with the ends of its interval, and the sizes.

    Conversations are drawn for the interval, not answers, because the answers of one depend on each other.
    """
    return _shares(questions, np.array([right], dtype=np.float64), ["exact_match"], resamples=resamples, seed=seed)


def score_by_kind(
    questions: Sequence[Question], right: Sequence[bool], *, resamples: int = 1000, seed: int = 0
) -> dict[str, Metrics]:
    """Return what `score_answers` does for each kind of question by itself; nothing if no question has a kind."""
    scored: dict[str, Metrics] = {}
    for kind in sorted({question.kind for question in questions} - {""}):
        chosen = [number for number, question in enumerate(questions) if question.kind == kind]
        some, theirs = [questions[number] for number in chosen], [right[number] for number in chosen]
        scored[kind] = score_answers(some, theirs, resamples=resamples, seed=seed)
    return scored


def compare_answers(
    questions: Sequence[Question],
    first: Sequence[bool],
    second: Sequence[bool],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Metrics:
    """Return how much larger the share of right answers of `second` is, with a paired interval."""
    more = np.array(second, dtype=np.float64) - np.array(first, dtype=np.float64)
    found = _shares(questions, more[None], ["exact_match_difference"], resamples=resamples, seed=seed)
    return {name: value for name, value in found.items() if name.startswith("exact_match")}


def _shares(questions: Sequence[Question], points: Array, names: list[str], *, resamples: int, seed: int) -> Metrics:
    """Return the mean of each row of points `(names, answers)`, with its interval over conversations."""
    _, rows = np.unique([question.conversation for question in questions], return_inverse=True)
    table = np.stack([np.bincount(rows, weights=each) for each in (*points, np.ones(len(questions)))], axis=1)
    sums = [table[:0], *resampled_sums(table, resamples if len(table) > 1 else 0, np.random.default_rng(seed))]
    drawn = np.concatenate(sums)  # (resamples, names + 1)
    metrics: Metrics = {}
    for column, name in enumerate(names):
        metrics |= {name: float(points[column].mean()), **interval(name, drawn[:, column] / drawn[:, -1])}
    return metrics | {"answers": len(questions), "conversations": len(table)}
